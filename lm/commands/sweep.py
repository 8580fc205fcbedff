"""mixerlab sweep: a recipe trained with every combination of some values, and a table of what came out."""

import argparse
import sys
from collections.abc import Sequence

from mixerlab.lm.commands.arguments import at_least
from mixerlab.lm.parallel.interrupts import InterruptedRun, Interrupts, exit_code

EXAMPLES = """
examples:
  mixerlab sweep quickstart model.mixer=sessa,attention,mamba2 seed=0,1 optim.lr=1e-3,3e-3
  mixerlab sweep quickstart model.mixer='sessa,[attention, sessa]' model.match=quickstart    # equal parameters
  mixerlab sweep quickstart seed=0,1,2 --dry-run      # the runs, their size and how long they will take
  mixerlab sweep quickstart seed=0,1,2 --jobs 2 name=seeds

Commas inside brackets belong to a value. A recipe's section `sweep:` has the same as lists. The same command again goes
on where a sweep has ended, however it did; more values are added to it.

exit codes: 0 all runs are finished; 1 some failed; 75 interrupted, go on with the same command; 130 the same after
Ctrl-C; 2 wrong recipe or values.
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab sweep",
        description="Train a recipe with every combination of values; compare the runs in a table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe such as quickstart"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value,...",
        help="replace what the recipe says, with one value or several",
    )
    parser.add_argument(
        "--jobs",
        type=at_least(int, 1),
        metavar="N",
        help="runs at a time (default: one on each core, or for each GPU)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs, their size, and how long they will take; exit"
    )
    args, rest = parser.parse_known_args(arguments)  # argparse leaves a key=value behind an option over
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see --help")

    # Imported here, so that --help answers at once.
    from mixerlab.lm.sweep.plan import plan
    from mixerlab.lm.sweep.pool import environments

    overrides = [*args.overrides, *rest]
    planned = plan(args.recipe, overrides)
    own = environments(args.jobs, len(planned), planned[0][1].strategy)
    if args.dry_run:
        _list(planned, own)
        return 0
    with Interrupts():
        try:
            return _run(planned, [args.recipe, *overrides], own)
        except InterruptedRun as stop:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
            return exit_code(stop)


def _run(planned, command: Sequence[str], own: Sequence[dict[str, str]]) -> int:
    from rich.console import Console

    from mixerlab.lm.sweep.folder import Sweep
    from mixerlab.lm.sweep.pool import Local, train_points
    from mixerlab.lm.sweep.report import report
    from mixerlab.lm.sweep.view import View

    console = Console(emoji=False)  # ":x:" in a path is no picture
    sweep = Sweep.planned(planned, list(command))
    with sweep.lock():
        sweep.begin(planned)
        threads = own[0]["OMP_NUM_THREADS"]
        console.print(
            f"{len(sweep.points)} runs, {len(own)} at a time with {threads} threads each\nsweep folder {sweep.path}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        with View(sweep, console) as view:
            statuses = train_points(sweep, Local(sweep, own), view)
    states = {status.state for status in statuses.values()}
    if "finished" in states:
        report([sweep], console)
    for label, status in statuses.items():
        if status.state != "finished":
            print(f"{status.state} {label}: {status.reason}; log: {sweep.log_file(label)}", file=sys.stderr)
    return 1 if "failed" in states else 75 if "interrupted" in states else 0


def _list(planned, own: Sequence[dict[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mixerlab.lm.model.cost import si
    from mixerlab.lm.sweep.estimate import seconds_per_step
    from mixerlab.lm.sweep.view import duration

    keys = list(planned[0][0].values)
    table = Table(*map(escape, keys), box=SIMPLE_HEAD)
    for column in ("parameters", "d_model", "steps", "training FLOPs", "time"):
        table.add_column(column, justify="right")
    total, unknown = 0.0, False
    for (point, recipe), each in zip(
        planned, seconds_per_step(planned, int(own[0]["OMP_NUM_THREADS"])), strict=True
    ):
        seconds = None if each is None or point.steps is None else each * point.steps
        total, unknown = total + (seconds or 0), unknown or seconds is None
        flops = point.row_flops * point.step_rows
        table.add_row(
            *map(escape, point.values.values()),
            f"{point.parameters:,}",
            str(recipe.model.d_model),
            "?" if point.steps is None else f"{point.steps:,}",
            f"{si(flops)} a step" if point.steps is None else si(flops * point.steps),
            "?" if seconds is None else duration(seconds),
        )
    console = Console(emoji=False)
    if not console.is_terminal:
        console.width = 200  # a file has no width to fit into
    console.print(table)
    whole = f"about {duration(total / len(own))}" if not unknown else "not known"
    console.print(
        f"{len(planned)} runs, {len(own)} at a time: {whole}, without validations; judged by one step of each model "
        "here, alone on its cores",
        highlight=False,
    )
