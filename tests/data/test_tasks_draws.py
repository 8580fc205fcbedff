"""The random numbers of tasks: a sample's own, whatever else is drawn, and distributed as they say."""

from itertools import permutations

import numpy as np
import pytest

from mixerlab.data.tasks.draws import Draws, skipping
from tasks import within_sampling_error

N = 20_000


@pytest.fixture
def draws():
    return Draws(0, "train", np.arange(N))


def test_the_numbers_of_a_sample_do_not_depend_on_the_others():
    index = np.array([7, 3, 99_999])
    together = Draws(1, "valid", index)
    first, second = together.uniform(4, 2), together.distinct(50, 5)
    for row, i in enumerate(index):
        alone = Draws(1, "valid", np.array([i]))
        assert (alone.uniform(4, 2) == first[row]).all()
        assert (alone.distinct(50, 5) == second[row]).all()


@pytest.mark.parametrize("other", [Draws(1, "train", np.arange(99)), Draws(0, "valid", np.arange(99))])
def test_another_seed_or_split_has_other_numbers(other):
    bits = np.concatenate([Draws(0, "train", np.arange(99)).bits(9), other.bits(9)])
    assert len(np.unique(bits)) == bits.size


def test_every_bit_is_as_often_0_as_1_and_none_follows_from_the_one_before(draws):
    bits = draws.bits(4)
    for other in (np.zeros_like(bits), np.roll(bits, 1, axis=0), np.roll(bits, 1, axis=1)):
        ones = np.unpackbits((bits ^ other).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0)
        assert within_sampling_error(np.stack([ones, bits.size - ones], axis=-1), bits.size / 2)


def test_integers_are_uniform_with_both_ends(draws):
    numbers = draws.integers(3, np.array([5, 9]), 2)
    for column, high in enumerate((5, 9)):
        counts = np.bincount(numbers[:, column], minlength=10)[3:]
        expected = np.where(np.arange(3, 10) <= high, N / (high - 2), 0)
        assert within_sampling_error(counts, expected)


def test_distinct_numbers_have_every_order_as_often(draws):
    numbers = draws.distinct(5, 3)
    counts = [(numbers == order).all(axis=1).sum() for order in permutations(range(5), 3)]
    assert within_sampling_error(counts, N / 60)


def test_all_of_a_range_can_be_chosen(draws):
    assert (np.sort(draws.distinct(6, 6), axis=1) == np.arange(6)).all()


def test_weighted_places_are_drawn_one_after_another(draws):
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    places = draws.weighted(weights, 2)
    pairs = list(permutations(range(4), 2))
    expected = [N * weights[a] / 8 * weights[b] / (8 - weights[a]) for a, b in pairs]
    counts = [(places == pair).all(axis=1).sum() for pair in pairs]
    assert within_sampling_error(counts, np.array(expected))


def test_skipping_leaves_out_what_is_excluded_and_nothing_else():
    excluded = Draws(3, "train", np.arange(500)).distinct(12, 4)
    numbers = np.tile(np.arange(8), (500, 1))
    for row, taken in zip(skipping(numbers, excluded), excluded, strict=True):
        assert row.tolist() == [number for number in range(12) if number not in taken]
    assert (skipping(numbers[:, :, None], excluded)[..., 0] == skipping(numbers, excluded)).all()
