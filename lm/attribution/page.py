"""Texts whose tokens are coloured by what they counted: in the terminal, on a page of HTML, and as CSV."""

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
    values: list[float]
    page_only: bool = False


def shown(piece: bytes) -> str:
    """A token's bytes as text; what a terminal would obey is spelt out, and a line's end is marked."""
    text = piece.decode("utf-8", "backslashreplace") or "<end>"
    marked = text.replace("\n", "⏎\n")
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in marked
    )


def coloured(words: Sequence[str], passage: Passage) -> Text:
    """For rich's console."""
    text = Text()
    for word, value, strength in _strengths(words, passage):
        mixed = (round(255 + strength * (c - 255)) for c in (FOR if value > 0 else AGAINST))
        text.append(word, f"black on rgb({','.join(map(str, mixed))})" if strength else "")
    return text


def strongest(words: Sequence[str], values: Sequence[float], most: int = 5) -> str:
    """The tokens with the largest values, either sign, for where there are no colours."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:most]
    return ", ".join(f"{words[i]!r} at {i}: {values[i]:+.3g}" for i in order)


def page(title: str, words: Sequence[str], passages: Sequence[Passage]) -> str:
    """One file of HTML that needs nothing beside it."""
    parts = [f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"]
    parts.append("<p>Red: for the token. Blue: against it. The number is under the pointer.</p>")
    for passage in passages:
        parts.append(f"<h2>{html.escape(passage.title)}</h2><p>{html.escape(passage.sentence)}</p><pre>")
        for word, value, strength in _strengths(words, passage):
            red, green, blue = FOR if value > 0 else AGAINST
            colour = f"rgba({red},{green},{blue},{strength:.3f})"
            parts.append(f'<span title="{value:.4g}" style="background:{colour}">{html.escape(word)}</span>')
        parts.append("</pre>")
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{"".join(parts)}</html>\n'


def table(words: Sequence[str], passages: Sequence[Passage]) -> str:
    """CSV: a line for each token of each passage."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("passage", "position", "token", "value"))
    for passage in passages:
        for i, (word, value) in enumerate(zip(words, passage.values, strict=True)):
            writer.writerow((passage.title, i, word, repr(value)))
    return text.getvalue()


def _strengths(words: Sequence[str], passage: Passage) -> list[tuple[str, float, float]]:
    """(word, value, how strong its colour is, from 0 to 1)."""
    largest = max(map(abs, passage.values)) or 1.0
    strengths = [abs(value) / largest for value in passage.values]
    return [
        (word, value, strength if strength >= FAINTEST else 0.0)
        for word, value, strength in zip(words, passage.values, strengths, strict=True)
    ]
