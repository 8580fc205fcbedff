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
from mixerlab.lm.parallel.interrupts import SIGNALS
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig
from mixerlab.options import ConfigError

ROW_ORDER = 2
"""The order of rows that a run begins with, as its checkpoints note it. Those of versions up to 0.2 note none: 1."""

ROUNDS = 14
"""Of the Feistel network: with as many even a handful of rows has each of its orders as often."""


def epoch_order(seed: int, epoch: int, n_rows: int, places: np.ndarray) -> np.ndarray:
    """The rows at some places of an epoch: those of a permutation of range(n_rows), computed for each place alone.

    A Feistel network on pairs (left, right) of numbers below (a, b), of which there are a few more than rows. A place
    that comes out beyond the rows goes through it again (cycle walking: Black and Rogaway, "Ciphers with arbitrary
    finite domains", CT-RSA 2002).

    Args:
        places: (n,) int64, each in range(n_rows).

    Returns:
        (n,) int64.
    """
    b = math.isqrt(n_rows - 1) + 1
    a = -(-n_rows // b)
    rows, beyond = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while beyond.any():
        left, right = np.divmod(rows[beyond], b)
        for of_left, of_right in _keys(seed, epoch):
            left = (left + _mixed(right + of_left) % a) % a
            right = (right + _mixed(left + of_right) % b) % b
        rows[beyond] = left * b + right
        beyond = rows >= n_rows
    return rows.astype(np.int64)


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch]).generate_state(ROUNDS, np.uint64).reshape(-1, 2)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Scatters numbers over all of uint64: the finaliser of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@lru_cache(maxsize=2)
def _first_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """Row order 1, which takes memory and time for all rows; for runs that began with it."""
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
        order: int = ROW_ORDER,
    ):
        self.seed, self.n_rows, self.start = seed, n_rows, start
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.ranks = rank, ranks
        self.order = order
        if order not in (1, ROW_ORDER):
            raise ConfigError(
                f"the rows of this run are in an order ({order}) that this version of mixerlab does not know; expected "
                "the version that began it, or a newer one"
            )

    def rows(self, step: int) -> list[int]:
        """Of 0-based `step`, the micro-batches one after another."""
        return self._rows(step, 1)[0]

    def _rows(self, step: int, steps: int) -> list[list[int]]:
        pieces = np.arange(step * self.accumulate, (step + steps) * self.accumulate)[:, None]
        places = (pieces * self.ranks + self.rank) * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(places.ravel(), self.n_rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            if self.order == 1:
                rows[mine] = _first_order(self.seed, epoch, self.n_rows)[places[mine]]
            else:
                rows[mine] = epoch_order(self.seed, epoch, self.n_rows, places[mine])
        return rows.reshape(steps, -1).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        together = max(1, 256 // (self.batch_size * self.accumulate))  # computed in hardly more time than one
        for step in count(self.start, together):
            yield from self._rows(step, together)


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
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class Loaders(L.LightningDataModule):
    """The loaders of a data module, for Lightning: a training batch is the list of a step's micro-batches.

    Args:
        source: the data module, set up.
        trainer: batch size, number of workers and length of validation.
        seed: of the order of rows.
        step: optimiser steps done already; training goes on with the rows after them.
        world: this rank among all.
        order: the run's order of rows.
    """

    def __init__(
        self,
        source: DataModule,
        trainer: TrainerConfig,
        seed: int,
        step: int,
        world: World,
        order: int = ROW_ORDER,
    ):
        super().__init__()
        self.source, self.trainer_config, self.world = source, trainer, world
        self.seed, self.step, self.order = seed, step, order

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
            self.order,
        )
        return self._loader(rows, steps, partial(collate_micro_batches, batch_size=config.batch_size))

    def val_dataloader(self) -> list[DataLoader]:
        return [self._validation(rows) for rows in self.source.val_datasets().values()]

    def _validation(self, rows: Rows) -> DataLoader:
        config, world = self.trainer_config, self.world
        batches = ValidationBatches(len(rows), config.batch_size, config.val_batches, world.rank, world.size)
        return self._loader(PaddedRows(rows), batches)
