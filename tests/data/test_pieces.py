"""Cutting long documents, and what of them a tokenizer is trained on."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixerlab.data.pieces import cut, worth_learning
from mixerlab.data.tokenizers import train_bpe

WORDS = st.text(st.sampled_from("abcé日本0"), min_size=1, max_size=9)
GAPS = st.sampled_from(
    [" ", "\n", ". ", "。", "-", ", ", "'s ", "_", " - ", "\n\n", " \n", "\r\n", "...", "  x  "]
)
ORDINARY = train_bpe(
    ["abc def 日本 日本。cab\n\nbac, a-b x's  y \r\n" * 20, "aab  bba 0_0 é'é... \n" * 20], 340
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(WORDS, GAPS), min_size=20, max_size=60), one=st.booleans())
def test_cutting_does_not_change_the_tokens_of_ordinary_text(monkeypatch, parts, one):
    monkeypatch.setattr("mixerlab.data.pieces.PIECE", 20)
    text = "".join(word + (parts[0][1] if one else gap) for word, gap in parts)
    pieces = cut(text)
    assert len(pieces) > 1 or len(text) <= 40
    assert "".join(pieces) == text
    if not any(len(piece) == 40 for piece in pieces):  # lines of nothing but spaces have no better place
        assert [i for piece in pieces for i in ORDINARY.encode(piece)] == ORDINARY.encode(text)


@pytest.mark.parametrize("gap", [" ", "\n", "。", "-", "'s "])
def test_a_cut_between_words_is_between_tokens(monkeypatch, gap):
    monkeypatch.setattr("mixerlab.data.pieces.PIECE", 20)
    text = gap.join(["abc", "cabba", "日本", "aab", "é", "00"] * 20)
    pieces = cut(text)
    assert len(pieces) > 10
    assert all(len(piece) < 40 for piece in pieces)
    assert [i for piece in pieces for i in ORDINARY.encode(piece)] == ORDINARY.encode(text)


def test_single_spaces_are_cut_at_where_they_always_were(monkeypatch):
    monkeypatch.setattr("mixerlab.data.pieces.PIECE", 20)
    text = "line one\nis-short and has  spaces, as text has. " * 9
    single = re.compile(r"(?<=\S) (?=\S)")
    expected, start = [], 0
    while match := single.search(text, start + 20):
        expected.append(text[start : match.start()])
        start = match.start()
    assert cut(text) == [*expected, text[start:]]


def test_a_text_that_is_one_word_is_cut_alike_everywhere():
    assert [len(piece) for piece in cut("x" * 300_000)] == [131072, 131072, 37856]


def test_of_text_without_a_space_only_the_beginning_is_learned(monkeypatch):
    monkeypatch.setattr("mixerlab.data.pieces.PIECE", 20 * 16)
    monkeypatch.setattr("mixerlab.data.pieces.LEARNED", 70)
    endless, ordinary, short = "é" * 20, "a few words that have spaces", "x" * 19
    pieces = [endless, ordinary, endless, short, endless, ordinary, short]
    assert list(worth_learning(iter(pieces))) == [endless, ordinary, endless, short, ordinary, short]
