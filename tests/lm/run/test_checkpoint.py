"""Checkpoint folders: whole or refused by name, one file or shards, resharded without loss."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from mixerlab import sealed
from mixerlab.lm.run.checkpoint import (
    CheckpointError,
    Checkpoints,
    find_damage,
    note_validation,
    read,
    read_meta,
    reshard,
    save,
    step_of,
)
from ranks import Ranks


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
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints")
    for step, loss in ((10, 3.0), (20, 2.0), (30, None), (40, 2.5)):
        save(state(step, loss), made.at(step))
    return made


def test_what_is_read_is_what_was_saved(checkpoints):
    assert_same(read(checkpoints.at(20)), state(20, 2.0))
    assert read_meta(checkpoints.at(20))["recipe"] == {"model": {"d_model": 8}}


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 12])
def test_shards_and_one_file_hold_the_same(checkpoints, shards):
    folder = checkpoints.at(20)
    reshard(folder, shards)
    assert len(read_meta(folder)["files"]) == shards
    assert_same(read(folder), state(20, 2.0))
    assert checkpoints.best() == folder, "the validation loss is kept"
    reshard(folder, None)
    assert list(read_meta(folder)["files"]) == ["state.ckpt"]
    assert_same(read(folder), state(20, 2.0))
    assert find_damage(folder) is None


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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(checkpoints, caplog, kind, layout):
    folder = checkpoints.at(40)
    if layout == "shards":
        reshard(folder, 3)
    damage, said = DAMAGES[kind]
    name = "state.ckpt" if layout == "one file" else "shard-1-of-3.ckpt"
    damage(folder / name)
    problem = find_damage(folder)
    assert name in problem
    assert said in problem
    assert checkpoints.last() == checkpoints.at(30)
    assert f"checkpoint {folder} is damaged: " in caplog.text
    with pytest.raises(CheckpointError, match=name):
        checkpoints.named("40")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"files": {}}'])
def test_a_checkpoint_without_a_list_of_its_files_is_damaged(checkpoints, content):
    path = checkpoints.at(40) / "meta.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert "meta.json" in find_damage(checkpoints.at(40))
    assert checkpoints.last() == checkpoints.at(30)
    assert checkpoints.best() == checkpoints.at(20)


@pytest.mark.parametrize("key", ["global_step", "valid_loss", "rows_per_step"])
def test_a_changed_number_in_the_list_is_damage(checkpoints, key):
    path = checkpoints.at(40) / "meta.json"
    path.write_text(re.sub(rf'"{key}": [^,]+', f'"{key}": 18', path.read_text()))
    assert "the checksum of meta.json is wrong" in find_damage(checkpoints.at(40))
    assert checkpoints.last() == checkpoints.at(30)


def test_a_validation_is_added_to_a_checkpoint_that_was_written_before_it(checkpoints):
    note_validation(checkpoints.at(30), 1.5, {"valid/loss": 1.5})
    assert checkpoints.best() == checkpoints.at(30)
    assert read(checkpoints.at(30))["metrics"] == {"valid/loss": 1.5}
    assert find_damage(checkpoints.at(30)) is None


def test_a_crash_while_a_checkpoint_is_replaced_loses_none(checkpoints, monkeypatch):
    class Crash(BaseException):
        pass

    rename, renames = Path.rename, []

    def crash_at_the_second(path, target):
        renames.append(path)
        if len(renames) == 2:
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash_at_the_second)
        with pytest.raises(Crash):
            reshard(checkpoints.at(40), 2)
    assert checkpoints.last() == checkpoints.at(40)
    assert_same(read(checkpoints.at(40)), state(40, 2.5))


def test_a_mix_of_shards_of_two_steps_is_refused_by_name(checkpoints):
    for step in (30, 40):
        reshard(checkpoints.at(step), 2)
    shutil.copy(checkpoints.at(30) / "shard-1-of-2.ckpt", checkpoints.at(40) / "shard-1-of-2.ckpt")
    problem = find_damage(checkpoints.at(40))
    assert "shard-0-of-2.ckpt is of step 40, shard-1-of-2.ckpt is of step 30" in problem


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoints):
    checkpoints.at(40).rename(checkpoints.at(50))
    assert "it was made as step-00000040" in find_damage(checkpoints.at(50))
    assert checkpoints.last() == checkpoints.at(30)


def test_a_run_all_of_whose_checkpoints_are_damaged_is_refused(checkpoints):
    for folder in checkpoints.all():
        truncate(folder / "state.ckpt")
    with pytest.raises(CheckpointError, match=r"step-00000040 is damaged.*start a new one"):
        checkpoints.last()


def test_the_newest_and_the_best_are_kept(checkpoints):
    checkpoints.prune(keep=1)
    assert checkpoints.all() == [checkpoints.at(20), checkpoints.at(40)]


def test_a_write_that_fails_leaves_what_was_there(checkpoints, monkeypatch):
    def full(tree, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for step in (40, 50):
        with pytest.raises(CheckpointError, match=r"No space left on device \(.* GB are free"):
            save(state(step), checkpoints.at(step))
    assert checkpoints.last() == checkpoints.at(40)
    assert all(find_damage(folder) is None for folder in checkpoints.all())
    assert not list(checkpoints.folder.glob("*.tmp"))


@pytest.mark.parametrize("instant", ["torch.save", "meta.json", "rename"])
def test_a_crash_while_writing_leaves_the_one_before(checkpoints, monkeypatch, instant):
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
            patched.setattr(Path, "rename", crash)
        with pytest.raises(Crash):
            save(state(50), checkpoints.at(50))
    assert checkpoints.last() == checkpoints.at(40)
    save(state(50), checkpoints.at(50))  # over what the crash left
    assert_same(read(checkpoints.named("last")), state(50))


def test_nothing_but_plain_data_is_unpickled(checkpoints):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"global_step": 40, "state_dict": Evil()}, checkpoints.at(40) / "state.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(checkpoints.at(40))


def test_checkpoints_after_the_last_whole_one_are_set_aside(checkpoints):
    truncate(checkpoints.at(40) / "state.ckpt")
    last = checkpoints.last()
    checkpoints.set_aside_after(step_of(last))
    assert [step_of(folder) for folder in checkpoints.all()] == [10, 20, 30]
    assert (checkpoints.folder / "step-00000040.damaged").is_dir()
    save(state(40), checkpoints.at(40))
    truncate(checkpoints.at(40) / "state.ckpt")
    checkpoints.set_aside_after(30)  # over what was set aside before
    assert [step_of(folder) for folder in checkpoints.all()] == [10, 20, 30]


def test_the_number_of_a_step_may_outgrow_its_eight_digits(checkpoints):
    save(state(123_456_789), checkpoints.at(123_456_789))
    assert [step_of(folder) for folder in checkpoints.all()] == [10, 20, 30, 40, 123_456_789]


def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next(checkpoints):
    for remains in ("step-00000050.tmp", "step-00000010.doomed"):
        (checkpoints.folder / remains).mkdir()
    assert [step_of(folder) for folder in checkpoints.all()] == [10, 20, 30, 40]
    checkpoints.prune(keep=4)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        f"step-000000{n}0" for n in range(1, 5)
    ]


def test_checkpoints_have_names(checkpoints):
    assert checkpoints.named("last") == checkpoints.at(40)
    assert checkpoints.named("best") == checkpoints.at(20)
    assert checkpoints.named("10") == checkpoints.at(10)
    for name in ("11", "first"):
        with pytest.raises(
            CheckpointError, match="no such checkpoint; that run has checkpoints of steps 10, 20"
        ):
            checkpoints.named(name)


def test_without_any_checkpoint_there_is_no_last_and_no_best(tmp_path):
    empty = Checkpoints(tmp_path)
    assert empty.last() is empty.best() is None
    with pytest.raises(CheckpointError, match=r"'last' of .*: no such checkpoint; that run has none"):
        empty.named("last")


def test_none_is_best_where_none_was_validated(tmp_path):
    unmeasured = Checkpoints(tmp_path)
    save(state(10), unmeasured.at(10))
    assert unmeasured.best() is None
    with pytest.raises(CheckpointError, match="none was validated; that run has checkpoints of steps 10"):
        unmeasured.named("best")


def test_the_recipe_in_the_list_of_files_has_the_names_of_today(checkpoints):
    old = {
        **state(50),
        "recipe": {"model": {"mlp_width": 64, "mixer": [{"name": "mamba2", "head_width": 8}]}},
    }
    save(old, checkpoints.at(50))
    model = read_meta(checkpoints.at(50))["recipe"]["model"]
    assert model == {"mlp_dim": 64, "mixer": [{"name": "mamba2", "head_dim": 8}]}


def test_where_one_rank_cannot_write_all_ranks_raise_the_same(checkpoints, monkeypatch):
    def save_as(rank, outcomes):
        """`outcomes(own)` are those of all ranks."""
        with pytest.raises(CheckpointError) as caught:
            save(state(50), checkpoints.at(50), rank, ranks=2, gather=outcomes)
        return str(caught.value)

    full = (None, "No space left on device")
    said = [save_as(0, lambda own: [own, full]), save_as(1, lambda own: [own, full])]
    assert said[0] == said[1]
    assert "step-00000050 cannot be written by rank 1: No space left on device" in said[0]
    assert not checkpoints.at(50).exists()


def test_a_file_that_is_already_as_it_should_be_is_not_touched(checkpoints):
    path = checkpoints.at(20) / sealed.META
    before = path.stat()
    note_validation(checkpoints.at(20), 2.0, None)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_ranks_share_out_what_is_verified_and_agree(checkpoints, monkeypatch, caplog):
    for step in (30, 40):
        reshard(checkpoints.at(step), 4)
    read_by: dict[str, list[str]] = {}
    xxh3 = sealed.xxh3

    def noted(path, sign):
        read_by.setdefault(f"{path.parent.name}/{path.name}", []).append(path.name)
        return xxh3(path, sign)

    monkeypatch.setattr(sealed, "xxh3", noted)
    found = Ranks(2).run(lambda rank, gather: checkpoints.last(rank, 2, gather))
    assert found == [checkpoints.at(40)] * 2
    assert sorted(read_by) == [f"step-00000040/shard-{n}-of-4.ckpt" for n in range(4)]
    assert all(len(times) == 1 for times in read_by.values())
    flip(checkpoints.at(40) / "shard-3-of-4.ckpt")  # which rank 1 reads
    found = Ranks(2).run(lambda rank, gather: checkpoints.last(rank, 2, gather))
    assert found == [checkpoints.at(30)] * 2
    assert "step-00000040 is damaged: the checksum of shard-3-of-4.ckpt is wrong" in caplog.text
    for step in (10, 20, 30):
        folder = checkpoints.at(step)
        flip(next(folder.glob("*.ckpt")))
    errors = Ranks(2).run(lambda rank, gather: checkpoints.last(rank, 2, gather))
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])


def test_a_rank_opens_the_files_that_have_its_rows_and_no_others(checkpoints, monkeypatch):
    reshard(checkpoints.at(40), 7)
    opened = []
    load = torch.load

    def noted(path, **options):
        opened.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", noted)
    weights = read(checkpoints.at(40), whole=False)["state_dict"]
    assert opened == ["shard-0-of-7.ckpt"]
    assert torch.equal(weights["a"].rows(0, 1), state(40)["state_dict"]["a"][:1])
    assert opened == ["shard-0-of-7.ckpt"]
    weights["c"].rows(0, 2)
    assert len(opened) == 2


def test_a_checkpoint_of_an_older_version_has_a_crc_and_is_read_and_verified(checkpoints):
    folder = checkpoints.at(40)
    reshard(folder, 2)
    files = {name: sealed.size_and_checksum(folder / name) for name in read_meta(folder)["files"]}
    sealed.write_meta(folder, {**read_meta(folder), "files": files})
    assert find_damage(folder) is None
    assert_same(read(folder), state(40, 2.5))
    flip(folder / "shard-1-of-2.ckpt")
    assert "the checksum of shard-1-of-2.ckpt is wrong" in find_damage(folder)


def rewritten(folder, tree, name="state.ckpt", **meta):
    """A checkpoint whose checksums are right, whatever is in it."""
    torch.save(tree, folder / name)
    files = {name: sealed.size_and_checksum(folder / name)}
    sealed.write_meta(folder, {**sealed.read_meta(folder), "files": files, **meta})


ODD = {
    "a list": [1],
    "a tensor": torch.zeros(3),
    "no step": {"state_dict": {}},
    "another step": {"global_step": 7, "state_dict": {}},
    "no weights": {"global_step": 40},
    "weights that are none": {"global_step": 40, "state_dict": {"a": 3}},
    "names that are none": {"global_step": 40, "state_dict": {3: torch.zeros(3)}},
    "pieces of nothing": {"global_step": 40, "state_dict": {"a": {"sharded": True}}},
    "pieces of a text": {"global_step": 40, "state_dict": {"a": {"sharded": True, "shape": "x", "rows": 1}}},
    "rows of another shape": {
        "global_step": 40,
        "state_dict": {"a": {"sharded": True, "shape": [2**40], "rows": torch.zeros(3)}},
    },
}


@pytest.mark.parametrize("tree", ODD.values(), ids=ODD)
def test_a_state_of_another_structure_whose_checksum_is_right_is_refused_in_a_line(checkpoints, tree):
    rewritten(checkpoints.at(40), tree)
    assert find_damage(checkpoints.at(40)) is None
    with pytest.raises(CheckpointError, match=r"checkpoint .*40 is not what training writes: .") as caught:
        read(checkpoints.at(40))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"global_step": None}, "global_step = None"),
        ({"global_step": "x"}, "global_step = 'x'"),
        ({"valid_loss": "low"}, "valid_loss = 'low'"),
        ({"metrics": [1]}, "metrics = [1]"),
        ({"recipe": 3}, "recipe = 3"),
        ({"files": {"../step-00000030/state.ckpt": [1, 2]}}, "it names the files ../step"),
        ({"files": {"shard-0-of-2.ckpt": [1, 2]}}, "it names the files shard-0-of-2.ckpt"),
    ],
)
def test_a_list_of_files_of_another_structure_is_damage(checkpoints, meta, said):
    folder = checkpoints.at(40)
    sealed.write_meta(folder, {**sealed.read_meta(folder), **meta})
    with pytest.raises(CheckpointError, match="is not what training writes") as caught:
        read_meta(folder)
    assert said in str(caught.value)
    assert find_damage(folder) is not None
    assert checkpoints.last() == checkpoints.at(30)


def test_a_checkpoint_in_whose_replacement_a_process_was_killed_is_found_by_its_name(checkpoints):
    checkpoints.at(40).rename(checkpoints.folder / "step-00000040.old")
    assert checkpoints.named("40") == checkpoints.at(40)
    (checkpoints.folder / "step-00000030.old").mkdir()
    checkpoints.clear()
    assert len(list(checkpoints.folder.iterdir())) == len(checkpoints.all()) == 4
