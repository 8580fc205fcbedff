"""Which rows make up which batch: arithmetic on the seed and the batch's number, so that a run can resume."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from functools import lru_cache

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.module import IGNORE, DataModule, Rows
from lm.config import TrainerConfig
from lm.processes import World


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of range(n_rows), int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n_rows)


class Batches(Sampler[list[int]]):
    """Endless batches of row indices: micro-batch k of a rank is a pure function of (seed, k, rank, ranks).

    All epochs form one long sequence of rows. Its k-th piece of `ranks * batch_size` rows is dealt out to the ranks
    in order, so that an optimiser step has the same rows however they are divided.
    """

    def __init__(
        self, seed: int, n_rows: int, batch_size: int, start: int = 0, rank: int = 0, ranks: int = 1
    ):
        self.seed, self.n_rows, self.batch_size, self.start = seed, n_rows, batch_size, start
        self.rank, self.ranks = rank, ranks

    def batch(self, k: int) -> list[int]:
        first = (k * self.ranks + self.rank) * self.batch_size
        return [
            int(epoch_order(self.seed, place // self.n_rows, self.n_rows)[place % self.n_rows])
            for place in range(first, first + self.batch_size)
        ]

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while True:
            yield self.batch(k)
            k += 1


class ValidationBatches(Sampler[list[int]]):
    """The first `limit` batches of a split, dealt out to the ranks in turn.

    Every rank gets as many, because sharded models run in step; those that are not there hold one row, `PADDING`.
    """

    def __init__(self, n_rows: int, batch_size: int, limit: int | None, rank: int = 0, ranks: int = 1):
        whole = math.ceil(n_rows / batch_size)
        self.n_rows, self.batch_size = n_rows, batch_size
        self.n_batches = whole if limit is None else min(limit, whole)
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return math.ceil(self.n_batches / self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        for k in range(self.rank, len(self) * self.ranks, self.ranks):
            first = k * self.batch_size
            rows = list(range(first, min(first + self.batch_size, self.n_rows)))
            yield rows if k < self.n_batches else [PADDING]


PADDING = -1
"""The index of a row without labels."""


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows, and one without labels at the index `PADDING`."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index != PADDING:
            return self.rows[index]
        row = self.rows[0]
        return {**row, "labels": torch.full_like(row["labels"], IGNORE)}


def _ignore_signals(worker: int) -> None:
    """Signals to the whole process group are for the training process: it needs this one to finish its step."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class Loaders(L.LightningDataModule):
    """The loaders of a data module, for Lightning.

    Args:
        source: the data module, set up.
        trainer: batch size, number of workers and length of validation.
        seed: of the order of rows.
        step: optimiser steps done already; training goes on with the rows after them.
        world: this rank among all.
    """

    def __init__(self, source: DataModule, trainer: TrainerConfig, seed: int, step: int, world: World):
        super().__init__()
        self.source = source
        self.config = trainer
        self.seed = seed
        self.step = step
        self.world = world

    def _loader(self, dataset: Dataset, batches: Sampler[list[int]]) -> DataLoader:
        # Iterators draw a seed from the global generator unless they have their own; a resumed run, which has
        # made another number of iterators, would then see other random numbers than an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.config.num_workers,
            generator=generator,
            worker_init_fn=_ignore_signals,
        )

    def train_dataloader(self) -> DataLoader:
        rows = self.source.train_dataset()
        start = self.step * self.config.accumulate
        batches = Batches(
            self.seed, len(rows), self.config.batch_size, start, self.world.rank, self.world.size
        )
        return self._loader(rows, batches)

    def val_dataloader(self) -> list[DataLoader]:
        return [
            self._loader(
                PaddedRows(rows),
                ValidationBatches(
                    len(rows),
                    self.config.batch_size,
                    self.config.val_batches,
                    self.world.rank,
                    self.world.size,
                ),
            )
            for rows in self.source.val_datasets().values()
        ]
