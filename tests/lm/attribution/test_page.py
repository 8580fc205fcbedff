"""Coloured texts: what is shown of any token, and pages that stand alone."""

import csv
import io

from mixerlab.lm.attribution.page import Passage, coloured, page, quoted, shown, strongest, table, words_of

PIECES = [b"def", b" <b>", b"\n", b"x"]
WORDS = words_of(PIECES)
PASSAGE = Passage("one", "a sentence", "red: <for>", [2.0, -1.0, 0.01, 0.0])


def test_nothing_that_a_terminal_would_obey_is_shown():
    assert shown(b"a b") == "a b"
    assert shown(b"\x1b[2J") == "\\x1b[2J"
    assert shown("\u202ex".encode()) == "\\u202ex"
    assert shown(b"\xc3") == "\\xc3"
    assert shown(b"\n\t") == "⏎\n\t"
    assert shown(b"") == "<end>"


def test_the_stronger_the_value_the_stronger_its_colour():
    text = coloured(WORDS, PASSAGE)
    assert text.plain == "def <b>⏎\nx"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style}
    assert styles == {"def": "black on rgb(214,48,39)", " <b>": "black on rgb(154,177,232)"}


def test_a_passage_of_zeros_has_no_colours():
    assert not [span for span in coloured(WORDS, Passage("", "", "", [0.0] * 4)).spans if span.style]


def test_the_page_needs_nothing_and_escapes_the_text():
    text = page(
        "of <i>", WORDS, [PASSAGE, Passage("two", "", "redder: more", [0.0] * 4, "too <few>", page_only=True)]
    )
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    assert "rgba(214,48,39,1.000)" in text
    one, two = text.split("<h2>two</h2>")
    assert "<p>red: &lt;for&gt;</p>" in one
    assert "Warning" not in one
    assert "<p>redder: more</p>" in two
    assert "Warning: too &lt;few&gt;" in two
    assert not any(part in text for part in ("http", "src=", "href="))


def test_the_table_has_a_line_for_each_token_of_each_passage():
    rows = list(csv.reader(io.StringIO(table([shown(piece) for piece in PIECES], [PASSAGE]))))
    assert rows[0] == ["passage", "position", "token", "value"]
    assert rows[2] == ["one", "1", " <b>", "-1.0"]
    assert len(rows) == 5


def test_the_strongest_are_named_whatever_their_sign():
    assert strongest(WORDS, PASSAGE, 2) == "'def' at 0: +2, ' <b>' at 1: -1"


def test_the_bytes_of_a_character_are_shown_together_with_the_sum_of_their_values():
    """A token may end within one, and so may the text."""
    pieces = [b"h", b"\xc3", b"\xa9", b"l \xe2", b"\x82", b"\xacs", b"", b"\xf0", b"\x9f"]
    words = words_of(pieces)
    assert [word.text for word in words] == ["h", "é", "l €s", "<end>", "\\xf0\\x9f"]
    assert [(word.first, word.end) for word in words] == [(0, 1), (1, 3), (3, 6), (6, 7), (7, 9)]
    passage = Passage("", "", "", [0.0, 1.0, 0.5, 1.0, -1.0, -2.0, 0.0, 0.0, 0.25])
    assert strongest(words, passage, 2) == "'l €s' at 3: -2, 'é' at 1: +1.5"
    assert coloured(words, passage).plain == "hél €s<end>\\xf0\\x9f"
    text = "naïve 日本"
    assert [word.text for word in words_of([bytes([byte]) for byte in text.encode()])] == list(text)


def test_a_token_is_quoted_in_one_line_and_escaped_once():
    assert [quoted(shown(piece)) for piece in (b"\xc2", b"\n\t", b"it's")] == ["'\\xc2'", "'⏎⇥'", "'it's'"]
