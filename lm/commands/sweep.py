"""mixerlab sweep: a recipe trained with every combination of some values, and a table of what came out."""

import argparse
import sys
from collections.abc import Sequence

from mixerlab.lm.commands.arguments import add_allow_plugins, at_least
from mixerlab.lm.parallel.interrupts import InterruptedRun, Interrupts, exit_code

EXAMPLES = """
examples:
  mixerlab sweep quickstart model.mixer=sessa,attention,mamba2 seed=0,1 optim.lr=1e-3,3e-3
  mixerlab sweep quickstart model.mixer='sessa,[attention, sessa]' model.match=quickstart    # equal parameters
  mixerlab sweep quickstart seed=0,1,2 --dry-run      # the runs, their size and how long they will take
  mixerlab sweep quickstart seed=0,1,2 --jobs 2 name=seeds
  mixerlab sweep fineweb-125m seed=0,1 --launcher submitit --option slurm_partition=gpu --option gpus_per_node=1

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
        "--launcher",
        choices=["local", "submitit", "ray"],
        default="local",
        help="who trains: this machine, jobs of a SLURM cluster, or tasks of Ray (default: %(default)s)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit's update_parameters, such as slurm_partition=gpu, or of Ray's tasks, such as num_gpus=1",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs, their size, and how long they will take; exit"
    )
    add_allow_plugins(parser)
    args, rest = parser.parse_known_args(arguments)  # argparse leaves a key=value behind an option over
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see --help")
    if args.launcher == "local" and args.option:
        parser.error("--option is for --launcher submitit or ray")
    if args.launcher != "local" and args.jobs:
        parser.error("--jobs is for this machine; expected an --option of the launcher")

    # Imported here, so that --help answers at once.
    from rich.console import Console

    from mixerlab.lm.sweep.plan import plan
    from mixerlab.lm.sweep.pool import environments

    console = Console(emoji=False)  # ":x:" in a path is no picture
    overrides = [*args.overrides, *rest]
    planned = plan(args.recipe, overrides, args.allow_plugins)
    shares = environments(args.jobs, len(planned), planned[0][1].strategy)
    if args.dry_run:
        from mixerlab.lm.sweep.estimate import list_points

        list_points(planned, len(shares), int(shares[0]["OMP_NUM_THREADS"]), console)
        return 0

    from mixerlab.lm.sweep.cluster import launcher
    from mixerlab.lm.sweep.folder import Sweep
    from mixerlab.lm.sweep.pool import Local
    from mixerlab.lm.sweep.run import run

    sweep = Sweep.of(planned, [args.recipe, *overrides])
    with Interrupts():
        try:
            with sweep.lock():
                sweep.begin(planned)
                if args.launcher == "local":
                    return run(sweep, Local(sweep, shares), console)
                return run(sweep, launcher(args.launcher, sweep, args.option), console)
        except InterruptedRun as stop:
            print(f"stopped: {stop}; the same command goes on", file=sys.stderr)
            return exit_code(stop)
