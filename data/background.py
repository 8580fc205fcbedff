"""Long work of libraries that look at no signals, where a signal must still be heard and progress be told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[threading.Event], T], while_waiting: Callable[[], None]) -> T:
    """What `work` returns or raises, from a thread of its own; a signal handler that raises ends the wait at once.

    Args:
        work: is given an event that is set when nobody waits any more.
        while_waiting: called every half a second, in this thread.
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
    try:
        while not wait([future], timeout=0.5).done:
            while_waiting()
        return future.result()
    finally:
        nobody_waits.set()
