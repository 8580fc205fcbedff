"""The order of rows: a function of the seed and the step alone."""

import math
from collections import Counter
from itertools import islice, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerlab.data.module import Rows
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig
from mixerlab.lm.training.batches import (
    PADDING,
    ROW_ORDER,
    Loaders,
    PaddedRows,
    Steps,
    ValidationBatches,
    collate_micro_batches,
    epoch_order,
)
from mixerlab.options import ConfigError


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n_rows=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    accumulate=st.integers(1, 3),
    start=st.integers(0, 30),
)
def test_starting_later_gives_the_rest_of_the_same_steps(seed, n_rows, batch_size, accumulate, start):
    whole = list(islice(Steps(seed, n_rows, batch_size, accumulate), start + 5))
    assert list(islice(Steps(seed, n_rows, batch_size, accumulate, start), 5)) == whole[start:]
    assert all(len(rows) == batch_size * accumulate for rows in whole)


@settings(deadline=None)
@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_every_epoch_has_every_row_once(n_rows, batch_size):
    rows = [i for step in islice(Steps(3, n_rows, batch_size), 3 * n_rows) for i in step]
    for epoch in range(3):
        assert sorted(rows[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def order_of(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return epoch_order(seed, epoch, n_rows, np.arange(n_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(order_of(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6), n_rows=st.integers(1, 5000))
def test_the_order_of_an_epoch_is_a_permutation(seed, epoch, n_rows):
    assert sorted(order_of(seed, epoch, n_rows).tolist()) == list(range(n_rows))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    n_rows=st.integers(1, 2**40),
    places=st.lists(st.integers(0, 2**40), min_size=1, max_size=50, unique=True),
)
def test_of_very_many_rows_each_place_has_another(seed, n_rows, places):
    wanted = np.unique(np.array(places) % n_rows)
    rows = epoch_order(seed, 0, n_rows, wanted)
    assert rows.dtype == np.int64
    assert ((rows >= 0) & (rows < n_rows)).all()
    assert len(set(rows.tolist())) == len(wanted)
    alone = [int(epoch_order(seed, 0, n_rows, wanted[i : i + 1])[0]) for i in range(len(wanted))]
    assert alone == rows.tolist(), "a row depends on its place alone"


def excess(counts: np.ndarray, expected: float, freedom: int) -> float:
    """Pearson's chi-square of counts that should be equal, in standard deviations from its mean."""
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n_rows", [3, 4, 5])
def test_every_order_of_a_few_rows_is_as_likely(n_rows):
    counts = Counter(
        tuple(order_of(seed, epoch, n_rows).tolist()) for seed in range(60) for epoch in range(60)
    )
    likely = math.factorial(n_rows)
    of_each = np.array([counts[order] for order in permutations(range(n_rows))])
    assert excess(of_each, 3600 / likely, likely - 1) < 4


def test_rows_are_at_every_place_and_beside_every_other_as_often():
    n, orders = 30, [order_of(seed, 0, 30) for seed in range(2000)]
    at, beside = np.zeros((n, n)), np.zeros((n, n))
    for order in orders:
        at[np.arange(n), order] += 1
        beside[order[:-1], order[1:]] += 1
    assert excess(at, len(orders) / n, (n - 1) ** 2) < 4
    off_diagonal = beside[~np.eye(n, dtype=bool)]
    assert excess(off_diagonal, len(orders) / n, len(off_diagonal) - 1) < 4


@pytest.mark.parametrize("n_rows", [99_999, 100_000, 316 * 316, 2**17])
def test_the_order_of_many_rows_is_well_mixed(n_rows):
    order, other_epoch, other_seed = order_of(1, 0, n_rows), order_of(1, 1, n_rows), order_of(2, 0, n_rows)
    for a, b in (
        (np.arange(n_rows), order),  # places and rows
        (order[:-1], order[1:]),  # neighbours
        (order[:-316], order[316:]),  # as far apart as the network's halves are wide
        (order, other_epoch),
        (order, other_seed),
    ):
        assert abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(n_rows) < 4, (
            "a rank correlation, in standard deviations"
        )
        cells = np.histogram2d(a, b, bins=50)[0]
        assert excess(cells, len(a) / 2500, 49**2) < 4
    steps = np.bincount((np.diff(order) % n_rows) * 100 // n_rows, minlength=100)
    assert excess(steps, (n_rows - 1) / 100, 99) < 4


def test_the_order_never_changes():
    # A run that goes on would see other rows than it would have. Another order gets another number.
    assert ROW_ORDER == 2
    assert order_of(0, 0, 10).tolist() == [1, 3, 8, 4, 0, 5, 2, 6, 9, 7]
    assert epoch_order(1234, 5, 10**9 + 7, np.array([0, 1, 10**9])).tolist() == [
        477688211,
        535734497,
        644487421,
    ]
    assert Steps(7, 13, 2, 3, rank=1, ranks=2).rows(4) == [7, 0, 1, 11, 9, 3]


def test_a_run_that_began_with_the_first_order_goes_on_with_it():
    def first_order(seed, epoch, n_rows):
        seeds = np.random.SeedSequence([seed, epoch])
        return np.random.Generator(np.random.Philox(seeds)).permutation(n_rows).tolist()

    expected = first_order(5, 0, 20) + first_order(5, 1, 20)
    old = [i for step in islice(Steps(5, 20, 4, 2, order=1), 5) for i in step]
    assert old == expected
    new = [i for step in islice(Steps(5, 20, 4, 2), 5) for i in step]
    assert new != expected
    assert sorted(new[:20]) == list(range(20))


def test_a_run_in_an_order_of_a_newer_version_is_refused():
    with pytest.raises(ConfigError, match=r"an order \(3\) that this version of mixerlab does not know"):
        Steps(5, 20, 4, order=3)


@settings(deadline=None)
@given(
    n_rows=st.integers(1, 40),
    ranks=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    step=st.integers(0, 9),
)
def test_a_step_has_the_same_rows_however_they_are_divided(n_rows, ranks, batch_size, accumulate, step):
    whole = Steps(3, n_rows, ranks * batch_size * accumulate).rows(step)
    of_ranks = [Steps(3, n_rows, batch_size, accumulate, 0, rank, ranks).rows(step) for rank in range(ranks)]
    dealt = [
        row
        for k in range(accumulate)
        for rows in of_ranks
        for row in rows[k * batch_size : (k + 1) * batch_size]
    ]
    assert dealt == whole


@given(
    n_rows=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 9),
    ranks=st.integers(1, 5),
)
def test_ranks_validate_every_row_once_and_in_step(n_rows, batch_size, limit, ranks):
    dealt = [list(ValidationBatches(n_rows, batch_size, limit, rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in dealt}) == 1
    rows = sorted(row for batches in dealt for batch in batches for row in batch if row != PADDING)
    assert rows == list(range(n_rows if limit is None else min(n_rows, limit * batch_size)))


class Numbers(Rows):
    """Rows whose tokens are their index."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return {"input_ids": torch.full((3,), index), "labels": torch.full((3,), index + 1)}


def test_padding_has_no_labels():
    rows = PaddedRows(Numbers(1))
    assert rows[0]["labels"].tolist() == [1, 1, 1]
    assert rows[PADDING]["labels"].tolist() == [-100, -100, -100]
    assert rows[PADDING]["input_ids"].tolist() == [0, 0, 0]
    assert rows[0]["labels"].tolist() == [1, 1, 1], "the row itself is as it was"


def test_the_rows_of_a_step_become_its_micro_batches_in_order():
    rows = Numbers(9)
    made = collate_micro_batches([rows[i] for i in (5, 2, 7, 1, 8, 3)], batch_size=2)
    assert [batch["input_ids"][:, 0].tolist() for batch in made] == [[5, 2], [7, 1], [8, 3]]
    assert all(batch["labels"].shape == (2, 3) for batch in made)


class Source:
    """As much of a data module as the loaders look at."""

    def train_dataset(self):
        return Numbers(20)

    def val_datasets(self):
        return {"valid": Numbers(5), "held_out": Numbers(2)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_batch_is_the_list_of_a_steps_micro_batches(workers):
    config = TrainerConfig(batch_size=2, accumulate=3, num_workers=workers)
    loaders = Loaders(Source(), config, seed=4, step=7, world=World(rank=1, devices=2))
    expected = Steps(4, 20, 2, 3, start=7, rank=1, ranks=2)
    for step, batches in zip(range(7, 10), loaders.train_dataloader(), strict=False):
        assert [batch["input_ids"].shape for batch in batches] == [(2, 3)] * 3
        assert torch.cat([batch["input_ids"][:, 0] for batch in batches]).tolist() == expected.rows(step)
    old = Loaders(Source(), config, 4, 7, World(rank=1, devices=2), order=1).train_dataloader()
    rows = torch.cat([batch["input_ids"][:, 0] for batch in next(iter(old))]).tolist()
    assert rows == Steps(4, 20, 2, 3, rank=1, ranks=2, order=1).rows(7) != expected.rows(7)


def test_validation_has_a_loader_for_each_split():
    config = TrainerConfig(batch_size=2, accumulate=3)
    loaders = Loaders(Source(), config, seed=4, step=0, world=World()).val_dataloader()
    rows = [[i for batch in loader for i in batch["input_ids"][:, 0].tolist()] for loader in loaders]
    assert rows == [[0, 1, 2, 3, 4], [0, 1]]
    config.val_batches = 1
    first, _ = Loaders(Source(), config, seed=4, step=0, world=World()).val_dataloader()
    assert [batch["input_ids"][:, 0].tolist() for batch in first] == [[0, 1]]


def test_making_an_iterator_draws_no_random_number():
    loaders = Loaders(Source(), TrainerConfig(), seed=4, step=0, world=World())
    before = torch.get_rng_state()
    next(iter(loaders.train_dataloader()))
    next(iter(loaders.val_dataloader()[0]))
    assert torch.equal(torch.get_rng_state(), before)
