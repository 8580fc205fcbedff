"""The runs of a sweep, each `mixerlab train` in a process of its own, some at a time.

A killed sweep leaves nothing behind that another would trip over: trainings notice that whoever started them has gone,
write a checkpoint and end, and until then hold the lock of their log.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import BinaryIO, Protocol

import torch

from mixerlab.lm.parallel.interrupts import STARTER
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.sweep.folder import ENDED, Status, Sweep
from mixerlab.lm.sweep.view import View

POLL = 0.5
"""Seconds between two looks at the trainings."""


class Training:
    """A point being trained by a process of its own, which this one watches."""

    def __init__(self, sweep: Sweep, label: str, environment: Mapping[str, str]):
        """`environment` is what it has of its own. Raises BlockingIOError while another process trains the point."""
        self.log = sweep.log_file(label).open("ab", buffering=0)
        try:
            _lock(self.log)  # the training inherits this, and with it the lock
        except BlockingIOError:
            self.log.close()
            raise
        sweep.clear(label)
        run = sweep.run_of(label)
        command = [sys.executable, "-P", "-m", "mixerlab", "train", str(sweep.recipe_file(label))]
        command.append("--allow-plugins")  # whoever began the sweep has let its recipe import them
        if run is not None:
            command.append(f"resume={json.dumps(str(run.path))}")
        paths = os.pathsep.join(filter(None, sys.path))  # of plug-ins, however found
        self.log.write(f"=== {datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command[2:])}\n".encode())
        self.process = subprocess.Popen(
            command,
            env=os.environ | environment | {STARTER: str(os.getpid()), "PYTHONPATH": paths},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sweep, which passes it on
        )

    def poll(self) -> int | None:
        """Its exit code, which is noted in the log; None while it goes on."""
        code = self.process.poll()
        if code is not None and not self.log.closed:
            if code < 0:
                self.log.write(f"killed by {signal.Signals(-code).name}\n".encode())
            self.log.write(f"{ENDED}{code}\n".encode())
            self.log.close()
        return code

    def stop(self) -> None:
        """Asks it to write a checkpoint and end."""
        self.process.terminate()


def _lock(file: BinaryIO, patience: float = 1.0) -> None:
    """Takes the file's lock. Raises BlockingIOError where another holds it for longer than one who only looks."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


class Launcher(Protocol):
    """Who has the points trained."""

    def start(self, labels: Sequence[str]) -> None:
        """Takes the points to train, once."""

    def poll(self) -> set[str]:
        """Starts and ends what it can; returns the points that are not over."""

    def stop(self) -> None:
        """The sweep ends before they do."""


class Local:
    """Trains on this machine, some points at a time."""

    def __init__(self, sweep: Sweep, environments: Sequence[Mapping[str, str]]):
        """As many at a time as there are environments, each in one of them."""
        self.sweep, self.environments = sweep, environments
        self.waiting: list[str] = []
        self.trainings: dict[int, tuple[str, Training]] = {}

    def __str__(self) -> str:
        threads = self.environments[0]["OMP_NUM_THREADS"]
        return f"{len(self.environments)} at a time, each on {threads} {'thread' if threads == '1' else 'threads'}"

    def start(self, labels: Sequence[str]) -> None:
        self.waiting += labels

    def poll(self) -> set[str]:
        for slot, (_, training) in list(self.trainings.items()):
            if training.poll() is not None:
                del self.trainings[slot]
        free = [slot for slot in range(len(self.environments)) if slot not in self.trainings]
        for label in list(self.waiting) if free else []:
            state = self.sweep.status(label).state
            if state == "running":
                continue  # since an earlier sweep, which was killed: it will end soon
            if state == "finished":
                self.waiting.remove(label)
                continue
            with contextlib.suppress(BlockingIOError):  # another has begun it since: wait for its end
                self.trainings[free[0]] = label, Training(self.sweep, label, self.environments[free[0]])
                self.waiting.remove(label)
                free.pop(0)
            if not free:
                break
        return {*self.waiting, *(label for label, _ in self.trainings.values())}

    def stop(self) -> None:
        """Returns when all have written a checkpoint."""
        self.waiting.clear()
        for _, training in self.trainings.values():
            training.stop()
        while self.poll():
            time.sleep(POLL)


def environments(jobs: int | None, points: int, strategy: StrategyConfig) -> list[dict[str, str]]:
    """Of each training on this machine: its share of the cores, and its GPUs.

    `jobs` at a time; None: as many as there are GPUs for, or one on each core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = int(strategy.devices)
    gpus = [] if strategy.accelerator == "cpu" else list(map(str, range(torch.cuda.device_count())))
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = visible.split(",")[: len(gpus)]
    jobs = max(1, min(points, jobs or len(gpus or range(cores)) // devices))
    shares = [
        {"OMP_NUM_THREADS": str(max(1, cores // (jobs * (1 if gpus else devices))))} for _ in range(jobs)
    ]
    for slot, share in enumerate(shares if gpus else []):
        own = (gpus[(slot * devices + i) % len(gpus)] for i in range(devices))
        share["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(own))
    return shares


def train_points(sweep: Sweep, launcher: Launcher, view: View) -> dict[str, Status]:
    """Trains what is not finished; returns how each point has ended."""
    statuses = {label: sweep.status(label) for label in sweep.points}
    left = {label for label, status in statuses.items() if status.state != "finished"}
    launcher.start([label for label in sweep.points if label in left])
    try:
        while True:
            still = launcher.poll()
            statuses |= {label: sweep.progress(label) for label in still}
            statuses |= {label: sweep.status(label) for label in left - still}
            left = still
            view.show(statuses)
            if not left:
                return statuses
            time.sleep(POLL)
    except BaseException:
        launcher.stop()
        raise
