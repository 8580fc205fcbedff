"""The order of rows: a function of the seed and the step alone."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerlab.data.module import Rows
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig
from mixerlab.lm.training.batches import (
    PADDING,
    Loaders,
    PaddedRows,
    Steps,
    ValidationBatches,
    collate_micro_batches,
    epoch_order,
)


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


@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_every_epoch_has_every_row_once(n_rows, batch_size):
    rows = [i for step in islice(Steps(3, n_rows, batch_size), 3 * n_rows) for i in step]
    for epoch in range(3):
        assert sorted(rows[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


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
