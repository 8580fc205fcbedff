"""Diffuse MQAR: the row's form, its lags and distractors, an exact solver, and the ceilings of guesses."""

import numpy as np
import pytest

from tasks import rows, within_sampling_error

RANGES = {"train": (32, 394), "lag_512": (32, 394), "lag_1024": (505, 906), "lag_1536": (1017, 1418)}
RANGES["lag_2048"] = (1529, 1930)
CEILINGS = {"lag_512": 0.48, "lag_1024": 0.16, "lag_1536": 0.09, "lag_2048": 0.06}
"""Of one who knows the prefix alone and picks one of the values that follow it."""


def parsed(row):
    """Memory, noise and queries of a row: pairs (key, value), pairs with None where there is fill, keys."""
    row = row.tolist()
    assert row[:2] == [1, 2]
    noise, query = row.index(3), row.index(4)
    memory = [(tuple(row[i : i + 4]), row[i + 4]) for i in range(2, noise, 5)]
    distractors, i = [], noise + 1
    while i < query:
        is_fill = row[i] == 6
        distractors.append(None if is_fill else (tuple(row[i : i + 4]), row[i + 4]))
        i += 1 if is_fill else 5
    assert i == query
    end = query + 1 + 5 * 8
    assert row[query + 1 : end : 5] == [5] * 8
    assert set(row[end:]) <= {0}
    return memory, distractors, [tuple(row[i + 1 : i + 5]) for i in range(query + 1, end, 5)]


@pytest.mark.parametrize("split", RANGES)
def test_a_row_is_memory_noise_and_queries(split):
    ids, labels = rows("diffuse_mqar", split, 100)
    for row, label in zip(ids, labels, strict=True):
        memory, noise, queries = parsed(row)
        N = row.tolist().index(4) - row.tolist().index(3) - 1
        assert len(memory) == 16
        assert len({key[:2] for key, _ in memory}) == len({value for _, value in memory}) == 16
        assert noise.count(None) == N % 5
        assert len(noise) - noise.count(None) == N // 5
        pairs = [*memory, *filter(None, noise)]
        assert all(8 <= token < 520 for key, _ in pairs for token in key)
        assert all(520 <= value < 1032 for _, value in pairs)
        assert len(set(queries)) == 8
        keys = dict(memory)
        assert set(queries) <= set(keys)
        assert [keys[key] for key in queries] == label[label != -100].tolist(), "the solver"
        for key, value in filter(None, noise):
            assert key not in keys
            like = [v for k, v in memory if k[:2] == key[:2]]
            assert value not in like


@pytest.mark.parametrize("split", RANGES)
def test_lags_follow_the_formula_and_reach_over_the_bucket(split):
    ids, labels = rows("diffuse_mqar", split, 2000)
    N = (ids == 4).argmax(axis=1) - (ids == 3).argmax(axis=1) - 1
    low, high = RANGES[split]
    assert ids.shape[1] == 124 + high
    assert N.min() >= low
    assert N.max() <= high
    tenths = np.bincount((N - low) * 10 // (high - low + 1), minlength=10)
    sizes = np.bincount(np.arange(high - low + 1) * 10 // (high - low + 1))
    assert within_sampling_error(tenths, len(N) * sizes / sizes.sum())
    lags = []
    for row, label, n in zip(ids[:300], labels[:300], N[:300], strict=True):
        memory, _, queries = parsed(row)
        for b, place in enumerate(np.flatnonzero(label != -100)):
            a = [key for key, _ in memory].index(queries[b])
            source = 2 + 5 * a + 3
            assert tuple(row[source - 3 : source + 1]) == tuple(row[place - 3 : place + 1])
            assert place - source == 5 * (16 - a + b) + n + 3
            lags.append(place - source)
    largest = high + 118
    assert (low + 8 <= np.array(lags)).all()
    assert (np.array(lags) <= largest).all()
    assert (low + 8, largest) == {512: (40, 512), 1024: (513, 1024), 1536: (1025, 1536), 2048: (1537, 2048)}[
        largest
    ]


def test_distractors_clash_as_often_as_they_shall():
    ids, _ = rows("diffuse_mqar", "train", 2000)
    clashes, of_pair, boundary, total = 0, np.zeros(16), np.zeros(2), 0
    for row in ids:
        memory, noise, _ = parsed(row)
        prefixes = [key[:2] for key, _ in memory]
        pairs = [pair for pair in noise if pair]
        like = [prefixes.index(key[:2]) for key, _ in pairs if key[:2] in prefixes]
        clashes, total = clashes + len(like), total + len(pairs)
        of_pair += np.bincount(like, minlength=16)
        fills = noise.count(None)
        if fills == 1:  # a single fill is before the first pair as often as after the last
            boundary += [noise[0] is None, noise[-1] is None]
    assert abs(clashes / total - 0.75) < 5 * (0.75 * 0.25 / total) ** 0.5
    assert within_sampling_error(of_pair, clashes / 16)
    assert within_sampling_error(boundary, boundary.sum() / 2)


@pytest.mark.parametrize(("split", "ceiling"), CEILINGS.items())
def test_guesses_stay_below_their_ceilings(split, ceiling):
    ids, labels = rows("diffuse_mqar", split, 600)
    right = {"prefix": 0.0, "last prefix": 0, "first value": 0, "last value": 0, "majority": 0}
    first_place = 0
    for row, label in zip(ids, labels, strict=True):
        memory, noise, queries = parsed(row)
        pairs = [*memory, *filter(None, noise)]
        values = [value for _, value in pairs]
        most = max(set(values), key=values.count)
        for key, answer in zip(queries, label[label != -100], strict=True):
            same = [value for other, value in pairs if other[:2] == key[:2]]
            right["prefix"] += same.count(answer) / len(same)
            right["last prefix"] += same[-1] == answer
            right["first value"] += values[0] == answer
            right["last value"] += values[-1] == answer
            right["majority"] += most == answer
            first_place += same[0] == answer
    n = 600 * 8
    assert right["prefix"] / n == pytest.approx(ceiling, abs=0.02)
    assert right["last prefix"] / n < ceiling + 0.02
    for guess in ("first value", "last value", "majority"):
        assert right[guess] / n < 1 / 16 + 0.02, guess
    # Memory comes first: who finds the first place with the prefix need not know the suffix.
    assert first_place == n


def test_of_a_few_symbols_every_one_is_used_and_the_solver_holds():
    small = {"n_symbols": 5, "n_pairs": 4, "n_queries": 4, "key_length": 2, "prefix_length": 1}
    ids, labels = rows("diffuse_mqar", "train", 200, min_lag=12, lags=[48], **small)
    tokens = set(ids.ravel().tolist())
    assert tokens == {*range(7), *range(8, 18)}, "ids, keys of 5 symbols and as many values"
    for row, label in zip(ids.tolist(), labels, strict=True):
        memory = {tuple(row[i : i + 2]): row[i + 2] for i in range(2, 14, 3)}
        query = row.index(4) + 1
        asked = [tuple(row[i + 1 : i + 3]) for i in range(query, query + 12, 3)]
        assert [memory[key] for key in asked] == label[label != -100].tolist()
