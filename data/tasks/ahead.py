"""Rows of tasks made ahead: files in a cache, read instead of making the rows when they are asked for.

Letters: n samples, N rows of a dataset, T positions of a row.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from mixerlab.data.cache import ensure_folder
from mixerlab.data.digests import digest
from mixerlab.data.module import DataModule
from mixerlab.data.tasks import draws

if TYPE_CHECKING:
    from mixerlab.data.tasks.task import TaskRows

FILES = ("input_ids.npy", "labels.npy")


def cache_folder(cache_dir: str, maker: type, settings: Any) -> Path:
    """Where rows are kept that `maker`, a class of tasks, makes with these settings and the code that it has now."""
    makers: list[Any] = [of for of in maker.__mro__ if issubclass(of, DataModule)]
    code = [Path(inspect.getfile(of)).read_text(encoding="utf-8") for of in (*makers, draws)]
    return Path(cache_dir).expanduser() / "tasks" / digest([json.dumps(settings, sort_keys=True), *code])


class Stored:
    """Reads rows from files, in place of a task's `make`. Each process opens them itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.folder,)

    @cached_property
    def _arrays(self) -> list[NDArray]:
        return [np.load(self.folder / name, mmap_mode="r") for name in FILES]

    def __call__(self, _: draws.Draws, index: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """input_ids and labels of the rows `index` (n,), (n, T) each."""
        input_ids, labels = self._arrays
        return input_ids[index], labels[index]


def make_ahead(folder: Path, rows: TaskRows, vocab_size: int, report: Callable[[str], None]) -> None:
    """Makes the rows' input_ids and labels, (N, T) each, into files of `folder`, unless they lie there undamaged.

    Raises DataError.
    """
    dtype = np.int16 if vocab_size <= np.iinfo(np.int16).max else np.int32
    doing = f"making the rows of {rows.split}"

    def fill(empty: Path) -> None:
        shape = (len(rows), rows.seq_len)
        arrays = [np.lib.format.open_memmap(empty / name, "w+", dtype, shape) for name in FILES]
        for first in track(range(0, len(rows), rows.block_size), doing, console=Console(stderr=True)):
            report(doing)
            last = min(first + rows.block_size, len(rows))
            for array, made in zip(arrays, rows.batch(range(first, last)), strict=True):
                array[first:last] = made.numpy()
        for array in arrays:
            array.flush()

    ensure_folder(folder, fill, report)
