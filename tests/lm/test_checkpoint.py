"""Checkpoint folders: whole or refused by name, one file or shards, converted without loss."""

import errno
import json
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixerlab.lm.checkpoint import (
    CheckpointError,
    Pieces,
    best_checkpoint,
    convert,
    find_damage,
    folder_of,
    last_checkpoint,
    list_checkpoints,
    main,
    named_checkpoint,
    note_validation,
    prune,
    read,
    read_meta,
    rows_of_shard,
    save,
)

from mixerlab.lm import checkpoint as module


def state(step, valid_loss=None):
    """As small as a Lightning checkpoint can be: weights, optimiser state with a scalar, counters."""
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a": torch.randn(5, 3, generator=generator),
        "b": torch.randn(1, generator=generator),
        "c": torch.randn(2, 2, 2, generator=generator).bfloat16(),
    }
    moments = {
        n: {"step": torch.tensor(float(step)), "exp_avg": w.float() * 2}
        for n, w in enumerate(weights.values())
    }
    return {
        "global_step": step,
        "valid_loss": valid_loss,
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}],
        "loops": {"fit_loop": {"epoch": 0, "done": [1, 2, (3, "x")]}},
        "recipe": {"model": {"d_model": 8}},
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture
def run(tmp_path):
    for step, loss in ((10, 3.0), (20, 2.0), (30, None), (40, 2.5)):
        save(state(step, loss), folder_of(tmp_path, step))
    return tmp_path


def test_what_is_read_is_what_was_saved(run):
    assert_same(read(folder_of(run, 20)), state(20, 2.0))
    assert read_meta(folder_of(run, 20))["recipe"] == {"model": {"d_model": 8}}


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 12])
def test_shards_and_one_file_hold_the_same(run, shards):
    folder = folder_of(run, 20)
    convert(folder, shards)
    assert len(read_meta(folder)["files"]) == shards
    assert_same(read(folder), state(20, 2.0))
    assert best_checkpoint(run) == folder, "the validation loss is kept"
    convert(folder, None)
    assert list(read_meta(folder)["files"]) == ["state.ckpt"]
    assert_same(read(folder), state(20, 2.0))
    assert find_damage(folder) is None


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


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "bit-flipped": (flip, "the checksum of"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("layout", ["one file", "shards"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, caplog, kind, layout):
    folder = folder_of(run, 40)
    if layout == "shards":
        convert(folder, 3)
    damage, said = DAMAGES[kind]
    name = "state.ckpt" if layout == "one file" else "shard-1-of-3.ckpt"
    damage(folder / name)
    problem = find_damage(folder)
    assert name in problem
    assert said in problem
    assert last_checkpoint(run) == folder_of(run, 30)
    assert f"checkpoint {folder} is damaged: " in caplog.text
    with pytest.raises(CheckpointError, match=name):
        named_checkpoint(run, "40")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"files": {}}'])
def test_a_checkpoint_without_a_list_of_its_files_is_damaged(run, content):
    path = folder_of(run, 40) / "meta.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert "meta.json" in find_damage(folder_of(run, 40))
    assert last_checkpoint(run) == folder_of(run, 30)
    assert best_checkpoint(run) == folder_of(run, 20)


@pytest.mark.parametrize("key", ["global_step", "valid_loss", "rows_per_step"])
def test_a_changed_number_in_the_list_is_damage(run, key):
    path = folder_of(run, 40) / "meta.json"
    path.write_text(re.sub(rf'"{key}": [^,]+', f'"{key}": 18', path.read_text()))
    assert "the checksum of meta.json is wrong" in find_damage(folder_of(run, 40))
    assert last_checkpoint(run) == folder_of(run, 30)


def test_a_validation_is_added_to_a_checkpoint_that_was_written_before_it(run):
    note_validation(folder_of(run, 30), 1.5, {"valid/loss": 1.5})
    assert best_checkpoint(run) == folder_of(run, 30)
    assert read(folder_of(run, 30))["metrics"] == {"valid/loss": 1.5}
    assert find_damage(folder_of(run, 30)) is None


def test_a_crash_while_a_checkpoint_is_replaced_loses_none(run, monkeypatch):
    class Crash(BaseException):
        pass

    rename, renames = module.Path.rename, []

    def crash_at_the_second(path, target):
        renames.append(path)
        if len(renames) == 2:
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(module.Path, "rename", crash_at_the_second)
        with pytest.raises(Crash):
            convert(folder_of(run, 40), 2)
    assert last_checkpoint(run) == folder_of(run, 40)
    assert_same(read(folder_of(run, 40)), state(40, 2.5))


def test_a_mix_of_shards_of_two_steps_is_refused_by_name(run):
    for step in (30, 40):
        convert(folder_of(run, step), 2)
    shutil.copy(folder_of(run, 30) / "shard-1-of-2.ckpt", folder_of(run, 40) / "shard-1-of-2.ckpt")
    problem = find_damage(folder_of(run, 40))
    assert "shard-0-of-2.ckpt is of step 40, shard-1-of-2.ckpt is of step 30" in problem


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    folder_of(run, 40).rename(folder_of(run, 50))
    assert "it was made as step-00000040" in find_damage(folder_of(run, 50))
    assert last_checkpoint(run) == folder_of(run, 30)


def test_a_run_all_of_whose_checkpoints_are_damaged_is_refused(run):
    for folder in list_checkpoints(run):
        truncate(folder / "state.ckpt")
    with pytest.raises(CheckpointError, match=r"step-00000040 is damaged.*start a new one"):
        last_checkpoint(run)


def test_the_newest_and_the_best_are_kept(run):
    prune(run, keep=1)
    assert list_checkpoints(run) == [folder_of(run, 20), folder_of(run, 40)]


def test_a_write_that_fails_leaves_what_was_there(run, monkeypatch):
    def full(tree, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for step in (40, 50):
        with pytest.raises(CheckpointError, match=r"No space left on device \(.* GB are free"):
            save(state(step), folder_of(run, step))
    assert last_checkpoint(run) == folder_of(run, 40)
    assert all(find_damage(folder) is None for folder in list_checkpoints(run))
    assert not list((run / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize("instant", ["torch.save", "meta.json", "rename"])
def test_a_crash_while_writing_leaves_the_one_before(run, monkeypatch, instant):
    class Crash(BaseException):
        pass

    def crash(*args, **kwargs):
        raise Crash

    with monkeypatch.context() as patched:
        if instant == "torch.save":
            patched.setattr(torch, "save", crash)
        elif instant == "meta.json":
            patched.setattr(json, "dumps", crash)
        else:
            patched.setattr(module.Path, "rename", crash)
        with pytest.raises(Crash):
            save(state(50), folder_of(run, 50))
    assert last_checkpoint(run) == folder_of(run, 40)
    save(state(50), folder_of(run, 50))  # over what the crash left
    assert_same(read(named_checkpoint(run, "last")), state(50))


def test_nothing_but_plain_data_is_unpickled(run):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"global_step": 40, "state_dict": Evil()}, folder_of(run, 40) / "state.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(folder_of(run, 40))


def test_the_command_lists_checks_and_converts(run, capsys):
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-00000020: one file, 0.0 MB, whole, validation loss 2.0000, the best\n" in out
    assert main([str(run), "--to", "sharded", "--shards", "3", "--checkpoint", "best"]) == 0
    assert "step-00000020: 3 shards" in capsys.readouterr().out
    assert main([str(run), "--to", "one-file", "--checkpoint", "20"]) == 0
    assert "step-00000020: one file" in capsys.readouterr().out
    truncate(folder_of(run, 20) / "state.ckpt")
    assert main([str(run)]) == 1
    assert "step-00000020: damaged: state.ckpt has" in capsys.readouterr().out
    assert main([str(run), "--to", "one-file", "--checkpoint", "20"]) == 2
    assert main([str(run / "nowhere")]) == 2
    assert "has no checkpoints/step-*" in capsys.readouterr().err
