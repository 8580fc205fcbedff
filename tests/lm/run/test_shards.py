"""Tensors in pieces: any rows can be read, and cutting and joining loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerlab.lm.run.shards import Pieces, cut, is_cut, joined, own_rows, rows_of_shard, shard_of


@given(
    n_rows=st.integers(0, 50),
    shards=st.integers(1, 9),
    cuts=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_any_rows_can_be_read_from_shards(n_rows, shards, cuts):
    whole = torch.arange(n_rows * 2).view(n_rows, 2)
    bounds = [rows_of_shard(n_rows, shard, shards) for shard in range(shards)]
    assert [whole[a:b].tolist() for a, b in bounds] == [c.tolist() for c in whole.chunk(shards)] + [[]] * (
        shards - len(whole.chunk(shards))
    ), "as torch.chunk, which FSDP2 uses"
    pieces = Pieces([(a, whole[a:b]) for a, b in bounds], (n_rows, 2))
    first, last = sorted(min(cut, n_rows) for cut in cuts)
    assert torch.equal(pieces.rows(first, last), whole[first:last])


def tree():
    return {
        "global_step": 7,
        "state_dict": {"a": torch.arange(10).view(5, 2), "scalar": torch.tensor(3.0)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.arange(5)}}, "param_groups": [{"lr": 0.1}]}],
        "counts": torch.arange(4),
        "notes": [("a", 1), None],
    }


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_files_joined_are_the_tree_that_was_cut(shards):
    files = [cut(tree(), n, shards) for n in range(shards)]
    assert all(is_cut(file) for file in files)
    assert all(file["global_step"] == 7 for file in files), "by which a file of another step is known"
    whole = joined(files, whole=True)
    assert list(whole) == list(tree())
    assert torch.equal(whole["state_dict"]["a"], tree()["state_dict"]["a"])
    assert torch.equal(whole["optimizer_states"][0]["state"][0]["exp_avg"], torch.arange(5))
    assert whole["optimizer_states"][0]["param_groups"] == [{"lr": 0.1}]
    assert whole["notes"] == tree()["notes"]
    pieces = joined(files, whole=False)["state_dict"]["a"]
    assert isinstance(pieces, Pieces)
    assert pieces.shape == (5, 2)


def test_only_weights_and_optimiser_state_are_cut():
    first, second = (cut(tree(), n, 2) for n in range(2))
    assert first["state_dict"]["a"]["rows"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert second["state_dict"]["a"]["rows"].tolist() == [[6, 7], [8, 9]]
    assert second["state_dict"]["a"]["start"] == 3
    assert torch.equal(first["counts"], torch.arange(4))
    assert second["counts"] is None
    assert second["state_dict"]["scalar"] is None


def test_a_whole_tree_is_not_cut_and_has_no_shard():
    assert not is_cut(tree())
    assert shard_of(tree()) is None
    own = own_rows(tree(), first=True)
    assert torch.equal(own["state_dict"]["a"], tree()["state_dict"]["a"])
    assert own_rows(tree(), first=False)["counts"] is None
