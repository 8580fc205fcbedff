"""What a user watches while a sweep trains: the state, step, loss and time left of every run."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mixerlab.lm.sweep.folder import Status, Sweep

ORDER = ("running", "failed", "interrupted", "waiting", "finished")
COLOURS = {"running": "cyan", "failed": "red", "interrupted": "yellow", "waiting": "dim", "finished": "green"}
QUIET = 60.0
"""Seconds between lines about the same run, where the output is no terminal."""


class View:
    """A table that stays up to date, or lines of text where the output is no terminal."""

    def __init__(self, sweep: Sweep, console: Console):
        self.sweep, self.console = sweep, console
        self._began: dict[str, tuple[int, float]] = {}  # label -> (step, time) when it was first seen running
        self._said: dict[str, tuple[str, float]] = {}  # label -> (state, time) of the last line
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, statuses: Mapping[str, Status]) -> None:
        """Brings what is shown up to date."""
        now = time.monotonic()
        for label, status in statuses.items():
            if status.state != "running":
                self._began.pop(label, None)
            elif status.step:
                self._began.setdefault(label, (status.step, now))
        if self._live:
            self._live.update(self._table(statuses), refresh=True)
        else:
            for label, status in statuses.items():
                state, when = self._said.get(label, ("waiting", now))
                if status.state != state or (state == "running" and now - when > QUIET):
                    self._said[label] = status.state, now
                    self._print(f"{status.state} {label}{self._details(label, status)}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _details(self, label: str, status: Status) -> str:
        if status.state in ("failed", "interrupted"):
            return f": {status.reason} (log: {self.sweep.log_file(label)})"
        if status.state == "running" and status.step:
            loss = "" if status.loss is None else f", loss {status.loss:.3f}"
            left = f", {left} left" if (left := self._left(label, status)) else ""
            return f": step {_steps(status)}{loss}{left}"
        return ""

    def _left(self, label: str, status: Status) -> str:
        """How long the run will take, judged by the steps since it was first seen."""
        first, when = self._began.get(label, (status.step, 0.0))
        if status.steps is None or status.step <= first:
            return ""
        return duration((status.steps - status.step) * (time.monotonic() - when) / (status.step - first))

    def _table(self, statuses: Mapping[str, Status]) -> Group:
        counts = Counter(status.state for status in statuses.values())
        counted = ", ".join(f"{counts[state]} {state}" for state in ORDER if counts[state])
        table = Table(box=SIMPLE_HEAD)
        table.add_column("run", overflow="fold")
        table.add_column("state")
        for column in ("step", "loss", "left"):
            table.add_column(column, justify="right")
        # What does not fit is cut off at the end, so what moves comes first.
        for label in sorted(statuses, key=lambda label: ORDER.index(statuses[label].state)):
            status = statuses[label]
            loss = "" if status.loss is None or status.state == "finished" else f"{status.loss:.3f}"
            colour, left = COLOURS[status.state], self._left(label, status)
            table.add_row(escape(label), f"[{colour}]{status.state}", _steps(status), loss, left)
        failed = [
            Text(f"failed {label}: {status.reason}", style="red", no_wrap=True, overflow="ellipsis")
            for label, status in statuses.items()
            if status.state == "failed"
        ]
        return Group(f"{escape(str(self.sweep.path))}: {counted}", *failed, table)


def _steps(status: Status) -> str:
    return f"{status.step:,}" + ("" if status.steps is None else f"/{status.steps:,}") if status.step else ""


def duration(seconds: float) -> str:
    """In the two largest units: 3h 20m, 4m 10s."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{int(hours)}h {int(minutes % 60):02}m"
    return f"{int(minutes)}m {int(seconds % 60):02}s" if minutes >= 1 else f"{seconds:.0f}s"
