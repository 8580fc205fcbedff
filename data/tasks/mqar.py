"""Multi-query associative recall: say the value of each key that is asked for (Arora et al., "Zoology", ICLR 2024).

Letters: n samples, T positions of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.module import Rows
from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws, skipping
from mixerlab.data.tasks.task import Ids, Task, TaskConfig, unlabelled
from mixerlab.options import option

FILLER = 0
POWER = 0.01
"""a of the gaps' distribution, (g + 1)^(a - 1): most queries come soon."""


@dataclass
class MQARConfig(TaskConfig):
    """Published: seq_len and n_pairs of 64 and 4, 128 and 8, 256 and 16, 512 and 64."""

    vocab_size: int = option(
        8192, "V: the filler 0, keys up to V/2 - 1, and values, which are the other half", min=4
    )
    seq_len: int = option(64, "T, the positions of a row; even", min=4)
    n_pairs: int = option(4, "pairs of a key and a value, each asked for once", min=1)
    test_pairs: list[int] = option(
        [], "further numbers of pairs to validate on, as pairs_8 for 8, in rows that are as long"
    )
    random_non_queries: bool = option(
        False,
        "fill the places between queries with random tokens that are none of the row's keys; false: with 0",
    )
    n_train: int = option(100_000, "rows to train on", min=1)
    n_valid: int = option(3_000, "rows of each dataset to validate on", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.vocab_size % 2:
            yield "vocab_size", "an even number is needed, half of it values"
        if self.seq_len % 2:
            yield "seq_len", "an even number is needed, for pairs and for queries at even places"
        most, keys = self.seq_len // 4, self.vocab_size // 2 - 1
        for name in ("n_pairs", "test_pairs"):
            value = getattr(self, name)
            for pairs in value if isinstance(value, list) else [value]:
                if not 1 <= pairs <= most:
                    yield name, f"1 to {most} fit, a quarter of seq_len = {self.seq_len}"
                elif pairs > keys:
                    yield name, f"at most {keys} are needed, the keys that vocab_size = {self.vocab_size} has"


@register_data("mqar", MQARConfig)
class MQAR(Task):
    """Say the value of each key that is asked for again (Arora et al., "Zoology", ICLR 2024)."""

    config: MQARConfig

    def __init__(self, config: MQARConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len, self.vocab_size = config.seq_len, config.vocab_size

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train)

    def val_datasets(self) -> dict[str, Rows]:
        config, names = self.config, {"valid": self.config.n_pairs}
        names |= {f"pairs_{pairs}": pairs for pairs in config.test_pairs}
        return {name: self.dataset(name, config.n_valid, n_pairs=pairs) for name, pairs in names.items()}

    def make(
        self, draws: Draws, index: Ids, n_pairs: int | None = None, **how: Any
    ) -> tuple[NDArray, NDArray]:
        config, n, T = self.config, len(index), self.config.seq_len
        pairs = n_pairs or config.n_pairs
        half, after = config.vocab_size // 2, 2 * pairs
        keys = 1 + draws.distinct(half - 1, pairs)
        values = half + draws.distinct(half, pairs)
        gaps = draws.weighted((1.0 + np.arange((T - after) // 2)) ** (POWER - 1), pairs)  # g + 1 = 1, 2, ...
        ids, labels = np.full((n, T), FILLER), unlabelled(n, T)
        if config.random_non_queries:
            filler = draws.integers(0, config.vocab_size - 1 - pairs, T - after)
            ids[:, after:] = skipping(filler, keys)
        ids[:, :after:2], ids[:, 1:after:2] = keys, values
        np.put_along_axis(ids, after + 2 * gaps, keys, axis=1)
        np.put_along_axis(labels, after + 2 * gaps, values, axis=1)
        return ids, labels
