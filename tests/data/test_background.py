"""Long work in a thread: its result, its errors, and its end when nobody waits."""

import signal
import threading
import time

import pytest

from mixerlab.data.background import in_background


def test_the_result_is_that_of_the_work_and_the_time_is_used():
    told = []

    def work(nobody_waits):
        time.sleep(1.2)
        return 3

    assert in_background(work, lambda: told.append(1)) == 3
    assert len(told) == 2


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
