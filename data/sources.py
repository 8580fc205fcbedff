"""Where documents come from: Python's standard library, files, or a Hugging Face dataset."""

from __future__ import annotations

import json
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, NamedTuple

from mixerlab.data.background import in_background
from mixerlab.data.digests import Digests
from mixerlab.data.module import DataError
from mixerlab.options import first_line

TEXT_SUFFIXES = (".txt", ".md", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")


class Document(NamedTuple):
    text: str
    key: str
    """Decides, by its hash, which split the document is in."""
    weight: float
    """Its part of the source's `total`."""


class Source(ABC):
    """Documents in a fixed order."""

    @property
    @abstractmethod
    def total(self) -> float:
        """How much there is to read, in the unit of `Document.weight`: bytes of files, or documents."""

    @abstractmethod
    def fingerprint(self, digests: Digests) -> str:
        """Changes whenever the documents do."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, read as they are asked for."""


class StdlibSource(Source):
    """The modules of the running interpreter's standard library, without its tests."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        names = (path.relative_to(self.root) for path in self.root.rglob("*.py"))
        self.names = sorted(name.as_posix() for name in names if not skipped.intersection(name.parts))

    @property
    def total(self) -> float:
        return sum((self.root / name).stat().st_size for name in self.names)

    def fingerprint(self, digests: Digests) -> str:
        return digests.of(self.names, [str(self.root / name) for name in self.names])

    def documents(self) -> Iterator[Document]:
        seen = set()  # a few files are copies, which could fall into different splits
        for name in self.names:
            encoded = (self.root / name).read_bytes()
            try:
                text = encoded.decode()
            except UnicodeDecodeError:
                continue
            if text not in seen:
                yield Document(text, name, len(encoded))
            seen.add(text)


class FilesSource(Source):
    """Files: each text file is a document, as is each row of a JSON Lines or Parquet file."""

    def __init__(self, files: Sequence[str], column: str | None) -> None:
        self.files = files
        self.column = column

    @property
    def total(self) -> float:
        return sum(os.path.getsize(name) for name in self.files)

    def fingerprint(self, digests: Digests) -> str:
        return digests.of([str(self.column), *map(suffix, self.files)], self.files)

    def documents(self) -> Iterator[Document]:
        for name in self.files:
            try:
                for text, weight in _READERS[suffix(name)](Path(name), self.column):
                    yield Document(text or "", text or "", weight)
            except OSError as error:
                raise DataError(f"data.files: {name} cannot be read: {error.strerror or error}") from error


class HubSource(Source):
    """One column of one split of a Hugging Face dataset."""

    def __init__(
        self, name: str, config: str | None, split: str, column: str, num_proc: int, limit: int | None
    ):
        self.name, self.config, self.split, self.column = name, config, split, column
        self.num_proc = num_proc
        self.limit = limit

    @cached_property
    def dataset(self) -> Any:
        import datasets  # takes seconds to import, and most runs do not need it
        import huggingface_hub.utils

        for library in (datasets, huggingface_hub.utils):
            library.disable_progress_bars()
            library.logging.set_verbosity_error()
        try:
            dataset = datasets.load_dataset(
                self.name,
                self.config,
                split=self.split,
                num_proc=self.num_proc if self.num_proc > 1 else None,
            )
        except Exception as error:  # network, hub, builder and split errors have no common base
            which = f"{self.name!r} (dataset_config {self.config!r}, split {self.split!r})"
            raise DataError(
                f"data.dataset = {which} cannot be loaded: {type(error).__name__}: {str(error).strip()}\n"
                "Check the names. Without a network only datasets that were loaded before are there; "
                "data.source=files reads local files, data.source=python_stdlib needs none."
            ) from error
        if self.column not in dataset.column_names:
            raise DataError(
                f"data.column = {self.column!r}: dataset {self.name} has no such column; "
                f"it has {', '.join(dataset.column_names)}"
            )
        if self.limit is not None:
            dataset = dataset.select(range(min(self.limit, len(dataset))))
        return dataset.select_columns([self.column])

    @property
    def total(self) -> float:
        return len(self.dataset)

    def fingerprint(self, digests: Digests) -> str:
        dataset = in_background(
            lambda _: self.dataset, lambda: digests.report(f"loading the dataset {self.name}")
        )
        return dataset._fingerprint  # of the files and everything done to them since

    def documents(self) -> Iterator[Document]:
        try:
            for batch in self.dataset.iter(batch_size=1000):
                for text in batch[self.column]:
                    text = _checked(text, self.column, self.name) or ""
                    yield Document(text, text, 1)
        except UnicodeDecodeError as error:
            raise DataError(
                f"data.column = {self.column!r}: {self.name} holds what is not UTF-8: {error}"
            ) from error


def _read_text(path: Path, column: str | None) -> Iterator[tuple[str, float]]:
    encoded = path.read_bytes()
    try:
        yield encoded.decode(), len(encoded)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.files: {path} is not UTF-8 text: byte {encoded[error.start]:#04x} at offset {error.start}"
        ) from error


def _read_jsonl(path: Path, column: str | None) -> Iterator[tuple[str | None, float]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"data.files: {where} is not JSON: {error}") from error
            except RecursionError as error:
                raise DataError(
                    f"data.files: {where} nests too many objects; expected one with a key per column"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"data.files: {where} is {type(row).__name__}, not an object with a key per column"
                )
            if column not in row:
                raise DataError(f"data.column = {column!r}: {where} has no such key; it has {', '.join(row)}")
            yield _checked(row[column], column, where), len(line)


def _read_parquet(path: Path, column: str | None) -> Iterator[tuple[str | None, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"data.column = {column!r}: {path} has no such column; it has {names}")
            weight = path.stat().st_size / max(file.metadata.num_rows, 1)
            row = 0
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                where = f"{path}, rows {row + 1} to {row + len(batch)}"
                for text in _values(batch[column], where):
                    yield _checked(text, column, where), weight
                row += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data.files: {path} is not a readable Parquet file: {first_line(error)}") from error


def _values(column: Any, where: str) -> list[Any]:
    """Of a column of an Arrow table."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"data.files: {where}: the column holds what is not UTF-8 text: {error}") from error


def _checked(text: Any, column: str | None, where: str) -> str | None:
    if text is None:
        return None
    try:
        text.encode()  # JSON can also hold half of a surrogate pair
    except (AttributeError, UnicodeEncodeError) as error:
        raise DataError(f"data.column = {column!r}: {where} holds {shortened(text)}, not text") from error
    return text


_READERS: dict[str, Callable[[Path, str | None], Iterator[tuple[str | None, float]]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _read_text),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def suffix(name: str) -> str:
    return os.path.splitext(name)[1]
