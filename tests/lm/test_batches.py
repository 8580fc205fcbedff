"""The order of rows: a function of the seed and the batch's number alone."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from lm.batches import Batches, epoch_order


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
