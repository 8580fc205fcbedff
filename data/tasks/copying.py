"""Selective copying: repeat what is not noise, in order (Gu and Dao, "Mamba", arXiv 2312.00752, section 4.1).

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

NOISE, MARKER, DATA = range(3)


@dataclass
class SelectiveCopyingConfig(TaskConfig):
    """Published: 16 of 4096 tokens, a vocabulary of 16."""

    length: int = option(4096, "tokens that hold the data; the row has n_data more", min=1)
    n_data: int = option(16, "tokens to copy", min=1)
    vocab_size: int = option(16, "V: noise, the marker, and data", min=4)
    n_train: int = option(1_000_000, "rows to train on", min=1)
    n_valid: int = option(1_000, "rows to validate on", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.n_data > self.length:
            yield "n_data", f"at most length = {self.length} is needed"


@register_data("selective_copying", SelectiveCopyingConfig)
class SelectiveCopying(Task):
    """Repeat the tokens that are not noise, in order (Gu and Dao, "Mamba", arXiv 2312.00752)."""

    config: SelectiveCopyingConfig

    def __init__(self, config: SelectiveCopyingConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.length + config.n_data, config.vocab_size

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train)

    def val_datasets(self) -> dict[str, Rows]:
        return {"valid": self.dataset("valid", self.config.n_valid)}

    def make(self, draws: Draws, index: Ids, **how: Any) -> tuple[NDArray, NDArray]:
        config, n = self.config, len(index)
        data = draws.integers(DATA, config.vocab_size - 1, config.n_data)
        places = np.sort(draws.distinct(config.length, config.n_data), axis=1)
        ids, labels = np.full((n, self.seq_len), NOISE), unlabelled(n, self.seq_len)
        np.put_along_axis(ids, places, data, axis=1)
        ids[:, config.length :], labels[:, config.length :] = MARKER, data
        return ids, labels
