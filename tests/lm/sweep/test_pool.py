"""Training the points of a sweep: what runs when, with what of the machine, and what a kill leaves."""

import fcntl
import json
import os
import signal
import threading
from dataclasses import dataclass, field

import pandas as pd
import pytest
import torch
from rich.console import Console
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.sweep import pool
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.pool import Local, Training, _lock, environments, train_points
from mixerlab.lm.sweep.view import View
from sweeps import begun, ended_with, fail, finish, recipe_file, start, wait_until


@dataclass
class Pretended:
    """Trainings that need no process: each ends at its third look, as `ends` says of its point."""

    ends: dict[str, str] = field(default_factory=dict)
    began: list = field(default_factory=list)
    most: int = 0
    alive: set = field(default_factory=set)

    def __call__(self, sweep, label, environment):
        outer = self

        class One:
            looks = 0

            def poll(self):
                self.looks += 1
                if self.looks < 3:
                    return None
                outer.alive.discard(label)
                if outer.ends.get(label) == "failed":
                    fail(sweep, label, "stopped: the loss is nan")
                    return 1
                finish(sweep, label, valid__loss=1.0)
                return 0

            def stop(self):
                self.looks = 3

        self.began.append((label, dict(environment)))
        self.alive.add(label)
        self.most = max(self.most, len(self.alive))
        return One()


@pytest.fixture
def pretended(monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(pool, "Training", pretended)
    monkeypatch.setattr(pool, "POLL", 0.0)
    return pretended


def trained(sweep, own, console=None):
    with View(sweep, console or Console(quiet=True)) as view:
        return train_points(sweep, Local(sweep, own), view)


def test_no_more_runs_go_on_at_a_time_than_there_are_shares(tmp_path, pretended):
    sweep = begun(tmp_path, "seed=0,1,2,3,4")
    statuses = trained(sweep, [{"OMP_NUM_THREADS": "1", "SLOT": "a"}, {"OMP_NUM_THREADS": "1", "SLOT": "b"}])
    assert {status.state for status in statuses.values()} == {"finished"}
    assert [label for label, _ in pretended.began] == list(sweep.points)
    assert pretended.most == 2
    assert {environment["SLOT"] for _, environment in pretended.began} == {"a", "b"}


def test_finished_points_are_skipped_and_failed_ones_tried_again(tmp_path, pretended):
    sweep = begun(tmp_path, "seed=0,1,2")
    finish(sweep, "seed=0")
    fail(sweep, "seed=1")
    trained(sweep, [{}])
    assert [label for label, _ in pretended.began] == ["seed=1", "seed=2"]


def test_a_failed_run_stops_nothing_and_is_shown_with_its_reason(tmp_path, pretended, capsys):
    sweep = begun(tmp_path, "seed=0,1,2")
    pretended.ends["seed=1"] = "failed"
    statuses = trained(sweep, [{}], Console(width=500))
    assert [status.state for status in statuses.values()] == ["finished", "failed", "finished"]
    said = capsys.readouterr().out
    assert f"failed seed=1: stopped: the loss is nan (log: {sweep.log_file('seed=1')})" in said


def test_a_point_that_is_trained_still_is_left_alone_until_that_ends(tmp_path, pretended):
    sweep = begun(tmp_path, "seed=0,1")
    local = Local(sweep, [{}, {}])
    local.start(list(sweep.points))
    with sweep.log_file("seed=0").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        for _ in range(5):
            left = local.poll()
        assert left == {"seed=0"}
        assert [label for label, _ in pretended.began] == ["seed=1"]
    local.poll()
    assert [label for label, _ in pretended.began] == ["seed=1", "seed=0"]


def test_a_request_to_end_stops_what_goes_on(tmp_path, pretended, monkeypatch):
    sweep = begun(tmp_path, "seed=0,1,2")
    local = Local(sweep, [{}])

    def interrupt(self, statuses):
        raise KeyboardInterrupt

    monkeypatch.setattr(View, "show", interrupt)
    with View(sweep, Console(quiet=True)) as view, pytest.raises(KeyboardInterrupt):
        train_points(sweep, local, view)
    assert pretended.alive == set()
    assert len(pretended.began) == 1


def test_only_one_process_trains_a_point(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    with sweep.log_file("seed=0").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            Training(sweep, "seed=0", {})


def test_who_only_looks_at_a_lock_stops_no_start(tmp_path):
    path = tmp_path / "log"
    with path.open("wb") as looking, path.open("wb") as starting:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, [looking, fcntl.LOCK_UN]).start()
        _lock(starting)
        with pytest.raises(BlockingIOError):
            fcntl.flock(looking, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("jobs", "points", "cores", "devices", "threads"),
    [(None, 12, 4, 1, ["1"] * 4), (None, 2, 8, 1, ["4", "4"]), (3, 12, 8, 1, ["2"] * 3), (5, 9, 2, 1, ["1"] * 5),
     (None, 12, 8, 2, ["1"] * 4)],
)  # fmt: skip
def test_the_cores_are_shared(monkeypatch, jobs, points, cores, devices, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    own = environments(jobs, points, StrategyConfig(devices=devices, accelerator="cpu"))
    assert own == [{"OMP_NUM_THREADS": number} for number in threads]


@pytest.mark.parametrize(
    ("jobs", "devices", "visible", "seen"),
    [
        (None, 1, None, ["0", "1", "2", "3"]),
        (None, 2, "4,5,6,7", ["4,5", "6,7"]),
        (6, 1, None, list("012301")),
    ],
)
def test_every_run_sees_gpus_of_its_own(monkeypatch, jobs, devices, visible, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    own = environments(jobs, 12, StrategyConfig(devices=devices))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in own] == seen
    assert own[0]["OMP_NUM_THREADS"] == str(16 // len(own))


def most_steps(folder):
    """That any point of a sweep has come to."""
    if not (folder / "sweep.json").exists():
        return 0
    sweep = Sweep.open(folder)
    return max(sweep.progress(label).step for label in sweep.points)


def numbers(sweep):
    """The table, but for speeds."""
    return pd.read_csv(sweep.path / "report" / "table.csv").drop(columns="tokens_per_second")


def shown_by_tensorboard(folder):
    """The rows of the HPARAMS page of a folder, by TensorBoard's own code: (mixer, seed) of each."""
    events = EventMultiplexer().AddRunsFromDirectory(str(folder))
    events.Reload()
    board = TBContext(data_provider=MultiplexerDataProvider(events, str(folder)), logdir=str(folder))
    wanted = api_pb2.ListSessionGroupsRequest(
        slice_size=100,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        col_params=[api_pb2.ColParams(hparam=name) for name in ("00 mixer", "05 seed")],
    )
    answer = list_session_groups.Handler(
        context.RequestContext(), backend_context.Context(board), "", wanted
    ).run()
    return sorted(
        (group.hparams["00 mixer"].string_value, group.hparams["05 seed"].number_value)
        for group in answer.session_groups
    )


@pytest.mark.slow
def test_a_sweep_killed_half_way_ends_with_the_table_of_one_left_alone(tmp_path):
    source = recipe_file(tmp_path, "optim: {lr: 0.01, warmup_steps: 5}\n")
    given = ("trainer.steps=60", "trainer.checkpoint_every=1000")
    ended_with(start(source, tmp_path / "alone", *given), 0)

    first = start(source, tmp_path / "killed", *given)
    folder = tmp_path / "killed" / "compare-sweep"
    wait_until(lambda: most_steps(folder) >= 10)
    first.kill()
    first.wait()
    ended_with(start(source, tmp_path / "killed", *given), 0)
    sweep = Sweep.open(folder)
    assert numbers(sweep).equals(numbers(Sweep.open(tmp_path / "alone" / "compare-sweep")))
    logs = "".join(sweep.log_file(label).read_text() for label in sweep.points)
    assert "stopped: SIGTERM; a checkpoint is written" in logs, "the runs noticed, and lost no step"
    assert "continuing" in logs
    assert len(list(folder.glob("2*-mixer=*"))) == len(sweep.points) == 4
    assert shown_by_tensorboard(folder) == [(m, s) for m in ("attention", "mamba2") for s in (0, 1)]

    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for label in sweep.points:
        environment = json.loads((sweep.run_of(label).path / "environment.json").read_text())
        assert environment["threads"] == str(threads)

    before = {path: path.stat().st_mtime_ns for path in folder.glob("2*/*")}
    ended_with(start(source, tmp_path / "killed", *given), 0)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("2*/*")} == before, (
        "nothing is trained twice"
    )


@pytest.mark.slow
def test_a_run_that_fails_is_reported_at_the_end_and_the_rest_is_in_the_table(tmp_path):
    source = recipe_file(tmp_path)
    process = start(source, tmp_path / "runs", "model.mixer=attention", "optim.lr=1e-3,9e5", "seed=0")
    _, err = ended_with(process, 1)
    sweep = Sweep.open(tmp_path / "runs" / "compare-sweep")
    states = {label: sweep.status(label).state for label in sweep.points}
    assert sorted(states.values()) == ["failed", "finished"]
    (failed,) = [label for label, state in states.items() if state == "failed"]
    assert f"failed {failed}: stopped: " in err
    assert f"log: {sweep.log_file(failed)}" in err
    assert (sweep.path / "report" / "report.html").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_with_checkpoints(tmp_path):
    process = start(
        recipe_file(tmp_path), tmp_path / "runs", "trainer.steps=100000", "trainer.val_every=100000"
    )
    folder = tmp_path / "runs" / "compare-sweep"
    wait_until(lambda: any(sum(1 for _ in path.open()) > 20 for path in folder.glob("2*/metrics.csv")))
    process.send_signal(signal.SIGINT)
    _, err = ended_with(process, 130)
    assert "stopped: SIGINT; the same command goes on" in err
    sweep = Sweep.open(folder)
    assert {sweep.status(label).state for label in sweep.points} == {"interrupted", "waiting"}
    assert any(sweep.run_of(label) for label in sweep.points)
