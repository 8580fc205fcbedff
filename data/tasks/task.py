"""What all synthetic tasks share: rows made on the fly, many at a time.

Letters: n samples, T positions of a row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixerlab.data.module import IGNORE, DataModule, Rows
from mixerlab.data.tasks.ahead import Stored, cache_folder, make_ahead
from mixerlab.data.tasks.draws import Draws
from mixerlab.options import option

Ids = NDArray[np.int64]

TOGETHER = 1 << 18
"""Positions of the rows that are made together, at most, where rows are asked for one by one."""


@dataclass
class TaskConfig:
    """What all tasks share."""

    cache_dir: str | None = option(
        None,
        "a folder in which rows are made ahead, as ~/.cache/mixerlab; null: made when they are asked for",
    )


class TaskRows(Rows):
    """Rows of a split, made when they are asked for: row i from the draws of (seed, split, i) alone.

    A loader asks for a batch at once (`__getitems__`), which is made at once. Rows that are asked for one by one are
    made a block at a time, and the last block is kept: good for reading in order.

    Args:
        make: (draws of n samples, their indices (n,)) -> input_ids and labels, (n, seq_len) each, of any integer type.
        n_rows: how many there are.
        seq_len: T of these rows.
        seed, split: of the draws.
    """

    def __init__(
        self,
        make: Callable[[Draws, Ids], tuple[NDArray, NDArray]],
        n_rows: int,
        seq_len: int,
        seed: int,
        split: str,
    ) -> None:
        self.make, self.n_rows, self.seq_len, self.seed, self.split = make, n_rows, seq_len, seed, split
        self.block_size = max(1, min(256, TOGETHER // seq_len))
        self.cache: Path | None = None
        """The folder in which they are made ahead."""
        self._block: tuple[int, Tensor, Tensor] = (-1, torch.empty(0), torch.empty(0))

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < self.n_rows:
            raise IndexError(f"row {i} of {self.n_rows}")
        block, row = divmod(i, self.block_size)
        if self._block[0] != block:
            first = block * self.block_size
            self._block = (block, *self.batch(range(first, min(first + self.block_size, self.n_rows))))
        _, input_ids, labels = self._block
        return {"input_ids": input_ids[row].clone(), "labels": labels[row].clone()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        for i in indices:
            if not 0 <= i < self.n_rows:
                raise IndexError(f"row {i} of {self.n_rows}")
        rows = zip(*self.batch(indices), strict=True)
        return [{"input_ids": input_ids, "labels": labels} for input_ids, labels in rows]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """input_ids and labels of these rows, (n, T) int64 each."""
        index = np.asarray(indices, dtype=np.int64)
        input_ids, labels = self.make(Draws(self.seed, self.split, index), index)
        return torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_block": (-1, torch.empty(0), torch.empty(0))}


class Task(DataModule):
    """A synthetic task: `make` has the rows, `val_datasets` the difficulties."""

    config: TaskConfig
    vocab_size: int = 0
    """V; each task sets it, as it does seq_len."""
    _ready = False
    """Whether all rows that are to be made ahead lie in the cache."""

    @abstractmethod
    def make(self, draws: Draws, index: Ids, **how: Any) -> tuple[NDArray, NDArray]:
        """input_ids and labels of the samples `index` (n,), (n, T) each. `how` is what a dataset has of its own."""

    def prepare(self) -> None:
        """Makes the rows ahead if `cache_dir` says so. Raises DataError."""
        self._ready = False
        for rows in (self.train_dataset(), *self.val_datasets().values()):
            if isinstance(rows, TaskRows) and rows.cache is not None:
                make_ahead(rows.cache, rows, self.vocab_size, self.report)

    def setup(self) -> None:
        self._ready = True

    def dataset(self, split: str, n_rows: int, seq_len: int | None = None, **how: Any) -> TaskRows:
        """Rows of a split, with a difficulty of their own if `how` says so."""
        rows = TaskRows(partial(self.make, **how), n_rows, seq_len or self.seq_len, self.seed, split)
        options = asdict(self.config)
        if cache_dir := options.pop("cache_dir"):
            settings = [options, how, self.seed, split, n_rows, rows.seq_len]
            rows.cache = cache_folder(cache_dir, type(self), settings)
            if self._ready:
                rows.make = Stored(rows.cache)
        return rows


def unlabelled(n: int, T: int) -> Ids:
    """(n, T) labels, none of which counts."""
    return np.full((n, T), IGNORE)
