"""Language modelling on text: documents, tokenised once into a cache, read as rows of T positions.

Letters: T input positions of a row, N tokens of a split, V vocabulary.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat, takewhile
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mixerlab.data.background import in_background
from mixerlab.data.cache import ensure_folder
from mixerlab.data.digests import Digests
from mixerlab.data.module import DataError, DataModule, Rows
from mixerlab.data.pieces import cut, worth_learning
from mixerlab.data.registry import register_data
from mixerlab.data.rows import TokenRows, Writer
from mixerlab.data.sources import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Document,
    FilesSource,
    HubSource,
    Source,
    StdlibSource,
    suffix,
)
from mixerlab.data.tokenizers import ByteTokenizer, TextTokenizer, load_tokenizer, read_tokenizer, train_bpe
from mixerlab.options import option
from mixerlab.sealed import damage

FORMAT = 1
"""Of the cache: raise it when the same settings and documents would give other files. Runs begun before it
cannot be resumed then."""

BATCH = 1 << 22
"""Characters that are tokenised at a time."""


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
    verify_cache: bool = option(
        False,
        "compare the checksums of the whole cache at the start; false: only where sizes or times of its files "
        "are not those of the last time",
    )
    num_proc: int = option(1, "processes that download and convert a Hugging Face dataset", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(option, what would be right) where something does not fit. No file is opened."""
        for name in ("files", "valid_files", "tokenizer_file", "cache_dir"):
            paths = getattr(self, name)
            for path in paths if isinstance(paths, list) else filter(None, [paths]):
                if problem := _path_problem(path):
                    yield name, f"{problem}; the name of a file or folder that can be there is needed"
                    return
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
                    has_columns = has_columns or not set(TABLE_SUFFIXES).isdisjoint(_examples(pattern))
        if self.source == "hf" and self.dataset is None:
            yield "dataset", "source = hf needs the name of a dataset"
        if self.dataset == "pandas":
            yield "dataset", "the library's own reader of that name unpickles files; expected owner/name"
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


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths and globs (** included) name: in their order, sorted within a glob, each once."""
    files: dict[str, None] = {}
    for pattern in patterns:
        path = str(Path(pattern).expanduser())
        # Sorted as paths are, part by part; of very many files, objects for them would take seconds.
        found = [path] if os.path.exists(path) else glob.iglob(path, recursive=True)
        matches = sorted(found, key=lambda name: name.replace(os.sep, "\0"))
        files.update(dict.fromkeys(name for name in matches if os.path.isfile(name)))
    return list(files)


def _examples(pattern: str) -> dict[str, str]:
    """A file of each suffix among those that a path or glob names."""
    path, found = str(Path(pattern).expanduser()), {}
    for name in [path] if os.path.exists(path) else glob.iglob(path, recursive=True):
        if suffix(name) not in found and os.path.isfile(name):
            found[suffix(name)] = name
            if suffix(path) in TEXT_SUFFIXES + TABLE_SUFFIXES:
                break  # the others have the same
    return found


def _pattern_problems(pattern: str) -> Iterator[str]:
    path = Path(pattern).expanduser()
    suffixes = TEXT_SUFFIXES + TABLE_SUFFIXES
    if path.is_dir():
        yield f"{pattern} is a folder; for the files in it: {path / '**' / '*.txt'}"
    elif not path.exists() and not glob.has_magic(pattern):
        yield _missing(path)
    elif not (examples := _examples(pattern)):
        yield f"{pattern} matches no file"
    elif others := sorted(examples.keys() - set(suffixes)):
        yield f"{examples[others[0]]} is not one of {', '.join(suffixes)}"


def _path_problem(path: str) -> str | None:
    """Why nothing can have that name."""
    try:
        Path(path).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # of a name too long, of a NUL in it, of an unknown ~user
        return f"{path!r} names nothing: {getattr(error, 'strerror', None) or error}"
    return None


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
        folder = self._agreed_folder()
        if folder is None or damage(folder, checksums=False):
            with Console(stderr=True).status("looking for the documents"):
                folder = self._cache_folder()
        self._folder = folder
        ensure_folder(self._folder, self._fill, self.report, self.config.verify_cache)
        self.setup()

    def setup(self) -> None:
        folder = self._folder or self._agreed_folder() or self._cache_folder()
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

    @property
    def _caches(self) -> Path:
        return Path(self.config.cache_dir).expanduser() / "text"

    def _agreed_folder(self) -> Path | None:
        """That of the run's first process, where it is known."""
        return self._caches / self.prepared if self.prepared else None

    def _cache_folder(self) -> Path:
        """Named after the documents and every setting that decides what is in it."""
        config, sources = self.config, self._sources
        digests = Digests(self._caches / "digests.json", self.report)
        settings: dict[str, Any] = {
            "format": FORMAT,
            "documents": {split: source.fingerprint(digests) for split, source in sources.items()},
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
        return self._caches / _hash(json.dumps(settings, sort_keys=True).encode())

    def _fill(self, folder: Path) -> None:
        """Tokenises all documents into an empty folder."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f}% {task.fields[counts]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            tokenizer = self._new_tokenizer(folder, progress)
            tokenizer.save(folder)
            with Writer(folder / "train", tokenizer) as train, Writer(folder / "valid", tokenizer) as valid:
                self._tokenise(tokenizer, {"train": train, "valid": valid}, progress)
        if train.n_documents == 0:
            raise DataError(f"data.source = {self.config.source!r}: it has no document with text to train on")
        if valid.n_documents == 0:
            raise DataError(
                f"data.valid_fraction = {self.config.valid_fraction}: no document of {train.n_documents} came "
                "out to validate on; name some in data.valid_files or data.valid_split, or raise the fraction"
            )

    def _new_tokenizer(self, folder: Path, progress: Progress) -> TextTokenizer:
        if self.config.tokenizer == "bytes":
            return ByteTokenizer()
        if self.config.tokenizer == "file":
            return self._tokenizer_from_file()
        task = progress.add_task("training the tokenizer", counts="")
        training = (document for split, document in self._documents(progress, task) if split == "train")
        some = islice(training, self.config.bpe_documents)
        pieces = worth_learning(piece for document in some for piece in cut(document.text))

        def tell() -> None:
            self.report("training the tokenizer")
            os.utime(folder)  # for processes that wait for the cache

        tokenizer = in_background(
            lambda nobody_waits: train_bpe(
                takewhile(lambda _: not nobody_waits.is_set(), pieces), self.config.vocab_size
            ),
            tell,
        )
        progress.update(task, completed=progress.tasks[task].total)
        return tokenizer

    def _tokenise(self, tokenizer: TextTokenizer, writers: dict[str, Writer], progress: Progress) -> None:
        task = progress.add_task("tokenising", counts="")
        batch: list[tuple[Writer, str, bool]] = []  # pieces of documents, and whether they end one

        def write() -> None:
            self.report("tokenising")
            try:
                encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            except DataError as error:
                raise DataError(f"data.tokenizer_file = {self.config.tokenizer_file!r}: {error}") from error
            for (writer, _, ends_document), ids in zip(batch, encoded, strict=True):
                writer.append(ids, ends_document)
            n_documents = sum(writer.n_documents for writer in writers.values())
            n_tokens = sum(writer.n_tokens for writer in writers.values())
            progress.update(task, counts=f"{n_documents:,} documents, {n_tokens:,} tokens")
            batch.clear()

        n_characters = 0
        for split, document in self._documents(progress, task):
            pieces = cut(document.text)
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
            end = int(len(text) * (1 - fraction))
            end = text.find("\n", end, -1) + 1 or end
            yield "train", Document(text[:end], key, weight)
            yield "valid", Document(text[end:], key, 0)
            return
        for document in chain(first_two, documents):
            u = int.from_bytes(hashlib.blake2b(document.key.encode(), digest_size=8).digest()) / 2**64
            yield ("valid" if u < fraction else "train"), document


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
