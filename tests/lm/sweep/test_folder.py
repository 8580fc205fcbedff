"""The folder of a sweep: what is in it, how far each point has come, and what may change."""

import fcntl
import json
import math

import pytest

from mixerlab.__main__ import main
from mixerlab.lm.run.folder import Run
from mixerlab.lm.sweep.folder import ENDED, Sweep, ended, how_far, last_line
from mixerlab.options import ConfigError
from mixerlab.sealed import write_noted
from sweeps import begun, fail, finish


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    read = Sweep.open(sweep.path)
    assert sweep.path == tmp_path / "runs" / "compare-sweep"
    assert (read.points, read.command) == (sweep.points, sweep.command)
    assert "seed: 1" in read.recipe_file("seed=1").read_text()


def test_the_same_points_may_be_begun_again_and_more_added(tmp_path):
    first = begun(tmp_path, "seed=0,1")
    assert begun(tmp_path, "seed=0,1").points == first.points
    assert list(begun(tmp_path, "seed=0,1,2").points) == ["seed=0", "seed=1", "seed=2"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_time=3h"],
        ["strategy.timeout=60"],
        ["trainer.num_workers=1"],
        ["strategy.devices=2", "trainer.batch_size=2"],  # as many rows a step
    ],
)
def test_where_and_how_long_it_trains_may_change(tmp_path, overrides):
    begun(tmp_path, "seed=0,1")
    begun(tmp_path, "seed=0,1", *overrides)


def test_another_number_of_rows_in_a_step_is_refused(tmp_path):
    begun(tmp_path, "seed=0,1")
    with pytest.raises(ConfigError, match="a step had 4 rows over all devices when it began, and now has 8"):
        begun(tmp_path, "seed=0,1", "strategy.devices=2")


def test_a_changed_recipe_is_refused_with_the_key(tmp_path):
    begun(tmp_path, "seed=0,1")
    with pytest.raises(
        ConfigError, match=r"the recipe has changed since it began: optim\.lr was 0\.001 and is now 0\.1"
    ) as e:
        begun(tmp_path, "seed=0,1", more="optim: {lr: 0.1}\n")
    assert "\n" not in str(e.value)


def test_a_point_that_is_gone_is_refused(tmp_path):
    begun(tmp_path, "seed=0,1")
    with pytest.raises(
        ConfigError, match="it has the point seed=1, which is not asked for now; start another"
    ):
        begun(tmp_path, "seed=0,2")


def test_runs_of_others_are_no_sweep_to_go_on_with(tmp_path):
    run = tmp_path / "runs" / "mine" / "20260101-0000"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("seed: 1\n")
    with pytest.raises(
        ConfigError, match=r"name = 'mine': .* has runs that are no sweep's; give another name="
    ):
        begun(tmp_path, "seed=0,1", "name=mine")


def test_a_sweep_that_another_process_trains_is_refused(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    with sweep.lock(), pytest.raises(ConfigError, match="another process is training it"):
        sweep.lock()


@pytest.mark.parametrize(("there", "found"), [(True, "it has no sweep.json"), (False, "no such folder")])
def test_a_folder_that_is_no_sweep_is_answered_in_a_line(tmp_path, there, found, capsys):
    folder = tmp_path / "no"
    if there:
        folder.mkdir()
    assert main(["report", str(folder)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: sweep {folder}: {found}; expected the folder that `mixerlab sweep` names\n"
    )


def test_a_damaged_sweep_is_answered_in_a_line(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    (sweep.path / "checksums.json").unlink()
    (sweep.path / "sweep.json").write_text(json.dumps({"points": 3}))
    with pytest.raises(ConfigError, match=r"its sweep\.json is damaged: "):
        Sweep.open(sweep.path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": 5},
        {"label": "../../elsewhere"},
        {"values": "x"},
        {"values": {"seed": [1]}},
        {"parameters": "abc"},
        {"row_flops": math.nan},
    ],
    ids=str,
)
def test_a_strangers_sweep_is_refused_in_a_line(tmp_path, wrong, capsys):
    sweep = begun(tmp_path, "seed=0,1")
    (sweep.path / "checksums.json").unlink()
    noted = json.loads((sweep.path / "sweep.json").read_text())
    noted["points"][0] |= wrong
    (sweep.path / "sweep.json").write_text(json.dumps(noted))
    assert main(["report", str(sweep.path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its sweep.json is damaged" in line


def test_the_recipe_of_a_strangers_point_imports_nothing(tmp_path, capsys, monkeypatch):
    sweep = begun(tmp_path, "seed=0,1")
    file = sweep.recipe_file("seed=0")
    write_noted(file, file.read_text().replace("plugins: []", "plugins: [evil]"))
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["train", str(file), "--print-config"]) == 2
    assert "--allow-plugins" in capsys.readouterr().err


def test_what_a_stranger_wrote_into_a_log_is_shown_as_text():
    assert last_line("step 1/2 · loss x\n\x1b[2Jgone\n") == "[2Jgone"
    assert how_far("step 1/2 · loss x\n") == (1, 2, None)


def test_a_damaged_recipe_of_a_point_is_answered_in_a_line(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    sweep.recipe_file("seed=0").write_text("seed: 3\n")
    with pytest.raises(ConfigError, match=r"seed=0\.yaml is not what was written there"):
        begun(tmp_path, "seed=0,1")


def test_how_far_a_point_has_come_is_what_lies_in_its_folder(tmp_path):
    sweep = begun(tmp_path, "seed=0,1,2,3,4")
    finish(sweep, "seed=0")
    fail(sweep, "seed=1", "stopped: the loss is nan")
    fail(sweep, "seed=2", "stopped: SIGTERM; a checkpoint is written", code=75)
    sweep.log_file("seed=3").write_text(
        "step 3/6 · loss 2.250 · 1.0k tokens/s\nstep 3/6 · valid accuracy 0.5\n"
    )
    with sweep.log_file("seed=3").open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        statuses = {label: sweep.status(label) for label in sweep.points}
    assert [status.state for status in statuses.values()] == [
        "finished",
        "failed",
        "interrupted",
        "running",
        "waiting",
    ]
    assert statuses["seed=1"].reason == "stopped: the loss is nan"
    assert (statuses["seed=3"].step, statuses["seed=3"].steps, statuses["seed=3"].loss) == (3, 6, 2.25)
    assert sweep.status("seed=3").state == "interrupted", "its lock has gone without a word"


def test_a_run_that_somebody_trains_by_hand_is_left_alone(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    run = Run(sweep.path / "20260101-0000-seed=0")
    run.checkpoints.folder.mkdir(parents=True)
    with run.lock():
        sweep.clear("seed=0")
        assert run.path.is_dir()
    sweep.clear("seed=0")
    assert not run.path.exists()


def test_a_run_that_ended_before_its_first_checkpoint_is_cleared_away(tmp_path):
    sweep = begun(tmp_path, "seed=1,11")
    for label, checkpoint in (("seed=1", False), ("seed=11", False), ("seed=1-2", True)):
        run = Run(sweep.path / f"20260101-0000-{label}")
        run.checkpoints.folder.mkdir(parents=True)
        if checkpoint:
            run.checkpoints.at(2).mkdir()
    sweep.clear("seed=1")
    left = {path.name for path in sweep.path.glob("2026*")}
    assert left == {"20260101-0000-seed=11", "20260101-0000-seed=1-2"}
    assert sweep.run_of("seed=1").path.name == "20260101-0000-seed=1-2"
    assert sweep.run_of("seed=11") is None


def test_the_end_of_a_log_says_how_training_ended():
    log = f"=== begun\nstep 10/20 · loss 1.5 · 3k tokens/s\nerror: no such file\n{ENDED}2\n"
    assert (ended(log), how_far(log), last_line(log)) == (2, (10, 20, 1.5), "error: no such file")
    assert ended(f"{ENDED}-9") == -9
    assert (ended("step 1/2"), how_far("preparing"), last_line("")) == (None, None, "it said nothing")
