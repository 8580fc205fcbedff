"""Requests to end a run: signals, and output that nobody reads any more.

Imports nothing slow, so that it holds from the first line of the program.
"""

import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self, TextIO

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Each asks a run to end. SIGHUP does so only where the output goes to the terminal that has gone, or to a pipe."""

READER_GONE = signal.SIGPIPE
"""Stands for output that cannot be written any more."""

INTERRUPTED = (75, 130)
"""Exit codes of a run that was asked to end and can be continued: EX_TEMPFAIL of sysexits.h, and Ctrl-C."""

PARENT = "MIXERLAB_PARENT"
"""The environment variable with the process that started this one, for the further processes of a run."""

STARTER = "MIXERLAB_STARTER"
"""The same for the first process of a run that a sweep has started."""

GRACE = 60
"""Seconds in which a run whose starter has gone may finish its step and write a checkpoint."""


class InterruptedRun(BaseException):
    """The run was asked to end. No Exception, as KeyboardInterrupt: libraries that catch those must let it pass."""

    def __init__(self, reason: str, signum: int | None = None, saved: bool = False):
        super().__init__(reason)
        self.signum = signum
        self.saved = saved
        """Whether a checkpoint of the last step is written."""


class Interrupts:
    """What has been asked for so far. Until training begins a request raises InterruptedRun, at once.

    In training it is noted, for the step to be finished. Once more, a second later, ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal."""
        self.in_steps = False
        """Whether requests are only noted."""
        self.speaks = True
        """Whether this process answers on the terminal."""
        self.has_reader = has_reader(1)
        """Whether somebody reads the output. A terminal that has gone would not say that it was one."""
        self._when = 0.0

    def __enter__(self) -> Self:
        """Takes over the signals. Output that cannot be written is dropped, and asks to end where it had a reader."""
        self._streams, self._handlers = (sys.stdout, sys.stderr), self.install()
        # They are None where they were closed.
        sys.stdout, sys.stderr = (stream and _Output(stream, self) for stream in self._streams)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.stdout, sys.stderr = self._streams
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def install(self) -> dict[int, Any]:
        """Takes over the signals that are not ignored, as SIGHUP by nohup; returns who had them.

        SIGINT in any case: shells have it ignored in the background, where `kill -INT` may still ask for an end.
        """
        if threading.current_thread() is not threading.main_thread():
            return {}
        heard = [s for s in SIGNALS if s == signal.SIGINT or signal.getsignal(s) is not signal.SIG_IGN]
        return {signum: signal.signal(signum, self._note) for signum in heard}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP and not self.has_reader:
            return  # the log is a file, which has outlived the terminal
        # One that follows at once is the same, by way of the process group and of the parent.
        if self.received not in (0, READER_GONE) and time.monotonic() - self._when > 1:
            os._exit(128 + signum)
        self.ask(signum)

    def ask(self, signum: int) -> None:
        """Notes a request. Raises InterruptedRun in the main thread, unless training has begun."""
        if self.received and (self.received != READER_GONE or signum == READER_GONE):
            return
        self.received, self._when = signum, time.monotonic()
        if not self.in_steps:
            if threading.current_thread() is threading.main_thread():
                raise InterruptedRun(reason(signum), signum)
        elif self.speaks:
            text = (
                f"{reason(signum)}: finishing the step and writing a checkpoint; once more to end at once\n"
            )
            with suppress(OSError):  # the terminal may be what has gone
                os.write(2, text.encode())  # print could be interrupted in the midst of a print

    def check(self) -> None:
        """Raises InterruptedRun if a request came that could not be raised where it came."""
        if self.received:
            raise InterruptedRun(reason(self.received), self.received)


def reason(signum: int) -> str:
    """A request in words."""
    return "nobody reads the output any more" if signum == READER_GONE else signal.Signals(signum).name


def exit_code(stop: InterruptedRun) -> int:
    """Of a run that ended so."""
    return INTERRUPTED[stop.signum == signal.SIGINT]


def has_reader(descriptor: int) -> bool:
    """Whether a terminal, a pipe or a socket takes what is written there; a file needs nobody."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # closed
        return False
    return os.isatty(descriptor) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class _Output:
    """A stream that survives its reader."""

    def __init__(self, stream: TextIO, interrupts: Interrupts):
        self._stream, self._interrupts = stream, interrupts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self._lost(len(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lost()

    def _lost(self, written: int = 0) -> int:
        """Sends what follows nowhere; that of libraries and of the interpreter's end too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._interrupts.has_reader:
            self._interrupts.ask(READER_GONE)
        return written


def end_with_parent() -> None:
    """Ends this process where the one that started it has gone, if one did: nobody else would.

    A further process of a run ends at once; a run that a sweep has started writes a checkpoint first.
    """
    is_further = PARENT in os.environ
    parent = int(os.environ.get(PARENT if is_further else STARTER, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if not is_further:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()
