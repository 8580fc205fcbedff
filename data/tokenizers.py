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
from mixerlab.sealed import write_file

# Without this, the library warns when a process that has tokenised in parallel forks, as a DataLoader does.
# The workers do not tokenise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")
"""What marks the end of a document in published tokenizers, in order of preference."""

CONFIG = "tokenizer_config.json"
"""Says which kind of tokenizer a folder holds. Written last: with it, the folder has all that loading needs."""


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
        write_file(folder / CONFIG, json.dumps({"type": "bytes"}) + "\n")


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

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i != self.eod_id])

    def save(self, folder: Path) -> None:
        write_file(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_file(folder / CONFIG, json.dumps({"type": "json", "eod_token": self.eod_token}) + "\n")


def load_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer that `save` left in a folder, such as a run's; None if there is none."""
    path = Path(folder) / CONFIG
    if not path.exists():
        return None
    config = json.loads(path.read_text())
    if config["type"] == "bytes":
        return ByteTokenizer()
    return JsonTokenizer(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), config["eod_token"])


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOD_TOKENS[0]],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer, EOD_TOKENS[0])


def read_tokenizer(path: Path, eod_token: str | None) -> JsonTokenizer:
    """The tokenizer in a `tokenizer.json`; DataError if it is none, or has no end-of-document token."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"data.tokenizer_file = {str(path)!r} is not a tokenizer.json of the tokenizers library: {error}"
        ) from error
    candidates = EOD_TOKENS if eod_token is None else (eod_token,)
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            return JsonTokenizer(tokenizer, token)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise DataError(
        f"data.eod_token = {eod_token!r}: {path} has no {' or '.join(candidates)} to end documents with; "
        f"name one that it has ({', '.join(special[:10]) or 'it has no special tokens'})"
    )


def _pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each token stands for, by id."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"])
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in added:
            pieces[i] = b"" if added[i].special else token.encode()
        elif '"ByteLevel"' in decoder:
            pieces[i] = bytes(_BYTE_OF[c] for c in token) if _BYTE_OF.keys() >= set(token) else token.encode()
        elif '"WordPiece"' in decoder:  # words are apart from each other, and ## glues
            pieces[i] = token[2:].encode() if token.startswith("##") else b" " + token.encode()
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces[i] = bytes.fromhex(token[3:5])
        else:  # SentencePiece
            pieces[i] = token.replace("▁", " ").encode()
    return pieces


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()
