"""Induction heads: what came after the special token? (Gu and Dao, "Mamba", arXiv 2312.00752, section 4.1)

Letters: n samples, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.module import Rows
from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.task import Ids, Task, TaskConfig, unlabelled
from mixerlab.options import option

SPECIAL = 0
SHORTEST = 3
"""The special token, the one to remember, and the special token again."""


@dataclass
class InductionHeadsConfig(TaskConfig):
    """Published: trained at 256, tested at 64, 128, ... up to 2^20."""

    seq_len: int = option(256, "T, the positions of a row to train on", min=SHORTEST)
    test_lengths: list[int] = option(
        [64, 128, 256, 512, 1024], "lengths of further rows to validate on, as length_64 for 64"
    )
    vocab_size: int = option(16, "V: the special token and ordinary ones", min=3)
    n_train: int = option(1_000_000, "rows to train on", min=1)
    n_valid: int = option(1_000, "rows of each dataset to validate on", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if any(length < SHORTEST for length in self.test_lengths):
            yield "test_lengths", f"each must be at least {SHORTEST}"


@register_data("induction_heads", InductionHeadsConfig)
class InductionHeads(Task):
    """What came after the special token? (Gu and Dao, "Mamba", arXiv 2312.00752)"""

    config: InductionHeadsConfig

    def __init__(self, config: InductionHeadsConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train)

    def val_datasets(self) -> dict[str, Rows]:
        config, names = self.config, {"valid": self.config.seq_len}
        names |= {f"length_{length}": length for length in config.test_lengths}
        return {name: self.dataset(name, config.n_valid, T, length=T) for name, T in names.items()}

    def make(
        self, draws: Draws, index: Ids, length: int | None = None, **how: Any
    ) -> tuple[NDArray, NDArray]:
        T, rows = length or self.seq_len, np.arange(len(index))
        place = draws.integers(0, T - SHORTEST)
        ids = draws.integers(SPECIAL + 1, self.vocab_size - 1, T)
        ids[rows, place] = ids[:, -1] = SPECIAL
        labels = unlabelled(*ids.shape)
        labels[:, -1] = ids[rows, place + 1]
        return ids, labels
