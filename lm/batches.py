"""Which rows make up which batch: arithmetic on the seed and the batch's number, so that a run can resume."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data.module import DataModule


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of range(n_rows), int64."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n_rows)


class Batches(Sampler[list[int]]):
    """Endless batches of row indices: micro-batch k of the run is a pure function of (seed, k).

    All epochs form one long sequence of rows; micro-batch k is its k-th piece of `batch_size`.
    """

    def __init__(self, seed: int, n_rows: int, batch_size: int, start: int = 0):
        self.seed, self.n_rows, self.batch_size, self.start = seed, n_rows, batch_size, start

    def batch(self, k: int) -> list[int]:
        places = range(k * self.batch_size, (k + 1) * self.batch_size)
        return [
            int(epoch_order(self.seed, place // self.n_rows, self.n_rows)[place % self.n_rows])
            for place in places
        ]

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while True:
            yield self.batch(k)
            k += 1


class Loaders(L.LightningDataModule):
    """The loaders of a data module, for Lightning; training continues where the checkpoint stopped."""

    def __init__(self, source: DataModule, batch_size: int, num_workers: int, seed: int):
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.start = 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"start": self.trainer.fit_loop.epoch_loop.batch_progress.total.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["start"]

    def _loader(self, dataset, **options: Any) -> DataLoader:
        # Iterators draw a seed from the global generator unless they have their own; a resumed run, which has
        # made another number of iterators, would then see other random numbers than an uninterrupted one.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, num_workers=self.num_workers, generator=generator, **options)

    def train_dataloader(self) -> DataLoader:
        dataset = self.source.train_dataset()
        return self._loader(
            dataset, batch_sampler=Batches(self.seed, len(dataset), self.batch_size, self.start)
        )

    def val_dataloader(self) -> list[DataLoader]:
        return [self._loader(d, batch_size=self.batch_size) for d in self.source.val_datasets().values()]
