"""Which rows make up which step: arithmetic on the seed and the step, so that a run can resume."""

import math
import signal
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mixerlab.data.module import IGNORE, DataModule, Rows
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig


@lru_cache(maxsize=2)  # a step may straddle two epochs
def epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of range(n_rows), int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n_rows)


class Steps(Sampler[list[int]]):
    """Endless lists of row indices, those of an optimiser step on this rank: a function of the seed and the step.

    All epochs form one long sequence of rows. A step takes the next `ranks * accumulate * batch_size` of them, and
    deals out every micro-batch to the ranks in order, so that it has the same rows however they are divided.
    """

    def __init__(
        self,
        seed: int,
        n_rows: int,
        batch_size: int,
        accumulate: int = 1,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.seed, self.n_rows, self.start = seed, n_rows, start
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.ranks = rank, ranks

    def rows(self, step: int) -> list[int]:
        """Of 0-based `step`, the micro-batches one after another."""
        pieces = range(step * self.accumulate, (step + 1) * self.accumulate)
        places = (
            (piece * self.ranks + self.rank) * self.batch_size + i
            for piece in pieces
            for i in range(self.batch_size)
        )
        return [
            int(epoch_order(self.seed, place // self.n_rows, self.n_rows)[place % self.n_rows])
            for place in places
        ]

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.rows, count(self.start))


def collate_micro_batches(rows: list[dict[str, Tensor]], batch_size: int) -> list[dict[str, Tensor]]:
    """The rows of a step -> its micro-batches, whose tensors are (batch_size, T)."""
    return [default_collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


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
    """The loaders of a data module, for Lightning: a training batch is the list of a step's micro-batches.

    Args:
        source: the data module, set up.
        trainer: batch size, number of workers and length of validation.
        seed: of the order of rows.
        step: optimiser steps done already; training goes on with the rows after them.
        world: this rank among all.
    """

    def __init__(self, source: DataModule, trainer: TrainerConfig, seed: int, step: int, world: World):
        super().__init__()
        self.source, self.trainer_config, self.seed, self.step, self.world = (
            source,
            trainer,
            seed,
            step,
            world,
        )

    def _loader(self, rows: Dataset, sampler: Sampler[list[int]], collate: Any = None) -> DataLoader:
        # Iterators draw a seed from the global generator unless they have their own; a resumed run, which has
        # made another number of iterators, would then see other random numbers than an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.trainer_config.num_workers,
            generator=generator,
            worker_init_fn=_ignore_signals,
        )

    def train_dataloader(self) -> DataLoader:
        rows, config = self.source.train_dataset(), self.trainer_config
        steps = Steps(
            self.seed,
            len(rows),
            config.batch_size,
            config.accumulate,
            self.step,
            self.world.rank,
            self.world.size,
        )
        return self._loader(rows, steps, partial(collate_micro_batches, batch_size=config.batch_size))

    def val_dataloader(self) -> list[DataLoader]:
        return [self._validation(rows) for rows in self.source.val_datasets().values()]

    def _validation(self, rows: Rows) -> DataLoader:
        config, world = self.trainer_config, self.world
        batches = ValidationBatches(len(rows), config.batch_size, config.val_batches, world.rank, world.size)
        return self._loader(PaddedRows(rows), batches)
