"""Texts whose tokens are coloured by what they counted: in the terminal, on a page of HTML, and as CSV."""

import codecs
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

FOR, AGAINST = (214, 48, 39), (52, 99, 209)
"""Colours (red, green, blue) of positive and of negative values, the more of them the larger the value."""
FAINTEST = 0.04
"""Of the largest value: below it there is no colour."""

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
pre{font:14px/1.7 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}h2{margin-top:2em}"""


@dataclass(frozen=True)
class Passage:
    """The text once, with a value for each of its tokens."""

    title: str
    sentence: str
    legend: str
    """What the colours mean."""
    values: list[float]
    warning: str = ""
    page_only: bool = False


@dataclass(frozen=True)
class Word:
    """What is shown as one: a token, or several that are the bytes of one character, with the sum of their values."""

    text: str
    first: int
    end: int
    """The tokens are first to end - 1."""


def words_of(pieces: Sequence[bytes]) -> list[Word]:
    """The tokens of a text, by the bytes of each, as they are shown."""
    words: list[Word] = []
    decoder, first = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for end, piece in enumerate(pieces, 1):
        decoder.decode(piece)
        within_a_character = bool(decoder.getstate()[0])
        if not within_a_character or end == len(pieces):
            words.append(Word(shown(b"".join(pieces[first:end])), first, end))
            first = end
    return words


def shown(piece: bytes) -> str:
    """A token's bytes as text; what a terminal would obey is spelt out, and a line's end is marked."""
    text = piece.decode("utf-8", "backslashreplace") or "<end>"
    marked = text.replace("\n", "⏎\n")
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in marked
    )


def quoted(text: str) -> str:
    """What `shown` makes of a token, in one line."""
    one_line = text.replace("\n", "").replace("\t", "⇥")  # a line's end is marked
    return f"'{one_line}'"


def coloured(words: Sequence[Word], passage: Passage) -> Text:
    """For rich's console."""
    text = Text()
    for word, value, strength in _strengths(words, passage):
        mixed = (round(255 + strength * (c - 255)) for c in (FOR if value > 0 else AGAINST))
        text.append(word.text, f"black on rgb({','.join(map(str, mixed))})" if strength else "")
    return text


def strongest(words: Sequence[Word], passage: Passage, most: int = 5) -> str:
    """The tokens with the largest values, either sign, for where there are no colours."""
    order = sorted(_strengths(words, passage), key=lambda found: -abs(found[1]))[:most]
    return ", ".join(f"{quoted(word.text)} at {word.first}: {value:+.3g}" for word, value, _ in order)


def page(title: str, words: Sequence[Word], passages: Sequence[Passage]) -> str:
    """One file of HTML that needs nothing beside it."""
    parts = [f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"]
    parts.append("<p>Numbers are under the pointer.</p>")
    for passage in passages:
        parts.append(f"<h2>{html.escape(passage.title)}</h2><p>{html.escape(passage.sentence)}</p>")
        if passage.warning:
            parts.append(f"<p><strong>Warning: {html.escape(passage.warning)}</strong></p>")
        parts.append(f"<p>{html.escape(passage.legend)}</p><pre>")
        for word, value, strength in _strengths(words, passage):
            red, green, blue = FOR if value > 0 else AGAINST
            colour = f"rgba({red},{green},{blue},{strength:.3f})"
            parts.append(
                f'<span title="{value:.4g}" style="background:{colour}">{html.escape(word.text)}</span>'
            )
        parts.append("</pre>")
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{"".join(parts)}</html>\n'


def table(words: Sequence[str], passages: Sequence[Passage]) -> str:
    """CSV: a line for each token of each passage; `words` has one for each token."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("passage", "position", "token", "value"))
    for passage in passages:
        for i, (word, value) in enumerate(zip(words, passage.values, strict=True)):
            writer.writerow((passage.title, i, word, repr(value)))
    return text.getvalue()


def _strengths(words: Sequence[Word], passage: Passage) -> list[tuple[Word, float, float]]:
    """(word, value, how strong its colour is, from 0 to 1)."""
    values = [sum(passage.values[word.first : word.end]) for word in words]
    largest = max(map(abs, values)) or 1.0
    strengths = [abs(value) / largest for value in values]
    return [
        (word, value, strength if strength >= FAINTEST else 0.0)
        for word, value, strength in zip(words, values, strengths, strict=True)
    ]
