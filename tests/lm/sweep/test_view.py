"""What is shown while a sweep trains."""

import io

import pytest
from rich.console import Console

from mixerlab.lm.sweep import view as view_module
from mixerlab.lm.sweep.folder import Status
from mixerlab.lm.sweep.view import View, duration
from sweeps import begun


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set."""
    now = [1000.0]
    monkeypatch.setattr(view_module.time, "monotonic", lambda: now[0])
    return now


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=300, height=40, color_system=None)


def test_a_terminal_shows_every_run_with_what_it_has_reached(tmp_path, clock):
    sweep, console = begun(tmp_path, "seed=0,1,2,3"), terminal()
    statuses = {label: Status("waiting", steps=400) for label in sweep.points}
    with View(sweep, console) as view:
        view.show(statuses | {"seed=0": Status("running", 100, 400, 3.0)})
        clock[0] += 60
        statuses |= {
            "seed=0": Status("running", 200, 400, 2.125),
            "seed=1": Status("failed", 40, 400, reason="stopped: the loss is nan"),
            "seed=2": Status("finished", 400, 400),
        }
        view.show(statuses)
    shown = console.file.getvalue().rpartition("1 running, ")[2].splitlines()
    assert shown[0].strip() == "1 failed, 1 waiting, 1 finished"
    lines = {line.split()[0]: line.split() for line in shown if line.strip().startswith("seed")}
    assert lines["seed=0"] == ["seed=0", "running", "200/400", "2.125", "2m", "00s"]
    assert lines["seed=1"][:2] == ["seed=1", "failed"]
    assert lines["seed=2"] == ["seed=2", "finished", "400/400"]
    assert lines["seed=3"] == ["seed=3", "waiting"]
    assert "the loss is nan" in " ".join(shown)


def test_a_file_gets_a_line_where_a_state_changes_and_now_and_then(tmp_path, clock):
    sweep, file = begun(tmp_path, "seed=0,1"), io.StringIO()
    with View(sweep, Console(file=file)) as view:
        for step in range(1, 131):
            clock[0] += 1
            view.show({"seed=0": Status("running", step, 200, 2.5), "seed=1": Status("waiting")})
        view.show({"seed=0": Status("finished", 200, 200), "seed=1": Status("running")})
    assert file.getvalue().splitlines() == [
        "running seed=0: step 1/200, loss 2.500",
        "running seed=0: step 62/200, loss 2.500, 2m 18s left",
        "running seed=0: step 123/200, loss 2.500, 1m 17s left",
        "finished seed=0",
        "running seed=1",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.4, "9s"), (61, "1m 01s"), (3599, "59m 59s"), (3600, "1h 00m"), (100000, "27h 46m")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
