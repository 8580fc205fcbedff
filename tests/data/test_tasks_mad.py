"""The tasks of MAD: rows of its form, exact solvers that read them again, and guesses that must fail."""

from itertools import permutations

import numpy as np
import pytest

from mixerlab.data.tasks.mad_recall import Motifs, seen_before
from tasks import rows, within_sampling_error


def recalled(row, n_noise=0, V=16):
    """What a reader of pairs knows at each position: the value of a key that was there before, else -100."""
    known: dict[int, int] = {}
    symbols, answers = V - n_noise, np.full(len(row), -100)
    for t in range(0, len(row), 2):
        key = int(row[t])
        if key < symbols // 2:
            answers[t] = known.get(key, -100)
            if t + 1 < len(row):
                value = int(row[t + 1])
                assert symbols // 2 <= value < symbols
                assert known.setdefault(key, value) == value
        else:
            assert symbols <= key < V
            assert symbols <= row[t + 1] < V
    return answers


@pytest.mark.parametrize(("name", "n_noise", "V"), [("mad_recall", 0, 16), ("mad_noisy_recall", 16, 32)])
def test_remembering_the_pairs_solves_recall(name, n_noise, V):
    ids, labels = rows(name, "valid", 1000)
    assert ids.shape == (1000, 127)
    for row, label in zip(ids, labels, strict=True):
        assert (label == recalled(row, n_noise, V)).all()
    assert (labels[:, -1] != -100).all(), "the last key was shown"


@pytest.mark.parametrize("name", ["mad_recall", "mad_noisy_recall", "mad_fuzzy_recall"])
def test_training_is_on_every_next_token_unless_it_shall_not_be(name):
    ids, labels = rows(name, n=200)
    there = labels[:, :-1] != -100
    assert (labels[:, :-1] == ids[:, 1:])[there].all()
    padded = ids[:, 1:] == 15 if name == "mad_fuzzy_recall" else np.zeros(there.shape, bool)
    assert (there == ~padded).all()
    _, fewer = rows(name, n=200, every_token=False)
    assert (fewer != -100).sum() < (labels != -100).sum()
    assert (fewer == labels)[fewer != -100].all()


def test_noise_takes_as_many_pairs_as_it_shall():
    ids, _ = rows("mad_noisy_recall", n=4000, noise_rate=0.4)
    noise = (ids[:, :-1:2] >= 16).mean(axis=1)
    # Of 63 pairs one is none.
    assert abs(noise.mean() - 0.4 * 62 / 63) < 5 * noise.std() / 4000**0.5
    assert (noise < 1).all()
    assert not (rows("mad_noisy_recall", n=200, noise_rate=0.99)[0][:, :-1:2] >= 16).all(axis=1).any()


def test_keys_and_values_are_uniform():
    ids, labels = rows("mad_recall", "valid", 1280)
    assert within_sampling_error(np.bincount(ids[:, :-1:2].ravel(), minlength=8), 1280 * 63 / 8)
    assert within_sampling_error(np.bincount(ids[:, 1], minlength=16)[8:], 1280 / 8)
    last, answer = ids[:, -1], labels[:, -1]
    assert within_sampling_error(np.bincount(last, minlength=8), 1280 / 8)
    for guess in (ids[:, 1], ids[:, -2]):
        # The value of another key, but for one time in eight.
        assert (guess == answer).mean() < 1 / 8 + 7 / 8 / 8 + 0.05


def test_reading_keys_until_a_value_begins_solves_fuzzy_recall():
    for split, n in (("valid", 400), ("train", 400)):
        ids, labels = rows("mad_fuzzy_recall", split, n, every_token=False)
        assert ids.shape == (n, 128)
        key_lengths = set()
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            begin = next(t for t, token in enumerate(row) if token != 15)
            assert set(row[:begin]) <= {15}
            known: dict[tuple, list] = {}
            t, answers = begin, [-100] * 128
            while t < 128:
                end = next((k for k in range(t, 128) if row[k] >= 7), 128)
                key = tuple(row[t:end])
                key_lengths.add(len(key))
                assert len(set(key)) == len(key) <= 3
                stop = next((k for k in range(end, 128) if row[k] < 7), 128)
                value = row[end:stop]
                if stop == 128:  # the last label is beyond the row
                    value = known[key]
                    assert row[end:] == value[: 128 - end], "what is asked for was shown"
                if key in known:
                    answers[end - 1 : end - 1 + len(value)] = value
                assert known.setdefault(key, value) == value
                assert len(set(value)) == len(value) <= 3
                assert all(7 <= token < 15 for token in value)
                t = stop
            assert label == answers
        assert key_lengths == ({3} if split == "valid" else {1, 2, 3})


def test_lengths_of_keys_and_values_are_drawn_before_what_they_are_of():
    motifs = Motifs(4, 1, 3)
    u = (np.arange(3000) + 0.5) / 3000
    grid = np.stack(np.meshgrid(u[::10], u[::10]), axis=-1).reshape(-1, 2)
    chosen = motifs.choose(grid[:, 0], grid[:, 1])
    counts = np.bincount(motifs.lengths(chosen))[1:]
    assert abs(counts / len(grid) - 1 / 3).max() < 0.01


@pytest.mark.parametrize(("shortest", "longest"), [(1, 3), (2, 2), (3, 4)])
def test_every_motif_has_its_number(shortest, longest):
    motifs = Motifs(5, shortest, longest)
    spelt = motifs.spell(np.arange(motifs.first[-1])[None])[0]
    found = [tuple(int(symbol) for symbol in row if symbol >= 0) for row in spelt]
    expected = [p for k in range(shortest, longest + 1) for p in permutations(range(5), k)]
    assert sorted(found) == sorted(expected)
    assert [len(motif) for motif in found] == motifs.lengths(np.arange(motifs.first[-1])).tolist()


def test_what_was_seen_before():
    items = np.random.default_rng(0).integers(0, 6, size=(200, 9))
    expected = [[item in row[:k] for k, item in enumerate(row)] for row in items.tolist()]
    assert (seen_before(items) == expected).all()


def test_leaving_out_blanks_solves_selective_copying():
    ids, labels = rows("mad_selective_copying", "valid", 1000)
    assert ids.shape == (1000, 256)
    held = np.zeros(256)
    for row, label in zip(ids, labels, strict=True):
        data = row[row < 14]
        assert len(data) == 16
        assert row[239] == 15
        assert (row[240:] == 14).all()
        assert (label[:240] == -100).all()
        assert (label[240:] == data).all()
        held += row < 14
    assert held[238] == 1000, "no blank comes after the last token"
    assert held[240:].sum() == 0
    # Before the first token there are as many blanks as before any other: 223 / 16.
    first = (ids < 14).argmax(axis=1)
    assert abs(first.mean() - 223 / 16) < 5 * first.std() / 1000**0.5


def test_compression_asks_for_all_that_was_there():
    ids, labels = rows("mad_compression", "valid", 1000)
    assert (labels[:, 31:] == ids[:, :31]).all()
    assert (ids[:, 31:] == 15).all()
    assert (labels[:, :31] == -100).all()
    assert within_sampling_error(np.bincount(ids[:, :31].ravel(), minlength=15), 31_000 / 15)


def test_facts_are_the_same_everywhere_and_no_two_keys_share_a_value():
    facts: dict[int, int] = {}
    for split in ("train", "valid"):
        ids, labels = rows("mad_memorization", split, 256)
        assert (ids[:, 1::2] == 255).all()
        assert (labels[:, ::2] == -100).all()
        for key, value in zip(ids[:, ::2].ravel().tolist(), labels[:, 1::2].ravel().tolist(), strict=True):
            assert facts.setdefault(key, value) == value
    assert len(set(facts.values())) == len(facts) == 127
    assert set(facts.values()) == set(range(127, 254))
