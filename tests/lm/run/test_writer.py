"""Writing in the background and by several ranks: whole or absent, whenever it is killed; failures known to all."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from mixerlab import sealed
from mixerlab.lm.run.checkpoint import CheckpointError, Checkpoints, find_damage, read, read_meta, save
from mixerlab.lm.run.writer import Writer
from ranks import Ranks


def state(step):
    return {
        "global_step": step,
        "state_dict": {f"w{i}": torch.full((7, 300), float(step + i)) for i in range(5)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": []}],
    }


def assert_is(folder, step):
    assert find_damage(folder) is None
    found, expected = read(folder), state(step)
    assert found["global_step"] == step
    assert all(torch.equal(found["state_dict"][name], w) for name, w in expected["state_dict"].items())
    assert float(found["optimizer_states"][0]["state"][0]["step"]) == step


def killed_at(stage, folder):
    """A child that is killed (kill -9) at one of the stages of writing step 20 in the background."""

    def child():
        passed = [0]

        def staged(function, whole=True):
            def wrapped(*args, **kwargs):
                if passed[0] == stage:
                    if not whole:
                        args[1].write(b"half a file")
                        args[1].flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                passed[0] += 1
                return function(*args, **kwargs)

            return wrapped

        torch.save = staged(torch.save, whole=False)
        sealed.Summed.write = staged(sealed.Summed.write)
        sealed.sync, os.fsync = staged(sealed.sync), staged(os.fsync)
        Path.rename, Path.replace = staged(Path.rename), staged(Path.replace)
        writer = Writer(background=True, after=lambda: Checkpoints(folder).prune(1))
        writer.save(state(20), Checkpoints(folder).at(20))
        writer.wait()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_a_kill_at_any_stage_of_a_write_in_the_background_leaves_the_one_before_or_both(tmp_path):
    stage, found = 0, set()
    while True:
        checkpoints = Checkpoints(tmp_path / str(stage))
        save(state(10), checkpoints.at(10))
        was_killed = killed_at(stage, checkpoints.folder)
        assert all(find_damage(folder) is None for folder in checkpoints.all())
        last = checkpoints.last()
        assert_is(last, int(last.name[5:]))
        found.add(last.name)
        save(state(30), checkpoints.at(30))  # over what was left
        checkpoints.prune(1)
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000030"]
        if not was_killed:
            break
        stage += 1
    assert stage > 12
    assert found == {"step-00000010", "step-00000020"}


def test_a_state_that_all_ranks_hold_is_divided_among_them_and_read_as_one(tmp_path):
    folder = tmp_path / "step-00000010"
    ranks = Ranks(3)
    writers = [Writer(rank, 3, ranks.gather_of(rank), background=True) for rank in range(3)]
    for step in (10, 20, 30):
        folder = tmp_path / f"step-000000{step}"
        for writer in writers:
            writer.save(state(step), folder)
    for writer in writers:
        writer.wait()
    assert list(read_meta(folder)["files"]) == [f"shard-{n}-of-3.ckpt" for n in range(3)]
    sizes = [size for size, _ in read_meta(folder)["files"].values()]
    assert max(sizes) < 0.5 * sum(sizes)
    for step in (10, 20, 30):
        assert_is(tmp_path / f"step-000000{step}", step)


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_on_one_rank_is_raised_on_all_alike(tmp_path, monkeypatch, background):
    write, after = torch.save, []

    def full(tree, file):
        if "shard-1-of-2" in file._file.name:
            raise OSError(28, "No space left on device")
        write(tree, file)

    def work(rank, gather):
        writer = Writer(rank, 2, gather, background, after=lambda: after.append(rank))
        writer.save(state(10), tmp_path / "step-00000010")
        writer.wait()
        writer.save(state(20), tmp_path / "step-00000020")
        assert background  # else it has raised
        with pytest.raises(CheckpointError):
            writer.save(state(30), tmp_path / "step-00000030")
        assert writer.failed
        writer.wait()

    checkpoints = Checkpoints(tmp_path)
    Ranks(2).run(lambda rank, gather: save(state(10), checkpoints.at(10), rank, 2, gather))
    monkeypatch.setattr(
        torch, "save", lambda tree, file: (full if "20.tmp" in file._file.name else write)(tree, file)
    )
    errors = Ranks(2).run(work)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])
    assert "step-00000020 cannot be written by rank 1: [Errno 28] No space left on device" in str(errors[0])
    assert after == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_rank_that_fails_in_any_way_leaves_no_other_waiting(tmp_path):
    def work(rank, gather):
        odd = {"state": lambda: 0} if rank else {}  # no pickle of that
        save({**state(10), "more": odd, "state_dict": {}}, tmp_path / "step-00000010", rank, 2, gather)

    written = Ranks(2).run(lambda rank, gather: save(state(10), tmp_path / "step-00000010", rank, 2, gather))
    assert written == [None, None]

    def breaks(tree, file):
        raise TypeError("cannot pickle that")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "save", breaks)
        errors = Ranks(2).run(work)
    assert all("cannot pickle that" in str(error) for error in errors)


def test_a_disk_that_is_full_in_the_midst_of_a_file_is_an_error_like_any_other(tmp_path, monkeypatch):
    class Full(sealed.Summed):
        def __init__(self, path, sign):
            super().__init__(path, sign)
            self._file.close()
            self._file = open("/dev/full", "wb")  # noqa: SIM115

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    save(state(10), tmp_path / "step-00000010")
    monkeypatch.setattr(sealed, "Summed", Full)
    big = {"global_step": 20, "state_dict": {"w": torch.zeros(3_000_000)}}
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(big, tmp_path / "step-00000020")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_the_memory_of_the_copy_is_kept_for_the_next(tmp_path):
    writer = Writer(background=True)
    for step in (10, 20):
        writer.save(state(step), tmp_path / f"step-000000{step}")
        kept = {path: buffer.data_ptr() for path, buffer in writer._buffers._kept.items()}
        if step == 10:
            first = kept
    writer.wait()
    assert kept == first
    assert_is(tmp_path / "step-00000010", 10)
    assert_is(tmp_path / "step-00000020", 20)


def test_a_failed_rank_does_not_wait_forever_for_others_to_agree(tmp_path, monkeypatch):
    monkeypatch.setattr("mixerlab.lm.run.writer.PATIENCE", 0.3)
    ranks = Ranks(2)  # of which the other has gone
    ranks._barrier = __import__("threading").Barrier(2, timeout=5)
    writer = Writer(0, 2, ranks.gather_of(0), background=True)
    writer.save(state(10), tmp_path / "step-00000010")
    writer.let_finish()
    assert writer._thread.is_alive()
    ranks._barrier.abort()


def test_a_waiting_rank_gives_signs_of_life_while_it_writes_and_not_while_it_trains(tmp_path):
    signs: list[str] = []
    Writer(report=signs.append).save(state(10), tmp_path / "step-00000010")
    assert set(signs) == {"writing a checkpoint"}
    signs.clear()
    writer = Writer(background=True, report=signs.append)
    writer._waits = False
    writer._sign()
    assert signs == []
