"""Rows of T positions, read from a file of tokens where they are needed.

Letters: T input positions of a row, N tokens of a split, V vocabulary.
"""

from __future__ import annotations

import math
import os
import weakref
from bisect import bisect_right
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixerlab.data.module import IGNORE, DataError, Rows
from mixerlab.data.tokenizers import TextTokenizer


class TokenRows(Rows):
    """Row i holds the inputs tokens[i T : (i + 1) T] and, one position later, their labels.

    The token after a document's last is another document's first, and not to be predicted: positions of
    end-of-document tokens have no label. Every token but the first of each document is a label exactly once.
    The last row is padded; the padding is a segment of its own.
    """

    def __init__(self, path: Path, vocab_size: int, eod_id: int, seq_len: int, pack: bool) -> None:
        self.eod_id = eod_id
        self.seq_len = seq_len
        self.pack = pack
        self.tokens = NumberFile(path.with_suffix(".tokens"), token_dtype(vocab_size))
        self.ends = NumberFile(path.with_suffix(".ends"), np.int64)
        """(documents,) where each document ends, in tokens."""

    @property
    def n_tokens(self) -> int:
        """N, ends of documents included."""
        return len(self.tokens)

    def __len__(self) -> int:
        return math.ceil((self.n_tokens - 1) / self.seq_len)  # the last token, an end, predicts nothing

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        T, start = self.seq_len, i * self.seq_len
        window = self.tokens.read(start, T + 1).astype(np.int64)  # (T + 1,), less in the last row
        input_ids = np.full(T, self.eod_id)
        input_ids[: len(window)] = window[:T]
        labels = np.full(T, IGNORE)
        labels[: len(window) - 1] = window[1:]
        ends = self._ends_in(start) - start
        labels[ends - 1] = IGNORE
        row = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if self.pack:
            row["segment_ids"] = torch.from_numpy(np.searchsorted(ends, np.arange(T), side="right"))
        return row

    def _ends_in(self, start: int) -> NDArray[np.integer]:
        """The ends, within the stream, of the documents that end in the row that begins at token `start`."""
        first = bisect_right(range(len(self.ends)), start, key=lambda k: int(self.ends.read(k, 1)[0]))
        ends = self.ends.read(first, self.seq_len)  # more cannot be in one row
        return ends[: np.searchsorted(ends, start + self.seq_len, side="right")]


class NumberFile:
    """Numbers in a file, read by their place in it: a memory map of a file that gets shorter kills the process.

    The file stays open in each process that reads it, so that a cache that is made anew meanwhile goes on to be read.
    """

    def __init__(self, path: Path, dtype: type[np.integer]) -> None:
        self.path = path
        self.dtype = dtype
        self.length = path.stat().st_size // dtype().itemsize
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}  # another process opens the file again

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """Numbers [start, start + count), fewer at the end. Raises DataError where they are not there any more."""
        size = self.dtype().itemsize
        wanted = size * max(0, min(count, self.length - start))
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
            # Processes that were forked share the descriptor: a position of its own would be moved by the others.
            content = os.pread(self._descriptor, wanted, start * size)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {self.path} was there and cannot be read now: {error.strerror}"
            ) from error
        if len(content) < wanted:
            raise DataError(f"data.cache_dir: {self.path} is shorter than it was; the next run makes it anew")
        return np.frombuffer(content, self.dtype)


class Writer:
    """Appends documents to the two files of a split: tokens, and where each document ends."""

    def __init__(self, path: Path, tokenizer: TextTokenizer) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.eod_id = tokenizer.eod_id
        self.tokens: BinaryIO = path.with_suffix(".tokens").open("wb")
        self.ends: BinaryIO = path.with_suffix(".ends").open("wb")
        self.n_tokens = 0
        self.n_documents = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.tokens.close()  # writes what is left, for which there may be no room
        finally:
            self.ends.close()

    def append(self, ids: NDArray[np.integer], ends_document: bool) -> None:
        self.tokens.write(ids.astype(self.dtype).tobytes())
        self.n_tokens += len(ids)
        if ends_document:
            self.tokens.write(np.array([self.eod_id], dtype=self.dtype).tobytes())
            self.n_tokens += 1
            self.n_documents += 1
            self.ends.write(np.array([self.n_tokens], dtype=np.int64).tobytes())


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32
