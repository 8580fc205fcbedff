"""How a run ends: by signals and time limits with a checkpoint, and every way with an exit code of its own."""

import logging
import multiprocessing
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
from mixerlab.lm.parallel.interrupts import INTERRUPTED, InterruptedRun, exit_code, reason
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.training.callbacks import Checkpoints
from mixerlab.lm.training.diagnosis import GO_ON, LOST, explain
from mixerlab.lm.training.module import LanguageModel
from mixerlab.options import UserError


class Interruptions(Callback):
    """Ends the run after the step, checkpoint written, when a signal or the time limit asks for it.

    All ranks are asked after every step, and end together. So do they where one could not write a checkpoint.
    """

    def __init__(self, checkpoints: Checkpoints, world: World, deadline: float):
        self.checkpoints, self.world, self.deadline = checkpoints, world, deadline  # of time.monotonic()
        self._before: dict[int, Any] = {}
        self._others: list[Any] = []  # processes of the program that trains

    def __enter__(self) -> Self:
        """From now on requests are noted; to be left when training is over."""
        self._others = multiprocessing.active_children()
        self.world.interrupts.in_steps = True
        self._before = self.world.interrupts.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self.world.interrupts.speaks = False  # what is left takes no time, so requests stay noted
        _end_loading_processes(self._others)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: LanguageModel, *args: Any) -> None:
        self._end_if_asked(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._end_if_asked(trainer)  # the validation is made up for when the run goes on

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        received, late, failed = self.world.max(
            self.world.interrupts.received,
            int(time.monotonic() > self.deadline),
            int(self.checkpoints.failed),
        )
        if failed:
            self.checkpoints.wait()  # raises what went wrong, on all ranks
        if received or late:
            self.checkpoints.save(trainer)
            self.checkpoints.wait()
            why = reason(received) if received else "trainer.max_time is over"
            raise InterruptedRun(why, received or None, saved=True)


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
    code, together = 1, False
    try:
        training()
        code, together = 0, True
    except InterruptedRun as stop:
        code, together = exit_code(stop), stop.saved
        if not together:
            world.tell_end(code, str(stop))
        console.print(f"stopped: {what_is_left(stop)}", soft_wrap=True)
    except KeyboardInterrupt:
        print("interrupted; continue with the same command and resume=auto", file=sys.stderr)
        code = INTERRUPTED[1]
        world.tell_end(code, "interrupted")
    except Exception as error:
        known = explain(error)
        if known is not None and known.startswith(LOST) and (culprit := world.lost()):
            known = f"{culprit}. {GO_ON}"
        code = 2 if isinstance(error, (BackendError, UserError)) else 1
        world.tell_end(code, known or repr(error))
        if world.rank and not world.all_raised:
            print(f"rank {world.rank}: {known or traceback.format_exc()}", file=sys.stderr)
        elif not world.rank and known is None:
            raise
        elif not world.rank:
            print(f"{'error' if code == 2 else 'stopped'}: {known}", file=sys.stderr)
    finally:
        world.close(failed=not together)
    return code


def what_is_left(stop: InterruptedRun) -> str:
    """Why a run was interrupted, and how to go on with it."""
    if stop.saved:
        return f"{stop}; a checkpoint is written, continue with the same command and resume=auto"
    return f"{stop}, before the first step: nothing was trained; start it again with the same command"
