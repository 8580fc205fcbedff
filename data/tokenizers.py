"""Text to token ids and back: plain bytes, a byte-level BPE trained on the corpus, or a `tokenizer.json`."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mixerlab.data.module import DataError
from mixerlab.options import first_line
from mixerlab.sealed import read_noted, write_noted

# Without this, the library warns when a process that has tokenised in parallel forks, as a DataLoader does.
# The workers do not tokenise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
"""What marks the end of a document in published tokenizers, in order of preference."""

CONFIG = "tokenizer_config.json"
"""Says which kind of tokenizer a folder holds. Written last: with it, the folder has all that loading needs."""


LONGEST_WORD = 256
"""Bytes of a word that BPE training takes as one: its work on a text is proportional to the length of its words."""

MOST_TOKENS = 1 << 22
"""Beyond all vocabularies."""


class TextTokenizer(ABC):
    """Token ids of text, and an end-of-document token that no text contains."""

    pieces: list[bytes]
    """By token id, the bytes it stands for; b"" for the end of a document and other special tokens."""

    eod_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Token ids of each text, on all cores. The end-of-document token is not added."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer(folder)` reads."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def token_bytes(self) -> Tensor:
        """(V,) int64, the bytes of text that each token stands for; 0 for the end of a document."""
        return torch.tensor([len(piece) for piece in self.pieces])

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8 become U+FFFD, special tokens vanish."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens, for streams: a token may end inside a character.

        Where text gets a space in front of it before it is tokenised (SentencePiece), so do these bytes.
        """
        return b"".join(self.pieces[i] for i in ids)


class ByteTokenizer(TextTokenizer):
    """One token per byte of UTF-8, and 256 for the end of a document."""

    def __init__(self) -> None:
        self.pieces = [bytes([byte]) for byte in range(256)] + [b""]
        self.eod_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def save(self, folder: Path) -> None:
        write_noted(folder / CONFIG, json.dumps({"type": "bytes"}) + "\n")


class JsonTokenizer(TextTokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, eod_token: str) -> None:
        # A file may ask for truncation or padding, but documents are whole; and text that spells out a
        # special token is text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer
        self.eod_token = eod_token
        self.pieces = _pieces(tokenizer)
        self.eod_id = tokenizer.get_vocab()[eod_token]
        self.pieces[self.eod_id] = b""
        self.encoder = _that_drops_nothing(tokenizer, eod_token)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """As of every tokenizer. Raises DataError where one without an unknown token has no token for a text."""
        try:
            encodings = self.encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"the tokenizer has no token for a part of the text, and none for the unknown: {first_line(error)}"
            ) from error
        found: list[NDArray[np.integer]] = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        if self.encoder is not self.tokenizer:
            for text, ids in zip(texts, found, strict=True):
                if (ids == self.eod_id).any():
                    raise DataError(
                        f"the tokenizer has no token for {self._unknown(text)!r}, and none for the unknown; expected "
                        "one whose tokens cover the text, such as of bytes"
                    )
        return found

    def _unknown(self, text: str) -> str:
        encoding = self.encoder.encode(text, add_special_tokens=False)
        start, end = encoding.offsets[encoding.ids.index(self.eod_id)]
        return text[start:end]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i != self.eod_id])

    def save(self, folder: Path) -> None:
        write_noted(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_noted(folder / CONFIG, json.dumps({"type": "json", "eod_token": self.eod_token}) + "\n")


def load_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer that `save` left in a folder, such as a run's; None if there is none.

    The folder may be a stranger's. Raises DataError where there is no tokenizer that can be used.
    """
    folder = Path(folder)
    try:
        config = json.loads(read_noted(folder / CONFIG))
        if config["type"] == "bytes":
            return ByteTokenizer()
        return JsonTokenizer(Tokenizer.from_str(read_noted(folder / "tokenizer.json")), config["eod_token"])
    except FileNotFoundError as error:
        if error.filename == str(folder / CONFIG):
            return None
        raise DataError(f"{error.filename}: no such file, but {CONFIG} beside it needs one") from None
    except (
        Exception
    ) as error:  # what is in the files may be anything, and the library raises nothing narrower
        reason = first_line(error)
        where = "" if str(folder) in reason else f"the tokenizer of {folder} cannot be used: "
        raise DataError(f"{where}{reason}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOD_TOKENS[0]],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return JsonTokenizer(tokenizer, EOD_TOKENS[0])


def read_tokenizer(path: Path, eod_token: str | None) -> JsonTokenizer:
    """The tokenizer in a `tokenizer.json`; DataError if it is none, or has no end-of-document token."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"data.tokenizer_file = {str(path)!r} is not a tokenizer.json of the tokenizers library: "
            f"{first_line(error)}"
        ) from error
    candidates = EOD_TOKENS if eod_token is None else (eod_token,)
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            try:
                return JsonTokenizer(tokenizer, token)
            except DataError as error:
                raise DataError(f"data.tokenizer_file = {str(path)!r}: {error}") from None
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise DataError(
        f"data.eod_token = {eod_token!r}: {path} has no {' or '.join(candidates)} to end documents with; "
        f"name one that it has ({', '.join(special[:10]) or 'it has no special tokens'})"
    )


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each token stands for, by id."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    last = max(vocab, key=vocab.__getitem__)
    if vocab[last] >= MOST_TOKENS:
        raise DataError(
            f"the token {last!r} has the id {vocab[last]}, beyond all vocabularies; of its {len(vocab)} tokens the ids "
            f"should go from 0 to {len(vocab) - 1}"
        )
    added = tokenizer.get_added_tokens_decoder()
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:
            pieces[i] = b"" if added[i].special else token.encode()
        elif '"ByteLevel"' in decoder:
            pieces[i] = bytes(BYTE_OF[c] for c in token) if BYTE_OF.keys() >= set(token) else token.encode()
        elif '"WordPiece"' in decoder:  # words are apart from each other, and ## glues
            pieces[i] = token[2:].encode() if token.startswith("##") else b" " + token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces[i] = bytes.fromhex(token[3:5])
        else:  # SentencePiece
            pieces[i] = token.replace("▁", " ").encode()
    return pieces


def _that_drops_nothing(tokenizer: Tokenizer, eod_token: str) -> Tokenizer:
    """The tokenizer, or, if it would leave out what it has no token for, a copy that says eod_token there."""
    model = tokenizer.model
    leaves_out = isinstance(model, models.BPE) and model.unk_token is None
    if not leaves_out or BYTE_OF.keys() <= tokenizer.get_vocab(with_added_tokens=False).keys():
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    copy.model.unk_token = eod_token
    return copy


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()
"""Of a byte-level BPE: the byte that each letter of its tokens stands for."""
