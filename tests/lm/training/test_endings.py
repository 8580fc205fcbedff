"""How runs end: by signals and time limits with a checkpoint, each way with an exit code of its own."""

import fcntl
import io
import os
import pty
import re
import shlex
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from mixerlab.kernels.backend import BackendError
from mixerlab.lm.parallel.interrupts import InterruptedRun
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.diagnosis import NonFiniteError
from mixerlab.lm.training.endings import exit_code_of
from mixerlab.options import ConfigError
from started_runs import (
    LONG,
    assert_same_curves,
    command,
    environment,
    finish,
    layout,
    plugin,
    start,
    wait_for_step,
)
from tiny_runs import ROOT, metric, run_dirs

STOPS_IN_VALIDATION = """
import os, signal
from mixerlab.lm.training.module import LanguageModel
step = LanguageModel.validation_step
def interrupt(self, batch, i, *rest):
    if "STOP" in os.environ and self.trainer.global_step == 10:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, i, *rest)
LanguageModel.validation_step = interrupt
"""

SLOW_STEP = """
import time
from mixerlab.lm.training.module import LanguageModel
step = LanguageModel.training_step
def slow(self, micro_batches, i):
    if i == 3:
        print("step 99/", flush=True)
        time.sleep(600)
    return step(self, micro_batches, i)
LanguageModel.training_step = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_code_of_its_own(tmp_path, unequal, ranks, signum):
    sizes = layout(ranks, 4 // ranks)
    process = start(*unequal, *LONG, *sizes)
    wait_for_step(process, 5)
    process.send_signal(signum)
    out, _ = finish(process, code=130 if signum == signal.SIGINT else 75)
    assert f"stopped: {signum.name}; a checkpoint is written" in out
    (run,) = run_dirs(tmp_path)
    done = read_meta(Run(run).checkpoints.last())["global_step"]
    assert done == max(metric(run, "train/loss")) >= 5
    more = [f"trainer.steps={done + 2}" if o.startswith("trainer.steps") else o for o in LONG]
    finish(start(*unequal, *more, *sizes, f"resume={run}"))
    assert sorted(metric(run, "train/loss")) == list(range(1, done + 3))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_the_whole_group_spares_the_loading_processes_until_the_step_is_done(
    tmp_path, unequal, ranks
):
    sizes = [*layout(ranks, 4 // ranks), "trainer.num_workers=1"]
    process = start(*unequal, *LONG, *sizes, start_new_session=True)
    wait_for_step(process, 5)
    for _ in range(2):  # as `timeout` does: to the process, then to its group
        os.killpg(process.pid, signal.SIGTERM)
    finish(process, code=75)
    (run,) = run_dirs(tmp_path)
    assert read_meta(Run(run).checkpoints.last())["global_step"] == max(metric(run, "train/loss"))


@pytest.mark.slow
def test_an_interrupted_validation_is_made_up_for(tmp_path, unequal):
    mishap = plugin(tmp_path, STOPS_IN_VALIDATION)
    arguments = [*unequal, *layout(1, 4), "plugins=[mishap]"]
    finish(start(*arguments, **mishap))
    finish(start(*arguments, env=mishap["env"] | {"STOP": "1"}), code=75)
    finish(start(*arguments, "resume=auto", **mishap))
    whole, stopped = run_dirs(tmp_path)
    assert sorted(metric(stopped, "valid/loss")) == [10, 20]
    assert_same_curves(stopped, whole, tolerance=0)
    with (stopped / "metrics.csv").open() as file:
        rows = [tuple(line.split(",")[:2]) for line in file]
    assert len(rows) == len(set(rows)), "nothing is logged twice"


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tmp_path, unequal):
    process = start(*unequal, *LONG, "plugins=[mishap]", **plugin(tmp_path, SLOW_STEP))
    wait_for_step(process, 99)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    finish(process, code=128 + signal.SIGTERM)


def last_step(runs):
    """The step of the last checkpoint, which must be the last that was logged."""
    (run,) = run_dirs(runs)
    step = read_meta(Run(run).checkpoints.last())["global_step"]
    assert step == max(metric(run, "train/loss"))
    return step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reader_that_goes_costs_no_work(tmp_path, unequal, ranks):
    """As `| head` does."""
    process = start(*unequal, *LONG, *layout(ranks, 4 // ranks))
    wait_for_step(process, 5)
    process.stdout.close()
    assert process.wait(timeout=60) == 75
    assert last_step(tmp_path) >= 5
    assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_ctrl_c_that_ends_the_reader_too_costs_no_work(tmp_path, unequal):
    """As in `2>&1 | tee log`."""
    shell = f"{shlex.join(command(*unequal, *LONG))} 2>&1 | tee {tmp_path / 'log'}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.Popen(["bash", "-c", shell], cwd=ROOT, env=environment(), start_new_session=True)
    try:
        while "step 5/" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""):
            assert process.poll() is None
            time.sleep(0.1)
        # The terminal signals the group; bash waits for its children and ends by the same signal, so ask ps.
        trains = [pid for pid in children_of(process.pid) if "train.py" in command_line(pid)]
        os.killpg(process.pid, signal.SIGINT)
        for pid in trains:
            wait_for_end(pid)
    finally:
        process.wait(timeout=60)
    assert last_step(tmp_path) >= 5


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def wait_for_end(pid):
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.1)


def take_terminal():
    """Makes the standard input this process's terminal, which hangs up when it goes: nohup has that ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.slow
def test_a_terminal_that_goes_ends_a_run_on_it_with_a_checkpoint(tmp_path, unequal):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(*unequal, *LONG),
        cwd=ROOT,
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    text = ""
    while not re.search(r"\b[1-9]\d*/100000", text):
        text += os.read(controller, 1 << 16).decode(errors="replace")
    os.close(controller)
    assert process.wait(timeout=60) == 75
    assert last_step(tmp_path) >= 1


@pytest.mark.slow
def test_a_run_whose_log_is_a_file_outlives_its_terminal(tmp_path, unequal):
    with (tmp_path / "log").open("w") as log:
        arguments = [*unequal, "trainer.steps=40"]
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
        while "step 5/" not in (tmp_path / "log").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=120) == 0
    assert last_step(tmp_path) == 40


SLOW_START = """
import time
from mixerlab.data.text import TextData
prepare = TextData.prepare
def slow(self):
    print("step 99/", flush=True)
    time.sleep(600)
TextData.prepare = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "signum", "to_all"),
    [
        (1, signal.SIGTERM, False),
        (1, signal.SIGINT, False),
        (2, signal.SIGUSR1, False),
        (2, signal.SIGINT, False),
        (2, signal.SIGINT, True),
    ],
)
def test_before_the_first_step_a_signal_ends_all_processes_at_once(tmp_path, unequal, ranks, signum, to_all):
    mishap = plugin(tmp_path, SLOW_START)
    process = start(
        *unequal, *layout(ranks, 4 // ranks), "plugins=[mishap]", start_new_session=True, **mishap
    )
    wait_for_step(process, 99)
    further = children_of(process.pid)
    began = time.monotonic()
    os.killpg(process.pid, signum) if to_all else process.send_signal(signum)
    out, err = finish(process, code=130 if signum == signal.SIGINT else 75)
    assert time.monotonic() - began < 15
    assert f"stopped: {signum.name}, before the first step: nothing was trained" in out
    assert "Traceback" not in out + err
    assert not [pid for pid in further if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_a_main_process_that_is_killed_at_the_start_leaves_none_behind(tmp_path, unequal):
    mishap = plugin(tmp_path, SLOW_START)
    process = start(*unequal, *layout(2, 2), "plugins=[mishap]", **mishap)
    wait_for_step(process, 99)
    (further,) = children_of(process.pid)
    process.kill()
    process.wait()
    began = time.monotonic()
    wait_for_end(further)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_an_interrupted_last_validation_is_made_up_for(tmp_path, unequal):
    mishap = plugin(tmp_path, STOPS_IN_VALIDATION.replace("== 10", "== 20"))
    arguments = [*unequal, *layout(1, 4), "plugins=[mishap]", "resume=auto"]
    for stop, code in (({"STOP": "1"}, 75), ({}, 0)):
        out, _ = finish(start(*arguments, env=mishap["env"] | stop), code=code)
    assert "reached     after 20 steps" in out
    (run,) = run_dirs(tmp_path)
    assert sorted(metric(run, "valid/loss")) == [10, 20]
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))
    assert Run(run).result["valid/loss"] == metric(run, "valid/loss")[20]
    meta = read_meta(Run(run).checkpoints.last())
    assert (meta["global_step"], meta["valid_loss"]) == (20, metric(run, "valid/loss")[20])
    out, _ = finish(start(*arguments, **mishap))
    assert "this run is finished" in out
    assert len(run_dirs(tmp_path)) == 1


@pytest.mark.slow
def test_the_time_limit_ends_it_likewise(tmp_path, unequal):
    out, _ = finish(start(*unequal, *LONG, *layout(2, 2), "trainer.max_time=5s"), code=75)
    assert "trainer.max_time is over" in out
    (run,) = run_dirs(tmp_path)
    assert read_meta(Run(run).checkpoints.last())["global_step"] == max(metric(run, "train/loss"))


def ended(raised=None, world=None):
    """(exit code, what was printed) of a training that ends like this."""
    console = Console(file=io.StringIO(), width=200)

    def training():
        if raised is not None:
            raise raised

    return exit_code_of(training, world or World(), console), console.file.getvalue()


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (InterruptedRun("SIGTERM", signal.SIGTERM, saved=True), 75),
        (InterruptedRun("SIGHUP", signal.SIGHUP), 75),
        (InterruptedRun("SIGINT", signal.SIGINT), 130),
        (InterruptedRun("trainer.max_time is over", None), 75),
        (KeyboardInterrupt(), 130),
        (ConfigError("seed = -1: expected at least 0"), 2),
        (BackendError("no such backend"), 2),
        (NonFiniteError("step 3"), 1),
        (OSError(28, "No space left on device", "file"), 1),
    ],
)
def test_every_end_has_its_exit_code(raised, code):
    assert ended(raised)[0] == code


def test_an_end_is_told_in_one_line(capsys):
    early, late = InterruptedRun("SIGTERM", 15), InterruptedRun("SIGTERM", 15, saved=True)
    assert "stopped: SIGTERM, before the first step: nothing was trained" in ended(early)[1]
    assert "stopped: SIGTERM; a checkpoint is written, continue with" in ended(late)[1]
    for raised, line in (
        (ConfigError("seed = -1: expected at least 0"), "error: seed = -1: expected at least 0\n"),
        (NonFiniteError("step 3: loss nan"), "stopped: step 3: loss nan\n"),
    ):
        ended(raised)
        assert capsys.readouterr().err == line


def test_a_fault_in_the_code_is_raised_with_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError())


def test_the_other_ranks_say_what_happened_to_them_unless_all_raise_the_same(capsys):
    world = World(rank=1, devices=2)
    assert ended(ZeroDivisionError("by zero"), world)[0] == 1
    error = capsys.readouterr().err
    assert error.startswith("rank 1: Traceback")
    assert "ZeroDivisionError: by zero" in error
    world.all_raised = True
    assert ended(ConfigError("wrong"), world)[0] == 2
    assert capsys.readouterr().err == ""
