"""Sweeps whose runs are jobs of SLURM, by submitit, or tasks of Ray. Both are imported where they are asked for."""

import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixerlab.lm.parallel.interrupts import GRACE
from mixerlab.lm.recipe.load import parse_override
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.pool import POLL, Launcher, Training
from mixerlab.options import ConfigError, first_line


def work(folder: str, label: str, place: str) -> int:
    """What a job does: trains a point in a process of its own, to its end; returns the exit code.

    It waits where another job trains the point, and does nothing where that has finished it. `place` is the folder that
    the recipe's paths are relative to.
    """
    os.chdir(place)
    os.environ.pop("SLURM_NTASKS", None)  # the run is one program, which starts its own processes
    sweep = Sweep.open(folder)
    while (state := sweep.status(label).state) == "running":
        time.sleep(POLL)
    if state == "finished":
        return 0
    try:
        training = Training(sweep, label, {})
    except BlockingIOError:  # another job has begun it since
        return work(folder, label, place)
    try:
        while (code := training.poll()) is None:
            time.sleep(POLL)
    except BaseException:  # the job is cancelled, in which case this process may be killed soon
        training.stop()
        while training.poll() is None:
            time.sleep(POLL)
        raise
    return code


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--launcher {name}: {error}; expected it installed: pip install 'mixerlab[{name}]'"
        ) from None


class Submitit:
    """An array of jobs on a SLURM cluster."""

    def __init__(self, sweep: Sweep, options: Mapping[str, Any]):
        """`options` are those of submitit's `update_parameters`, and `cluster`. Raises ConfigError."""
        submitit, self.sweep = _package("submitit"), sweep
        parameters = {"timeout_min": 24 * 60, "name": sweep.path.name, **options}
        try:
            self.executor = submitit.AutoExecutor(
                sweep.path / "jobs", cluster=parameters.pop("cluster", None)
            )
            self.executor.update_parameters(**parameters)
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--option: {error}") from None
        self.jobs: dict[str, Any] = {}

    def __str__(self) -> str:
        return "as jobs of submitit"

    def start(self, labels: Sequence[str]) -> None:
        if not labels:
            return
        with self.executor.batch():
            for label in labels:
                self.jobs[label] = self.executor.submit(
                    work, str(self.sweep.path.resolve()), label, str(Path.cwd())
                )

    def poll(self) -> set[str]:
        return {label for label, job in self.jobs.items() if not job.done()}

    def stop(self) -> None:
        """Leaves the jobs to the cluster; the same command waits for them."""


class Ray:
    """Tasks of a Ray cluster, or of one on this machine where there is none."""

    def __init__(self, sweep: Sweep, options: Mapping[str, Any]):
        """`options` are those of Ray's tasks, such as num_gpus, and `address`. Raises ConfigError."""
        self.ray, self.sweep = _package("ray"), sweep
        parameters = {"num_cpus": 1, "max_retries": 0, **options}
        address = parameters.pop("address", None)
        try:
            self.ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
            self.task = self.ray.remote(work).options(**parameters)
        except (TypeError, ValueError, RuntimeError, ConnectionError) as error:
            raise ConfigError(f"--option: {first_line(error)}") from None
        self.tasks: dict[str, Any] = {}

    def __str__(self) -> str:
        return "as tasks of Ray"

    def start(self, labels: Sequence[str]) -> None:
        for label in labels:
            self.tasks[label] = self.task.remote(str(self.sweep.path.resolve()), label, str(Path.cwd()))

    def poll(self) -> set[str]:
        tasks = list(self.tasks.values())
        _, left = self.ray.wait(tasks, num_returns=len(tasks), timeout=0) if tasks else ([], [])
        return {label for label, task in self.tasks.items() if task in left}

    def stop(self) -> None:
        """Cancels the tasks; returns when their trainings have written checkpoints, or had GRACE seconds for it."""
        tasks = list(self.tasks.values())
        for task in tasks:
            self.ray.cancel(task)
        if tasks:
            self.ray.wait(tasks, num_returns=len(tasks), timeout=GRACE)


def launcher(name: str, sweep: Sweep, options: Sequence[str]) -> Launcher:
    """The launcher "submitit" or "ray", with `options` as KEY=VALUE texts.

    Raises ConfigError where it is not installed, or does not take an option.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        parsed |= parse_override(option)
    return Submitit(sweep, parsed) if name == "submitit" else Ray(sweep, parsed)
