"""Coloured texts: what is shown of any token, and pages that stand alone."""

import csv
import io

from mixerlab.lm.attribution.page import Passage, coloured, page, shown, strongest, table

WORDS = ["def", " <b>", "⏎\n", "x"]
PASSAGE = Passage("one", "a sentence", [2.0, -1.0, 0.01, 0.0])


def test_nothing_that_a_terminal_would_obey_is_shown():
    assert shown(b"a b") == "a b"
    assert shown(b"\x1b[2J") == "\\x1b[2J"
    assert shown("\u202ex".encode()) == "\\u202ex"
    assert shown(b"\xc3") == "\\xc3"
    assert shown(b"\n\t") == "⏎\n\t"
    assert shown(b"") == "<end>"


def test_the_stronger_the_value_the_stronger_its_colour():
    text = coloured(WORDS, PASSAGE)
    assert text.plain == "".join(WORDS)
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style}
    assert styles == {"def": "black on rgb(214,48,39)", " <b>": "black on rgb(154,177,232)"}


def test_a_passage_of_zeros_has_no_colours():
    assert not [span for span in coloured(WORDS, Passage("", "", [0.0] * 4)).spans if span.style]


def test_the_page_needs_nothing_and_escapes_the_text():
    text = page("of <i>", WORDS, [PASSAGE, Passage("two", "", [0.0] * 4, page_only=True)])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    assert "rgba(214,48,39,1.000)" in text
    assert "<h2>two</h2>" in text
    assert not any(part in text for part in ("http", "src=", "href="))


def test_the_table_has_a_line_for_each_token_of_each_passage():
    rows = list(csv.reader(io.StringIO(table(WORDS, [PASSAGE]))))
    assert rows[0] == ["passage", "position", "token", "value"]
    assert rows[2] == ["one", "1", " <b>", "-1.0"]
    assert len(rows) == 5


def test_the_strongest_are_named_whatever_their_sign():
    assert strongest(WORDS, PASSAGE.values, 2) == "'def' at 0: +2, ' <b>' at 1: -1"
