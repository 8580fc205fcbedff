"""Long work in a thread: its result, its errors, its signs of life, and its end when nobody waits."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from mixerlab.data.background import in_background


def told_while(work: Callable[[], None]) -> int:
    """How often the caller was told that something moved."""
    told = []
    in_background(lambda nobody_waits: work(), lambda: told.append(1))
    return len(told)


def test_the_result_is_that_of_the_work():
    assert in_background(lambda nobody_waits: 3, lambda: None) == 3


def test_work_that_stands_still_is_not_told_of():
    assert told_while(lambda: time.sleep(1.7)) == 0


def test_work_that_computes_is_told_of():
    def compute():
        end = time.monotonic() + 1.7
        while time.monotonic() < end:
            sum(range(1000))

    assert told_while(compute) >= 2


def test_work_of_a_child_is_told_of():
    program = "import time; end = time.monotonic() + 1.7\nwhile time.monotonic() < end: sum(range(1000))"

    def wait_for_it():
        subprocess.run([sys.executable, "-c", program], check=True)

    assert told_while(wait_for_it) >= 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process reads")
def test_work_that_reads_little_by_little_is_told_of():
    def read():
        with open("/dev/zero", "rb", buffering=0) as file:
            for _ in range(17):
                file.read(1 << 19)
                time.sleep(0.1)

    assert told_while(read) >= 2


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("no"), KeyboardInterrupt()])
def test_an_error_of_the_work_is_raised(error):
    def work(nobody_waits):
        raise error

    with pytest.raises(type(error)) as raised:
        in_background(work, lambda: None)
    assert raised.value is error


class Asked(BaseException):
    pass


def test_a_signal_handler_that_raises_ends_the_wait_and_the_work_is_told():
    def handler(signum, frame):
        raise Asked

    ended = threading.Event()

    def work(nobody_waits):
        if nobody_waits.wait(60):
            ended.set()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Asked):
            in_background(work, lambda: None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended.wait(10)
