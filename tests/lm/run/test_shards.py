"""Tensors in pieces: any rows can be read, and dividing and joining loses nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerlab.lm.run.shards import Pieces, cut, divided, is_cut, joined, rows_of_shard


@given(
    n_rows=st.integers(0, 50),
    shards=st.integers(1, 9),
    cuts=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_any_rows_can_be_read_from_shards_and_no_others_are(n_rows, shards, cuts):
    whole = torch.arange(n_rows * 2).view(n_rows, 2)
    bounds = [rows_of_shard(n_rows, shard, shards) for shard in range(shards)]
    assert [whole[a:b].tolist() for a, b in bounds] == [c.tolist() for c in whole.chunk(shards)] + [[]] * (
        shards - len(whole.chunk(shards))
    ), "as torch.chunk, which FSDP2 uses"
    opened = []

    def part(number):
        opened.append(number)
        return whole[slice(*bounds[number])]

    pieces = Pieces([a for a, _ in bounds], (n_rows, 2), part)
    first, last = sorted(min(cut, n_rows) for cut in cuts)
    assert torch.equal(pieces.rows(first, last), whole[first:last])
    needed = [n for n, (a, b) in enumerate(bounds) if max(a, first) < min(b, last)]
    assert opened == (needed or [0])


def tree():
    return {
        "global_step": 7,
        "state_dict": {
            "a": torch.arange(10).view(5, 2),
            "scalar": torch.tensor(3.0),
            "none": torch.ones(0, 3),
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.arange(5)}}, "param_groups": [{"lr": 0.1}]}],
        "counts": torch.arange(4),
        "notes": [("a", 1), None],
    }


@pytest.mark.parametrize("files", [1, 2, 3, 8, 40])
def test_files_joined_are_the_tree_that_was_cut(files):
    parts = [cut(tree(), n, files) for n in range(files)]
    assert is_cut(parts[0])
    assert all(part["global_step"] == 7 for part in parts), "by which a file of another step is known"
    whole = joined(parts, whole=True)
    assert list(whole) == list(tree())
    assert torch.equal(whole["state_dict"]["a"], tree()["state_dict"]["a"])
    assert whole["state_dict"]["none"].shape == (0, 3)
    assert torch.equal(whole["optimizer_states"][0]["state"][0]["exp_avg"], torch.arange(5))
    assert whole["optimizer_states"][0]["param_groups"] == [{"lr": 0.1}]
    assert whole["notes"] == tree()["notes"]
    pieces = joined(parts, whole=False)["state_dict"]["a"]
    assert isinstance(pieces, Pieces)
    assert pieces.shape == (5, 2)


def test_the_bytes_are_dealt_out_in_order_so_that_most_tensors_are_whole_in_one_file():
    state = {"global_step": 1, "state_dict": {f"w{i}": torch.full((6, 2), float(i)) for i in range(5)}}
    parts = [cut(state, n, 2) for n in range(2)]
    rows = [[len(leaf["rows"]) if leaf else 0 for leaf in part["state_dict"].values()] for part in parts]
    assert rows == [[6, 6, 3, 0, 0], [0, 0, 3, 6, 6]]
    whole = joined(parts, whole=True)["state_dict"]
    assert all(torch.equal(whole[name], value) for name, value in state["state_dict"].items())
    storage = parts[0]["state_dict"]["w0"]["rows"].untyped_storage()
    assert whole["w0"].untyped_storage().data_ptr() == storage.data_ptr(), "not copied"


@given(rows=st.lists(st.integers(0, 20), max_size=9), files=st.integers(1, 12))
def test_however_a_state_is_dealt_out_each_row_is_in_one_file(rows, files):
    state = {"state_dict": {str(i): torch.arange(2 * n).view(n, 2) for i, n in enumerate(rows)}}
    parts = [cut(state, n, files) for n in range(files)]
    whole = joined(parts, whole=True)["state_dict"]
    assert all(torch.equal(whole[name], value) for name, value in state["state_dict"].items())
    sizes = [sum(len(leaf["rows"]) for leaf in part["state_dict"].values() if is_cut(leaf)) for part in parts]
    assert sum(sizes) == sum(rows)
    assert max(sizes) - min(sizes) <= 1


def test_files_of_older_versions_have_as_many_rows_each_and_do_not_say_where_they_start():
    whole = torch.arange(14).view(7, 2)
    bounds = [rows_of_shard(7, n, 3) for n in range(3)]
    parts = [
        {"state_dict": {"a": {"sharded": True, "start": a, "shape": [7, 2], "rows": whole[a:b]}}}
        for a, b in bounds
    ]
    assert torch.equal(joined(parts, whole=True)["state_dict"]["a"], whole)


def test_only_weights_and_optimiser_state_are_cut():
    first, second = (cut(tree(), n, 2) for n in range(2))
    assert first["state_dict"]["a"]["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert second["state_dict"]["a"]["rows"].tolist() == [[8, 9]]
    assert second["state_dict"]["a"]["start"] == 4
    assert torch.equal(first["counts"], torch.arange(4))
    assert second["counts"] is None
    assert second["state_dict"]["scalar"] is None


def test_the_state_of_one_process_is_not_cut_and_keeps_its_structure():
    kept = []

    def keep(path, tensor):
        kept.append(path)
        return tensor.clone()

    number, files, own = divided(tree(), keep)
    assert (number, files) == (0, None)
    assert not is_cut(own)
    assert torch.equal(own["state_dict"]["a"], tree()["state_dict"]["a"])
    assert own["notes"] == tree()["notes"]
    assert ("optimizer_states", 0, "state", 0, "exp_avg") in kept


def test_each_of_several_ranks_that_hold_the_same_has_a_part():
    parts = [divided(tree(), lambda _, tensor: tensor, rank, 3) for rank in range(3)]
    assert [(number, files) for number, files, _ in parts] == [(0, 3), (1, 3), (2, 3)]
    whole = joined([part for _, _, part in parts], whole=True)
    assert torch.equal(whole["state_dict"]["a"], tree()["state_dict"]["a"])


@pytest.mark.parametrize("starts", [[0], [0, 9], [1, 2], [0, -1], [0, "x"]])
def test_rows_that_begin_where_they_cannot_are_refused(starts):
    parts = [cut(tree(), n, 2) for n in range(2)]
    parts[0]["state_dict"]["a"]["starts"] = starts
    with pytest.raises((ValueError, TypeError)):
        joined(parts, whole=True)


def test_rows_of_another_shape_than_the_first_file_says_are_refused():
    parts = [cut(tree(), n, 2) for n in range(2)]
    parts[1]["state_dict"]["a"]["rows"] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="file 1 has rows of shape"):
        joined(parts, whole=True)
