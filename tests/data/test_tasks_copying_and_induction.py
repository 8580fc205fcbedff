"""Selective copying and induction heads: where things are, exact solvers, and guesses that must fail."""

import numpy as np
import pytest

from tasks import rows, within_sampling_error

N = 20_000


def test_leaving_out_the_noise_solves_selective_copying():
    ids, labels = rows("selective_copying", n=100)
    assert ids.shape == (100, 4096 + 16)
    for row, label in zip(ids, labels, strict=True):
        data = row[:4096][row[:4096] != 0]
        assert len(data) == 16
        assert ((data >= 2) & (data < 16)).all()
        assert (row[4096:] == 1).all()
        assert (label[:4096] == -100).all()
        assert (label[4096:] == data).all()


def test_data_and_their_places_are_uniform():
    ids, labels = rows("selective_copying", length=20, n_data=3)
    held = ids[:, :20] != 0
    assert within_sampling_error(held.sum(axis=0), N * 3 / 20)
    together = (held[:, 4] & held[:, 11]).sum()
    pairs = np.array([3 * 2 / (20 * 19), 1 - 3 * 2 / (20 * 19)])
    assert within_sampling_error([together, N - together], N * pairs)
    for place in (20, 22):  # neither place of the answer has a favourite
        assert within_sampling_error(np.bincount(labels[:, place], minlength=16)[2:], N / 14)


@pytest.mark.parametrize("T", [3, 16, 256])
def test_what_follows_the_special_token_solves_induction_heads(T):
    ids, labels = rows("induction_heads", n=500, seq_len=T)
    for row, label in zip(ids, labels, strict=True):
        first, last = np.flatnonzero(row == 0)
        assert last == T - 1
        assert first < last - 1
        assert (np.flatnonzero(label != -100) == [T - 1]).all()
        assert label[-1] == row[first + 1]


def test_the_place_and_the_answer_are_uniform():
    ids, labels = rows("induction_heads", seq_len=16)
    assert within_sampling_error(np.bincount((ids == 0).argmax(axis=1), minlength=14), N / 14)
    answers = labels[:, -1]
    assert within_sampling_error(np.bincount(answers, minlength=16)[1:], N / 15)


@pytest.mark.parametrize("guess", ["first", "last", "majority"])
def test_a_guess_is_hardly_better_than_chance(guess):
    ids, labels = rows("induction_heads", n=5000, seq_len=256)
    counts = np.stack([(ids[:, :-1] == token).sum(axis=1) for token in range(16)], axis=1)
    counts[:, 0] = 0
    guesses = {"first": ids[:, 0], "last": ids[:, -2], "majority": counts.argmax(axis=1)}
    assert (guesses[guess] == labels[:, -1]).mean() < 1 / 15 + (
        0.05 if guess == "majority" else 0.02
    )  # it is there once more


def test_lengths_are_datasets_of_their_own():
    for T in (64, 1024):
        ids, labels = rows("induction_heads", f"length_{T}", n=10)
        assert ids.shape == labels.shape == (10, T)
