"""MQAR: rows of the published form, their gaps, an exact solver, and guesses that must fail."""

import numpy as np
import pytest

from tasks import rows, within_sampling_error

N = 20_000


@pytest.mark.parametrize(("T", "pairs"), [(64, 4), (128, 8), (256, 16), (512, 64)])
@pytest.mark.parametrize("random", [False, True])
def test_a_row_is_pairs_then_each_key_once_at_an_even_place(T, pairs, random):
    ids, labels = rows("mqar", n=300, seq_len=T, n_pairs=pairs, random_non_queries=random)
    for row, label in zip(ids, labels, strict=True):
        keys, values, rest = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], row[2 * pairs :]
        assert len(set(keys)) == len(set(values)) == pairs
        assert ((keys >= 1) & (keys < 4096)).all()
        assert ((values >= 4096) & (values < 8192)).all()
        asked = np.flatnonzero(label != -100)
        assert (asked % 2 == 0).all()
        assert sorted(row[asked]) == sorted(keys)
        # Here alone are keys: filler is none of them.
        assert (np.flatnonzero(np.isin(rest, keys)) + 2 * pairs == asked).all()
        assert random or set(rest) == {0, *keys}


def test_looking_the_key_up_solves_it():
    ids, labels = rows("mqar", n=500, n_pairs=8, random_non_queries=True)
    for row, label in zip(ids, labels, strict=True):
        value_of = dict(zip(row[:16:2], row[1:16:2], strict=True))
        asked = label != -100
        assert [value_of[key] for key in row[asked]] == label[asked].tolist()


def test_gaps_are_drawn_one_after_another_by_their_weights():
    ids, _ = rows("mqar", seq_len=32, n_pairs=3)
    gaps = np.stack([(ids[:, 6:] == ids[:, 2 * k, None]).argmax(axis=1) for k in range(3)], axis=1)
    assert (gaps % 2 == 0).all()
    weights = np.arange(1, 14) ** (0.01 - 1)
    p = weights / weights.sum()
    second = p * ((p / (1 - p)).sum() - p / (1 - p))  # another first, then this of those that are left
    assert within_sampling_error(np.bincount(gaps[:, 0] // 2, minlength=13), N * p)
    assert within_sampling_error(np.bincount(gaps[:, 1] // 2, minlength=13), N * second)


@pytest.mark.parametrize("random", [False, True])
def test_keys_values_and_filler_are_uniform(random):
    ids, _ = rows("mqar", vocab_size=16, seq_len=16, n_pairs=2, random_non_queries=random)
    assert within_sampling_error(np.bincount(ids[:, 0], minlength=8)[1:8], N / 7)
    assert within_sampling_error(np.bincount(ids[:, 3] - 8, minlength=8), N / 8)
    if random:  # each of the 16 - 2 others as often
        filler = ids[:, 5][(ids[:, 0] == 1) & (ids[:, 2] == 2)]  # an odd place: no query
        counts = np.bincount(filler, minlength=16)
        assert counts[1] == counts[2] == 0
        assert within_sampling_error(np.delete(counts, [1, 2]), len(filler) / 14)


def test_no_fixed_choice_does_better_than_chance():
    ids, labels = rows("mqar", n_pairs=4)
    for k in range(4):  # the first, ..., the last value of the row
        assert (labels == ids[:, 2 * k + 1, None]).sum() == N, "each is asked for once"
    answers = labels[labels != -100] - 4096
    assert np.bincount(answers).max() / (4 * N) < 0.002, "the most common value of all"


@pytest.mark.parametrize(("T", "pairs", "ceiling"), [(64, 4, 0.289), (128, 8, 0.156)])
def test_knowing_the_place_of_a_query_helps_little(T, pairs, ceiling):
    # Gaps are drawn for the pairs in order, and short ones are the first to be drawn: early pairs are asked for early.
    ids, labels = rows("mqar", seq_len=T, n_pairs=pairs)
    asked = np.nonzero(labels != -100)
    which = (labels[asked][:, None] == ids[asked[0], 1 : 2 * pairs : 2]).argmax(axis=1)
    counts = np.zeros((T, pairs))
    np.add.at(counts, (asked[1], which), 1)
    assert counts.max(axis=1).sum() / counts.sum() == pytest.approx(ceiling, abs=0.01)


def test_other_numbers_of_pairs_are_datasets_of_their_own():
    ids, labels = rows("mqar", "pairs_8", n=50, test_pairs=[8])
    assert ids.shape == (50, 64)
    assert ((labels != -100).sum(axis=1) == 8).all()
