"""How a run ends: by signals and time limits with a checkpoint, and every way with an exit code of its own."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from mixerlab.kernels.backend import BackendError
from mixerlab.lm.parallel.processes import INTERRUPTED, World
from mixerlab.lm.training.callbacks import Checkpoints
from mixerlab.lm.training.diagnosis import GO_ON, LOST, explain
from mixerlab.lm.training.module import LanguageModel
from mixerlab.options import UserError


class InterruptedRun(Exception):
    """The run was asked to end, and has written a checkpoint."""

    def __init__(self, reason: str, signum: int | None):
        super().__init__(reason)
        self.signum = signum


class Interruptions(Callback):
    """Ends the run after the step, checkpoint written, when a signal or the time limit asks for it.

    A second signal ends the process at once. All ranks are asked after every step, and end together.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, checkpoints: Checkpoints, world: World, deadline: float):
        self.checkpoints, self.world, self.deadline = checkpoints, world, deadline  # of time.monotonic()
        self._received = 0
        self._when = 0.0
        self._before: dict[int, Any] = {}
        self._others: list[Any] = []  # processes of the program that trains

    def __enter__(self) -> Self:
        """Takes over the signals; to be left when training is over."""
        self._others = multiprocessing.active_children()
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        _end_loading_processes(self._others)

    def _note(self, signum: int, frame: Any) -> None:
        # One that follows at once is the same, by way of the process group and of the parent.
        if self._received and time.monotonic() - self._when > 1:
            os._exit(128 + signum)
        if self._received:
            return
        self._received, self._when = signum, time.monotonic()
        if self.world.rank == 0:
            name = signal.Signals(signum).name
            text = f"{name}: finishing the step and writing a checkpoint; once more to end at once\n"
            os.write(2, text.encode())  # print could be interrupted in the midst of a print

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        self._end_if_asked(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._end_if_asked(trainer)  # the validation is made up for when the run goes on

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= trainer.max_steps:
            return  # all that is left is the last validation
        received, late = self.world.max(self._received, int(time.monotonic() > self.deadline))
        if received or late:
            self.checkpoints.save(trainer)
            reason = signal.Signals(received).name if received else "trainer.max_time is over"
            raise InterruptedRun(reason, received or None)


def _end_loading_processes(others: list[Any]) -> None:
    """Ends those that an error left behind: they ignore SIGTERM, and Python would wait for them at its end."""
    left = [process for process in multiprocessing.active_children() if process not in others]
    if left and threading.current_thread() is threading.main_thread():
        heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
        for process in left:
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, heard)


def exit_code_of(training: Callable[[], object], world: World, console: Console) -> int:
    """Runs `training` to its end, whichever it is; says what happened and returns the exit code."""
    if world.rank:
        console.quiet = True
        logging.getLogger("mixerlab").setLevel(logging.ERROR)
    code = 1
    try:
        training()
        code = 0
    except InterruptedRun as stop:
        console.print(
            f"stopped: {stop}; a checkpoint is written, continue with the same command and resume=auto"
        )
        code = INTERRUPTED[stop.signum == signal.SIGINT]
    except KeyboardInterrupt:
        print("interrupted; continue with the same command and resume=auto", file=sys.stderr)
        code = INTERRUPTED[1]
    except Exception as error:
        known = explain(error)
        if known is not None and known.startswith(LOST) and (culprit := world.killed()):
            known = f"{culprit}. {GO_ON}"
        code = 2 if isinstance(error, (BackendError, UserError)) else 1
        if world.rank and not world.all_raised:
            print(f"rank {world.rank}: {known or traceback.format_exc()}", file=sys.stderr)
        elif not world.rank and known is None:
            raise
        elif not world.rank:
            print(f"{'error' if code == 2 else 'stopped'}: {known}", file=sys.stderr)
    finally:
        world.close(failed=code not in (0, *INTERRUPTED))
    return code
