"""The order of rows: a function of the seed and the batch's number alone."""

from itertools import islice

import torch
from hypothesis import given
from hypothesis import strategies as st
from mixerlab.lm.batches import PADDING, Batches, PaddedRows, ValidationBatches, epoch_order

from mixerlab.data.module import Rows


@given(
    seed=st.integers(0, 2**31),
    n_rows=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    start=st.integers(0, 30),
)
def test_starting_later_gives_the_rest_of_the_same_batches(seed, n_rows, batch_size, start):
    whole = list(islice(Batches(seed, n_rows, batch_size), start + 5))
    assert list(islice(Batches(seed, n_rows, batch_size, start), 5)) == whole[start:]
    assert all(len(batch) == batch_size for batch in whole)


@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_every_epoch_has_every_row_once(n_rows, batch_size):
    rows = [i for batch in islice(Batches(3, n_rows, batch_size), 3 * n_rows) for i in batch]
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
    size = ranks * batch_size * accumulate
    whole = Batches(3, n_rows, size).batch(step)
    dealt = [
        row
        for k in range(step * accumulate, (step + 1) * accumulate)
        for rank in range(ranks)
        for row in Batches(3, n_rows, batch_size, 0, rank, ranks).batch(k)
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


def test_padding_has_no_labels():
    class One(Rows):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([2, 3])}

    rows = PaddedRows(One())
    assert rows[0]["labels"].tolist() == [2, 3]
    assert rows[PADDING]["labels"].tolist() == [-100, -100]
    assert rows[0]["labels"].tolist() == [2, 3], "the row itself is as it was"
