"""The folder of a sweep: which points it has, and how far each has come.

<logging.dir>/<name>/
    sweep.json                 the points, and the command that made them
    points/<label>.yaml        the whole recipe of a point, which `mixerlab train` is given
    points/<label>.log         what its training printed, all attempts; locked while one goes on
    <time>-<label>/            run folders
    report/                    what `mixerlab report` writes
"""

import fcntl
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from mixerlab.lm.parallel.interrupts import INTERRUPTED
from mixerlab.lm.recipe.load import differing_keys, is_folder_name, to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.folder import Run, runs_of, writing
from mixerlab.lm.run.start import PLACE
from mixerlab.lm.sweep.plan import Point
from mixerlab.options import ConfigError, first_line, show
from mixerlab.sealed import read_noted, write_noted

MAY_CHANGE = tuple(f"{key.rstrip('.')}." for key in ("name", "label", "logging.dir", *PLACE))
"""Keys that a half-done sweep may have otherwise than before, if the rows of a step stay as many."""

ENDED = "=== ended with exit code "
"""The last line of a log, unless whoever watched the training was killed."""


@dataclass(frozen=True)
class Status:
    """How far a point has come."""

    state: str
    """finished, running, failed, interrupted (goes on from its checkpoint) or waiting."""
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    reason: str = ""
    """Why it failed or was interrupted."""


class Sweep:
    """A sweep's folder."""

    def __init__(self, path: Path, command: list[str], points: Iterable[Point]):
        self.path, self.command = path, command
        self.points = {point.label: point for point in points}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The sweep in a folder, which may be a stranger's: nothing of it is imported. Raises ConfigError."""
        path = Path(path)
        try:
            noted = json.loads(read_noted(path / "sweep.json"))
            command, points = noted["command"], [Point(**point) for point in noted["points"]]
            if not all(isinstance(word, str) for word in command):
                raise ValueError("its command is no list of words")
            for point in points:
                _check(point)
            return cls(path, command, points)
        except OSError:
            found = "it has no sweep.json" if path.is_dir() else "no such folder"
            raise ConfigError(
                f"sweep {path}: {found}; expected the folder that `mixerlab sweep` names"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"sweep {path}: its sweep.json is damaged: {first_line(error)}") from None

    @classmethod
    def of(cls, planned: list[tuple[Point, Recipe]], command: list[str]) -> Self:
        """The sweep of these points, in its folder, which need not be there. Raises ConfigError if others' runs are."""
        recipe = planned[0][1]
        path = Path(recipe.logging.dir) / str(recipe.name)
        if not (path / "sweep.json").exists() and any(run.has_recipe for run in runs_of(path)):
            raise ConfigError(
                f"name = {recipe.name!r}: {path} has runs that are no sweep's; give another name="
            )
        return cls(path, command, [point for point, _ in planned])

    def begin(self, planned: list[tuple[Point, Recipe]]) -> None:
        """Writes the points down. Raises ConfigError where some are there already, and with another recipe."""
        recipes = {point.label: recipe for point, recipe in planned}
        if (self.path / "sweep.json").exists():
            Sweep.open(self.path)._check_same(self, recipes)
        with writing(self.path):
            (self.path / "points").mkdir(exist_ok=True)
            for label, recipe in recipes.items():
                write_noted(self.recipe_file(label), to_yaml(recipe))
            noted = {"command": self.command, "points": [asdict(point) for point in self.points.values()]}
            write_noted(self.path / "sweep.json", json.dumps(noted, indent=1) + "\n")

    def _check_same(self, now: "Sweep", recipes: Mapping[str, Recipe]) -> None:
        """Raises ConfigError unless every point of this sweep is one of those, with the same recipe."""
        another = "start another sweep with name=, or move the folder away"
        for label in self.points:
            if label not in recipes:
                raise ConfigError(
                    f"sweep {self.path}: it has the point {label}, which is not asked for now; {another}"
                )
            try:
                before = yaml.safe_load(read_noted(self.recipe_file(label)))
            except (OSError, ValueError) as error:
                raise ConfigError(f"sweep {self.path}: {error}") from None
            rows = [sweep.points[label].step_rows for sweep in (self, now)]
            if rows[0] != rows[1]:
                raise ConfigError(
                    f"sweep {self.path}: a step had {rows[0]} rows over all devices when it began, and now has "
                    f"{rows[1]}; expected as many; {another}"
                )
            for key, old, new in differing_keys(before, yaml.safe_load(to_yaml(recipes[label]))):
                if not f"{key}.".startswith(MAY_CHANGE):
                    raise ConfigError(
                        f"sweep {self.path}: the recipe has changed since it began: {key} was {show(old)} and is now "
                        f"{show(new)}; {another}"
                    )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def lock(self) -> FileLock:
        """The sweep's lock, for a `with`. Raises ConfigError if another process holds it."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"sweep {self.path}: another process is training it") from None
        return lock

    def recipe_file(self, label: str) -> Path:
        return self.path / "points" / f"{label}.yaml"

    def log_file(self, label: str) -> Path:
        return self.path / "points" / f"{label}.log"

    def run_of(self, label: str) -> Run | None:
        """The run of a point, if there is one with a result or a checkpoint."""
        found = [run for run in self._runs(label) if run.is_finished or run.checkpoints.all()]
        return max(found, key=lambda run: (run.is_finished, run.path.name), default=None)

    def _runs(self, label: str) -> list[Run]:
        """Those of a point, whose folders are called <time>-<label>, or that and a number."""
        names = re.compile(rf"\d{{8}}-\d{{4}}-{re.escape(label)}(-\d+)?")
        return [Run(path) for path in self.path.glob("*/") if names.fullmatch(path.name)]

    def clear(self, label: str) -> None:
        """Deletes runs of a point that ended before their first checkpoint: there is nothing to go on with."""
        for run in self._runs(label):
            try:
                with run.lock():
                    run.checkpoints.put_back()
                    if not run.is_finished and not run.checkpoints.all():
                        shutil.rmtree(run.path)
            except ConfigError:  # somebody trains it by hand
                continue

    def status(self, label: str) -> Status:
        """How far a point has come, by what lies in the folder."""
        run = self.run_of(label)
        if run is not None and run.is_finished:
            return Status("finished", int(run.result["steps"]), self.points[label].steps)
        now, text = self.progress(label), _tail(self.log_file(label))
        if now.state == "running" or not text:
            return now
        if (code := ended(text)) == 0:
            return now  # its run was deleted since
        state = "interrupted" if code is None or code in INTERRUPTED else "failed"
        return replace(now, state=state, reason=last_line(text))

    def progress(self, label: str) -> Status:
        """As `status`, of a point that is running or waiting, by its log alone."""
        log = self.log_file(label)
        step, steps, loss = how_far(_tail(log)) or (0, self.points[label].steps, None)
        return Status("running" if is_locked(log) else "waiting", step, steps, loss)


def _check(point: Point) -> None:
    """Raises ValueError unless a point that was read is one that `Sweep.begin` could have written."""
    if not (isinstance(point.label, str) and is_folder_name(point.label)):
        raise ValueError(f"the label of a point is {point.label!r}")
    texts = isinstance(point.values, dict) and all(
        isinstance(text, str) for item in point.values.items() for text in item
    )
    numbers = (point.parameters, point.step_rows, point.row_flops, point.state_bytes, point.steps or 0)
    if not texts or not all(isinstance(n, (int, float)) and 0 <= n < math.inf for n in numbers):
        raise ValueError(f"the point {point.label} has values that no sweep writes")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, or one that it started and that has outlived it."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _tail(path: Path, length: int = 8192) -> str:
    """The end of a log; "" where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - length))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def how_far(log: str) -> tuple[int, int, float | None] | None:
    """(step, steps, loss) of the last line of a log that says how far training is, or None."""
    said = re.findall(r"^step (\d+)/(\d+) · (?:loss (nan|inf|\d+\.\d+))?", log, re.MULTILINE)
    if not said:
        return None
    losses: list[Any] = [loss for _, _, loss in said if loss]
    return int(said[-1][0]), int(said[-1][1]), float(losses[-1]) if losses else None


def ended(log: str) -> int | None:
    """The exit code at a log's end; None where whoever watched the training was killed."""
    last = (log.splitlines() or [""])[-1]
    return int(last.removeprefix(ENDED)) if re.fullmatch(rf"{ENDED}-?\d+", last) else None


def last_line(log: str) -> str:
    """The last thing that training said before it ended."""
    said = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("===")]
    return "".join(filter(str.isprintable, said[-1])) if said else "it said nothing"
