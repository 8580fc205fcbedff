"""Language modelling on text: documents, tokenised once into a cache, read as rows of T positions.

Letters: T input positions of a row, N tokens of a split, V vocabulary.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from mixerlab.data.cache import ensure_folder
from mixerlab.data.module import IGNORE, DataError, DataModule, Rows
from mixerlab.data.registry import register_data
from mixerlab.data.sources import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    FilesSource,
    HubSource,
    Source,
    StdlibSource,
)
from mixerlab.data.tokenizers import ByteTokenizer, TextTokenizer, load_tokenizer, read_tokenizer, train_bpe
from mixerlab.options import option
from mixerlab.sealed import damage

FORMAT = 1
"""Of the cache: raise it when the same settings and documents would give other files."""

BATCH = 1 << 22
"""Characters that are tokenised at a time."""

PIECE = 1 << 16
"""Characters after which a document is cut, so that one huge file uses all cores and little memory."""


@dataclass
class TextConfig:
    """Text as a stream of tokens."""

    source: Literal["python_stdlib", "files", "hf"] = option(
        "python_stdlib",
        "where documents come from: python_stdlib (the interpreter's own modules, no download), "
        "files (data.files), or hf (data.dataset from the Hugging Face hub)",
    )
    files: list[str] = option(
        [],
        "paths or globs; each .txt, .md or .py file is a document, as is each row of a .jsonl or .parquet file",
    )
    valid_files: list[str] = option(
        [], "paths or globs of the validation documents; empty: a valid_fraction of files"
    )
    dataset: str | None = option(None, "the Hugging Face dataset, as owner/name")
    dataset_config: str | None = option(None, "the configuration of the dataset; null: its default")
    split: str = option("train", "the split of the dataset to train on")
    valid_split: str | None = option(
        None, "the split of the dataset to validate on; null: a valid_fraction of split"
    )
    column: str | None = option(None, "the column that holds the text, in .jsonl, .parquet and hf datasets")
    max_documents: int | None = option(
        None, "use only so many documents, the first of the source; null: all", min=1
    )
    valid_fraction: float = option(
        0.05,
        "the part of the documents, chosen by hash, that is validated on where there are no "
        "validation documents; of a single document, its end",
        above=0,
        below=1,
    )
    tokenizer: Literal["bytes", "bpe", "file"] = option(
        "bpe",
        "bytes (UTF-8 bytes), bpe (byte-level BPE trained on the training documents), "
        "or file (data.tokenizer_file)",
    )
    vocab_size: int = option(
        4096, "tokens of the trained BPE: 256 bytes, the end of a document, and merges", min=1
    )
    bpe_documents: int | None = option(
        100_000, "train the BPE on so many documents, the first ones; null: on all", min=1
    )
    tokenizer_file: str | None = option(None, "a tokenizer.json of the tokenizers library")
    eod_token: str | None = option(
        None,
        "the token of tokenizer_file that ends a document; null: the first it has of "
        "<|endoftext|>, </s>, <eos>, [SEP]",
    )
    seq_len: int = option(1024, "T, the input positions of a row", min=1)
    pack: bool = option(
        True,
        "mark the documents that share a row as segments, so that nothing flows between them; "
        "false: they see each other",
    )
    cache_dir: str = option("~/.cache/mixerlab", "the folder that holds tokenised text")
    num_proc: int = option(1, "processes that download and convert a Hugging Face dataset", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(option, what would be right) where something does not fit. No file is opened."""
        for name, source in {"files": "files", "valid_files": "files", "dataset": "hf"}.items():
            if getattr(self, name) and self.source != source:
                yield name, f"only read with source = {source}, but source = {self.source}"
        if self.tokenizer_file is not None and self.tokenizer != "file":
            yield "tokenizer_file", f"only read with tokenizer = file, but tokenizer = {self.tokenizer}"
        has_columns = self.source == "hf"
        if self.source == "files":
            if not self.files:
                yield "files", "source = files needs at least one path or glob"
            for name in ("files", "valid_files"):
                for pattern in getattr(self, name):
                    yield from ((name, problem) for problem in _pattern_problems(pattern))
                has_columns = has_columns or any(
                    p.suffix in TABLE_SUFFIXES for p in expand(getattr(self, name))
                )
        if self.source == "hf" and self.dataset is None:
            yield "dataset", "source = hf needs the name of a dataset"
        if has_columns and self.column is None:
            yield "column", "the name of the column that holds the text is needed"
        if self.tokenizer == "bpe" and self.vocab_size <= 257:
            yield (
                "vocab_size",
                "more than 257 is needed: 256 bytes, the end of a document, and at least one merge",
            )
        if self.tokenizer == "file":
            if self.tokenizer_file is None:
                yield "tokenizer_file", "tokenizer = file needs the path of a tokenizer.json"
            elif not Path(self.tokenizer_file).expanduser().is_file():
                yield "tokenizer_file", _missing(Path(self.tokenizer_file).expanduser())


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (** included) name: in their order, sorted within a glob, each once."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files.update(dict.fromkeys(match for match in matches if match.is_file()))
    return list(files)


def _pattern_problems(pattern: str) -> Iterator[str]:
    path = Path(pattern).expanduser()
    suffixes = ", ".join(TEXT_SUFFIXES + TABLE_SUFFIXES)
    if path.is_dir():
        yield f"{pattern} is a folder; for the files in it: {path / '**' / '*.txt'}"
    elif not path.exists() and not glob.has_magic(pattern):
        yield _missing(path)
    elif not (files := expand([pattern])):
        yield f"{pattern} matches no file"
    elif others := [file for file in files if file.suffix not in TEXT_SUFFIXES + TABLE_SUFFIXES]:
        yield f"{others[0]} is not one of {suffixes}"


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"{path} does not exist" + (f"; did you mean {path.parent / near[0]}?" if near else "")


@register_data("text", TextConfig)
class TextData(DataModule):
    """Rows of T positions cut from the token stream of all documents in order, each ended by a token."""

    config: TextConfig

    def __init__(self, config: TextConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.seq_len = config.seq_len
        self._folder: Path | None = None
        if config.tokenizer == "bytes":
            self._use(ByteTokenizer())

    @property
    def vocab_size(self) -> int:
        if self.tokenizer is None and self.config.tokenizer == "file":
            self._use(self._tokenizer_from_file())
        return self.config.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size

    def prepare(self) -> None:
        with Console(stderr=True).status("looking for the documents"):
            self._folder = self._cache_folder()
        ensure_folder(self._folder, self._fill)
        self.setup()

    def setup(self) -> None:
        folder = self._folder or self._cache_folder()
        if problem := damage(folder, checksums=False):
            raise RuntimeError(f"{folder}: {problem}; prepare() must run first, in one process")
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        self._folder = folder
        self._use(tokenizer)

    @property
    def fingerprint(self) -> str:
        if self._folder is None:
            raise RuntimeError("prepare() must run before the fingerprint is asked for")
        return self._folder.name

    def train_dataset(self) -> TokenRows:
        return self._rows("train")

    def val_datasets(self) -> dict[str, Rows]:
        return {"valid": self._rows("valid")}

    def _rows(self, split: str) -> TokenRows:
        if self._folder is None or self.tokenizer is None:
            raise RuntimeError("setup() must run before the datasets are asked for")
        rows = TokenRows(
            self._folder / split,
            self.tokenizer.vocab_size,
            self.tokenizer.eod_id,
            self.seq_len,
            self.config.pack,
        )
        if split == "train" and rows.n_tokens <= self.seq_len:
            raise DataError(
                f"data.seq_len = {self.seq_len}: the training documents have {rows.n_tokens} tokens, fewer "
                f"than the {self.seq_len + 1} of one row; more documents or a smaller seq_len are needed"
            )
        return rows

    def _use(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.token_bytes = tokenizer.token_bytes

    def _tokenizer_from_file(self) -> TextTokenizer:
        assert self.config.tokenizer_file is not None
        return read_tokenizer(Path(self.config.tokenizer_file).expanduser(), self.config.eod_token)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """By split. Without a source of its own, "valid" is a part of "train"."""
        config = self.config
        if config.source == "python_stdlib":
            return {"train": StdlibSource()}
        if config.source == "files":
            patterns = {"train": config.files, "valid": config.valid_files}
            return {s: FilesSource(expand(p), config.column) for s, p in patterns.items() if p}
        splits = {"train": config.split, "valid": config.valid_split}
        assert config.dataset is not None
        assert config.column is not None
        return {
            s: HubSource(
                config.dataset,
                config.dataset_config,
                name,
                config.column,
                config.num_proc,
                config.max_documents,
            )
            for s, name in splits.items()
            if name
        }

    def _cache_folder(self) -> Path:
        """Named after the documents and every setting that decides what is in it."""
        config, sources = self.config, self._sources
        settings: dict[str, Any] = {
            "format": FORMAT,
            "documents": {split: source.fingerprint() for split, source in sources.items()},
            "max_documents": config.max_documents,
            "tokenizer": config.tokenizer,
        }
        if "valid" not in sources:
            settings["valid_fraction"] = config.valid_fraction
        if config.tokenizer == "bpe":
            settings["vocab_size"] = config.vocab_size
            settings["bpe_documents"] = config.bpe_documents
        if config.tokenizer == "file":
            assert config.tokenizer_file is not None
            settings["tokenizer_file"] = _hash(Path(config.tokenizer_file).expanduser().read_bytes())
            settings["eod_token"] = config.eod_token
        key = _hash(json.dumps(settings, sort_keys=True).encode())
        return Path(config.cache_dir).expanduser() / "text" / key

    def _fill(self, folder: Path) -> None:
        """Tokenises all documents into an empty folder."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f}% {task.fields[counts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            tokenizer = self._new_tokenizer(progress)
            tokenizer.save(folder)
            with _Writer(folder / "train", tokenizer) as train, _Writer(folder / "valid", tokenizer) as valid:
                self._tokenise(tokenizer, {"train": train, "valid": valid}, progress)
        if train.n_documents == 0:
            raise DataError(f"data.source = {self.config.source!r}: it has no document with text to train on")
        if valid.n_documents == 0:
            raise DataError(
                f"data.valid_fraction = {self.config.valid_fraction}: no document of {train.n_documents} came "
                "out to validate on; name some in data.valid_files or data.valid_split, or raise the fraction"
            )

    def _new_tokenizer(self, progress: Progress) -> TextTokenizer:
        if self.config.tokenizer == "bytes":
            return ByteTokenizer()
        if self.config.tokenizer == "file":
            return self._tokenizer_from_file()
        task = progress.add_task("training the tokenizer", counts="")
        training = (document for split, document in self._documents(progress, task) if split == "train")
        some = islice(training, self.config.bpe_documents)
        tokenizer = train_bpe(
            (piece for document in some for piece in _cut(document.text)), self.config.vocab_size
        )
        progress.update(task, completed=progress.tasks[task].total)
        return tokenizer

    def _tokenise(self, tokenizer: TextTokenizer, writers: dict[str, _Writer], progress: Progress) -> None:
        task = progress.add_task("tokenising", counts="")
        batch: list[tuple[_Writer, str, bool]] = []  # pieces of documents, and whether they end one

        def write() -> None:
            encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            for (writer, _, ends_document), ids in zip(batch, encoded, strict=True):
                writer.append(ids, ends_document)
            n_documents = sum(writer.n_documents for writer in writers.values())
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            progress.update(task, counts=f"{n_documents:,} documents, {n_tokens:,} tokens")
            batch.clear()

        n_characters = 0
        for split, document in self._documents(progress, task):
            pieces = _cut(document.text)
            for n, piece in enumerate(pieces, 1):
                batch.append((writers[split], piece, n == len(pieces)))
                n_characters += len(piece)
                if n_characters > BATCH:
                    write()
                    n_characters = 0
        write()

    def _documents(self, progress: Progress, task: TaskID) -> Iterator[tuple[str, Document]]:
        """All documents with their split; moves the progress bar."""
        sources = self._sources
        total = sum(source.total for source in sources.values())
        progress.update(task, total=total)
        parts = {
            split: islice(source.documents(), self.config.max_documents) for split, source in sources.items()
        }
        documents: Iterator[tuple[str, Document]]
        if "valid" in parts:
            documents = chain(zip(repeat("train"), parts["train"]), zip(repeat("valid"), parts["valid"]))
        else:
            documents = self._divided(parts["train"])
        for split, document in documents:
            if document.text:
                yield split, document
            progress.advance(task, document.weight)
        progress.update(task, completed=total)

    def _divided(self, documents: Iterator[Document]) -> Iterator[tuple[str, Document]]:
        """Gives a part of the documents to validation; of a single one, its end."""
        fraction = self.config.valid_fraction
        first_two = list(islice(documents, 2))
        if len(first_two) == 1:
            text, key, weight = first_two[0]
            cut = int(len(text) * (1 - fraction))
            cut = text.find("\n", cut, -1) + 1 or cut
            yield "train", Document(text[:cut], key, weight)
            yield "valid", Document(text[cut:], key, 0)
            return
        for document in chain(first_two, documents):
            u = int.from_bytes(hashlib.blake2b(document.key.encode(), digest_size=8).digest()) / 2**64
            yield ("valid" if u < fraction else "train"), document


class TokenRows(Rows):
    """Row i holds the inputs tokens[i T : (i + 1) T] and, one position later, their labels.

    The token after a document's last is another document's first, and not to be predicted: positions of
    end-of-document tokens have no label. Every token but the first of each document is a label exactly once.
    The last row is padded; the padding is a segment of its own.
    """

    def __init__(self, path: Path, vocab_size: int, eod_id: int, seq_len: int, pack: bool) -> None:
        self.path = path
        self.dtype = _token_dtype(vocab_size)
        self.eod_id = eod_id
        self.seq_len = seq_len
        self.pack = pack
        self.n_tokens = self._file("tokens").stat().st_size // self.dtype().itemsize
        """N, ends of documents included."""
        self.ends = np.fromfile(self._file("ends"), dtype=np.int64)  # (documents,)

    def _file(self, suffix: str) -> Path:
        return self.path.with_suffix(f".{suffix}")

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count), fewer at the end. Not by a memory map: a lost file would kill the process."""
        count = min(count, self.n_tokens - start)
        file = self._file("tokens")
        try:
            tokens = np.fromfile(file, self.dtype, count, offset=start * self.dtype().itemsize)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {file} was there and cannot be read now: {error.strerror}"
            ) from error
        if len(tokens) < count:
            raise DataError(f"data.cache_dir: {file} is shorter than it was; the next run makes it anew")
        return tokens

    def __len__(self) -> int:
        return math.ceil((self.n_tokens - 1) / self.seq_len)  # the last token, an end, predicts nothing

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        T, start = self.seq_len, i * self.seq_len
        window = self.read(start, T + 1).astype(np.int64)  # (T + 1,), less in the last row
        input_ids = np.full(T, self.eod_id)
        input_ids[: len(window)] = window[:T]
        labels = np.full(T, IGNORE)
        labels[: len(window) - 1] = window[1:]
        first, last = np.searchsorted(self.ends, [start, start + T], side="right")
        ends = self.ends[first:last] - start  # of the documents that end in this row
        labels[ends - 1] = IGNORE
        row = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if self.pack:
            row["segment_ids"] = torch.from_numpy(np.searchsorted(ends, np.arange(T), side="right"))
        return row


class _Writer:
    """Appends documents to the two files of a split: tokens, and where each document ends."""

    def __init__(self, path: Path, tokenizer: TextTokenizer) -> None:
        self.dtype = _token_dtype(tokenizer.vocab_size)
        self.eod_id = tokenizer.eod_id
        self.tokens: BinaryIO = path.with_suffix(".tokens").open("wb")
        self.ends: BinaryIO = path.with_suffix(".ends").open("wb")
        self.n_tokens = 0
        self.n_documents = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tokens.close()
        self.ends.close()

    def append(self, ids: NDArray[np.integer], ends_document: bool) -> None:
        self.tokens.write(ids.astype(self.dtype).tobytes())
        self.n_tokens += len(ids)
        if ends_document:
            self.tokens.write(np.array([self.eod_id], dtype=self.dtype).tobytes())
            self.n_tokens += 1
            self.n_documents += 1
            self.ends.write(np.array([self.n_tokens], dtype=np.int64).tobytes())


_SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")


def _cut(text: str) -> list[str]:
    """Cuts a long text before single spaces, where usual tokenizers begin a new token anyway."""
    pieces, start = [], 0
    while match := _SINGLE_SPACE.search(text, start + PIECE):
        pieces.append(text[start : match.start()])
        start = match.start()
    return [*pieces, text[start:]]


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
