"""The contract between training and the data it reads.

Letters: T input positions of a row, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mixerlab.options import UserError

if TYPE_CHECKING:
    from mixerlab.data.tokenizers import TextTokenizer

IGNORE = -100
"""The label of a position that carries no loss."""


class DataError(UserError):
    """Data that cannot be used. The message is for the user: the key, its value and what would be right."""


class Rows(Dataset[dict[str, Tensor]]):
    """A map-style dataset whose samples are rows of tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Row `index`: input_ids, labels and perhaps segment_ids, (T,) each. IndexError unless 0 <= index < len."""


class DataModule(ABC):
    """Datasets for training and validation, and what a decoder must know about them.

    Sample i of a split is a pure function of (seed, split, i); which samples make a batch, and in which
    order, is decided by the training side. A sample is a dict of int64 tensors:

        input_ids    (T,)
        labels       (T,)  what position t must predict, already shifted; -100 where there is no loss
        segment_ids  (T,)  only where a row packs several documents: non-decreasing from 0

    T is `seq_len`. Validation datasets beside the main one may have another, the same for all rows of one.

    `prepare` runs in one process of each machine, then `setup` in every process, and then the datasets are asked
    for. A signal that asks the run to end raises in `prepare`, anywhere, as Ctrl-C does: nothing half written may be
    taken for whole afterwards.

    A module that gives segment_ids has an option `pack`: a recipe whose mixers cannot keep documents apart is refused
    before there are data.
    """

    seq_len: int
    """T, the input positions of a row."""

    tokenizer: TextTokenizer | None = None
    """Text to token ids and back; None where tokens are not text, and before `setup` if it is trained."""

    token_bytes: Tensor | None = None
    """(V,) int64, the bytes of text each token stands for, 0 for the end of a document; None without text."""

    report: Callable[[str], None] = staticmethod(lambda doing: None)
    """For `prepare` to call, every few seconds of its work, with what it does ("tokenising"): a process that is silent
    for longer than strategy.timeout is taken to hang. Training sets it."""

    prepared: str = ""
    """The fingerprint that `prepare` found in the run's first process; training sets it in the others. With it, they
    may find what was prepared without looking at the documents. "" if it is not known."""

    config: Any
    seed: int

    def __init__(self, config: Any, seed: int) -> None:
        self.config = config
        self.seed = seed

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V. Needs no data before `setup` (a dry run may ask); exact after it."""

    @property
    def fingerprint(self) -> str:
        """Changes when the rows do: a resumed run compares it. Known after `prepare` or `setup`; "" where rows cannot
        change."""
        return ""

    def prepare(self) -> None:  # noqa: B027  (many modules need none)
        """Downloads, trains the tokenizer and fills the cache, and does nothing twice. Raises DataError."""

    def setup(self) -> None:  # noqa: B027
        """Opens, in any process, what `prepare` wrote."""

    @abstractmethod
    def train_dataset(self) -> Rows:
        """The map-style dataset to train on."""

    @abstractmethod
    def val_datasets(self) -> dict[str, Rows]:
        """Map-style datasets to validate on, by name: first the main one, "valid". Metrics are named after them."""

    def save_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer, if there is one, so that `load_tokenizer(folder)` needs nothing else."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
