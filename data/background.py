"""Long work of libraries that look at no signals, where a signal must still be heard and progress be told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

import psutil

T = TypeVar("T")

PAUSE = 0.5
"""Seconds between two looks at the work."""
LEAST_CPU, LEAST_BYTES = 0.1, 1 << 14
"""Of a second: CPU seconds, and bytes read and written. Less is waiting, or the drawing of a progress bar."""


def in_background(work: Callable[[threading.Event], T], while_moving: Callable[[], None]) -> T:
    """What `work` returns or raises, from a thread of its own; a signal handler that raises ends the wait at once.

    Args:
        work: is given an event that is set when nobody waits any more.
        while_moving: called in this thread after each half a second in which this process, or one that it started,
            has computed, read or written something. A download that stalls calls it no more.
    """
    nobody_waits = threading.Event()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(nobody_waits))
        except BaseException as error:
            future.set_exception(error)

    # The end of the program does not wait for a daemon.
    threading.Thread(target=run, name="mixerlab-data", daemon=True).start()
    me = psutil.Process()
    try:
        others = _done(me.children(recursive=True))
        looked, own = time.monotonic(), _done([me])
        while not wait([future], timeout=PAUSE).done:
            seconds, own_before, others_before = time.monotonic() - looked, own, others
            own, others = _done([me]), _done(me.children(recursive=True))
            if _is_much(own_before, own, seconds) or _is_much(others_before, others, seconds):
                while_moving()
            looked, own = time.monotonic(), _done([me])  # what it reads to look for children is no work
        return future.result()
    finally:
        nobody_waits.set()


def _done(processes: list[psutil.Process]) -> tuple[float, int]:
    """CPU seconds, and bytes read and written, of those that still run."""
    cpu, moved = 0.0, 0
    for process in processes:
        with suppress(psutil.Error, RuntimeError):  # one that has just ended
            times = process.cpu_times()
            cpu += times.user + times.system
            if hasattr(process, "io_counters"):  # not on macOS
                counted = process.io_counters()
                moved += counted.read_chars + counted.write_chars
    return cpu, moved


def _is_much(before: tuple[float, int], now: tuple[float, int], seconds: float) -> bool:
    return now[0] - before[0] > LEAST_CPU * seconds or now[1] - before[1] > LEAST_BYTES * seconds
