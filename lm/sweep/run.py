"""A sweep from its first run to its table."""

import sys

from rich.console import Console

from mixerlab.lm.parallel.interrupts import INTERRUPTED
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.pool import Launcher, train_points
from mixerlab.lm.sweep.report import report
from mixerlab.lm.sweep.view import View


def run(sweep: Sweep, launcher: Launcher, console: Console) -> int:
    """Trains what is not finished, makes the report, says what failed; returns the exit code of the command."""
    console.print(
        f"{len(sweep.points)} runs, {launcher}\nsweep folder {sweep.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    with View(sweep, console) as view:
        statuses = train_points(sweep, launcher, view)
    if any(status.state == "finished" for status in statuses.values()):
        report([sweep], console)
    missing = {label: status for label, status in statuses.items() if status.state != "finished"}
    for label, status in missing.items():
        print(f"{status.state} {label}: {status.reason}; log: {sweep.log_file(label)}", file=sys.stderr)
    if any(status.state == "failed" for status in missing.values()):
        return 1
    return INTERRUPTED[0] if missing else 0
