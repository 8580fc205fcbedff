"""Requests to end: signals, and output that nobody reads any more."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from mixerlab.lm.parallel.interrupts import (
    READER_GONE,
    InterruptedRun,
    Interrupts,
    exit_code,
    has_reader,
    reason,
)
from mixerlab.lm.parallel.processes import World


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_it_at_once(signum):
    with Interrupts(), pytest.raises(InterruptedRun) as stop:
        os.kill(os.getpid(), signum)
    assert not stop.value.saved
    assert exit_code(stop.value) == (130 if signum == signal.SIGINT else 75)


def test_in_training_a_signal_is_noted(capfd):
    with Interrupts() as interrupts:
        interrupts.in_steps = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at the same moment: by way of the process group
        assert interrupts.received == signal.SIGTERM
        with pytest.raises(InterruptedRun, match="SIGTERM"):
            interrupts.check()
    assert "SIGTERM: finishing the step and writing a checkpoint" in capfd.readouterr().err


def test_afterwards_the_signals_and_streams_are_whose_they_were():
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)], sys.stdout, sys.stderr
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) is not before[0][0]
    assert ([signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)], sys.stdout, sys.stderr) == before


def test_a_signal_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_request_from_another_thread_waits_to_be_asked_for():
    interrupts = Interrupts()
    thread = threading.Thread(target=interrupts.ask, args=[READER_GONE])
    thread.start()
    thread.join()
    with pytest.raises(InterruptedRun, match="nobody reads the output"):
        interrupts.check()


def test_a_reader_that_has_gone_is_no_first_signal():
    with Interrupts() as interrupts:
        interrupts.in_steps = True
        interrupts.ask(READER_GONE)
        interrupts._when -= 10
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM


def test_a_sign_of_life_raises_what_could_not_be_raised_where_it_came():
    world = World()
    world.is_at("tokenising")
    world.interrupts.received = READER_GONE
    with pytest.raises(InterruptedRun):
        world.is_at("tokenising")
    world.interrupts.in_steps = True
    world.is_at("in step 1")


def test_closed_streams_stay_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with Interrupts():
        assert sys.stdout is None
        print("to nobody")


def test_a_request_is_no_exception_that_a_library_would_take_for_its_own():
    assert not issubclass(InterruptedRun, Exception)
    assert reason(signal.SIGHUP) == "SIGHUP"


LOOSE_ENDS = """
import os, signal, sys
from mixerlab.lm.parallel.interrupts import InterruptedRun, Interrupts, has_reader
with Interrupts() as interrupts:
    interrupts.in_steps = True
    {then}
    print("more", flush=True)
    print("and more", file=sys.stderr, flush=True)
    os._exit(100 + interrupts.received)
"""


def loose_end(then, **streams):
    command = [sys.executable, "-c", LOOSE_ENDS.format(then=then)]
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # where nohup runs the tests
    return subprocess.Popen(command, start_new_session=True, preexec_fn=heard, **streams)


HANG_UP = "os.kill(os.getpid(), signal.SIGHUP)"


def test_a_reader_that_goes_is_noted_and_written_to_no_more():
    process = loose_end("pass", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait() == 100 + READER_GONE


def test_a_terminal_that_goes_ends_what_wrote_to_a_pipe_and_not_what_writes_to_a_file(tmp_path):
    with (tmp_path / "log").open("w") as log:
        assert loose_end(HANG_UP, stdout=log, stderr=log).wait() == 100
    assert (tmp_path / "log").read_text() == "more\nand more\n"
    piped = loose_end(HANG_UP, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.communicate()
    assert piped.returncode == 100 + signal.SIGHUP


def test_a_full_disk_under_the_log_ends_nothing():
    with open("/dev/full", "w") as full:
        assert loose_end("pass", stdout=full, stderr=full).wait() == 100


def test_only_terminals_and_pipes_have_readers(tmp_path):
    read, write = os.pipe()
    with (tmp_path / "log").open("w") as log:
        assert [has_reader(write), has_reader(log.fileno()), has_reader(9999)] == [True, False, False]
    os.close(read)
    os.close(write)


STARTED = """
import os, pathlib, subprocess, sys, time
from mixerlab.lm.parallel.interrupts import STARTER, InterruptedRun, Interrupts, end_with_parent
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "run"], env=os.environ | {STARTER: str(os.getpid())})
    time.sleep(100)
with Interrupts():
    try:
        end_with_parent()
        pathlib.Path(sys.argv[1]).write_text("began")
        time.sleep(100)
    except InterruptedRun as stop:
        pathlib.Path(sys.argv[1]).write_text(f"ended by {stop}")
"""


def test_a_run_whose_starter_is_killed_is_asked_to_end(tmp_path):
    script, said = tmp_path / "started.py", tmp_path / "said.txt"
    script.write_text(STARTED)
    starter = subprocess.Popen([sys.executable, str(script), str(said)])

    def wait_for(text):
        began = time.monotonic()
        while not said.exists() or said.read_text() != text:
            assert time.monotonic() - began < 60
            time.sleep(0.05)

    wait_for("began")
    starter.kill()
    starter.wait()
    wait_for("ended by SIGTERM")
