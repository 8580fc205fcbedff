"""Pieces of long documents."""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 16
"""Characters after which a document is cut, so that one huge file uses all cores and little memory."""

LEARNED = 1 << 24
"""Bytes without any space that a tokenizer is trained on. All of it would be words that occur once: the work grows as
for no other text, and more of it teaches no more."""

_SINGLE_SPACE = re.compile(r"(?<=\S) (?=\S)")
_LINE_END = re.compile(r"(?<=\S\n)(?=\S)")
_WORD_END = re.compile(r"(?<=[^\W_])(?=[^\w\s])")


def cut(text: str) -> list[str]:
    """Cuts a long text into pieces of at most 2 PIECE characters.

    A cut is before a single space, where usual tokenizers begin a new token anyway. Where there is none it is after a
    line or before punctuation, where they do so too; and in a text that is one endless word, anywhere.
    """
    pieces, start = [], 0
    while len(text) > (first := start + PIECE):
        last = start + 2 * PIECE
        match = _SINGLE_SPACE.search(text, first, last)
        if match is None and len(text) <= last:
            break
        match = match or _LINE_END.search(text, first, last) or _WORD_END.search(text, first, last)
        end = match.start() if match else last
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def worth_learning(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces to train a tokenizer on: all, but of long ones without a space only the first LEARNED bytes."""
    left = LEARNED
    for piece in pieces:
        if len(piece) >= PIECE // 16 and len(piece.split(maxsplit=1)) == 1:
            if left <= 0:
                continue
            left -= len(piece.encode())
        yield piece
