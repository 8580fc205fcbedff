"""mixerlab train: a recipe and overrides in, a trained run folder out."""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

from mixerlab.lm.commands.arguments import add_allow_plugins
from mixerlab.lm.parallel.interrupts import InterruptedRun, Interrupts, end_with_parent, exit_code

EXAMPLES = """
examples:
  mixerlab train quickstart                           a recipe that comes with mixerlab; or a YAML file
  mixerlab train quickstart model.mixer=attention     the same with another mixer
  mixerlab train quickstart trainer.steps=50 seed=1
  mixerlab train quickstart resume=auto               continue the newest unfinished run
  mixerlab train fineweb-350m strategy=fsdp           shards over every GPU
  mixerlab train quickstart --dry-run                 size, cost and memory; needs no data

exit codes: 0 trained to the end; 75 interrupted (SIGTERM, SIGUSR1, SIGHUP, trainer.max_time, or nobody reads the
output any more), checkpoint written, go on with resume=auto; 130 the same after Ctrl-C; 2 wrong recipe or data; 1
anything else. `mixerlab keys` lists every key.
"""


def main(arguments: Sequence[str], program: Sequence[str] = ("-P", "-m", "mixerlab", "train")) -> int:
    """`program` is what python is given to start this command again, for further processes."""
    parser = argparse.ArgumentParser(
        prog="mixerlab train",
        description="Train a model from a recipe.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe such as quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace what the recipe says")
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole recipe, defaults included; exit"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run one batch of random tokens forward and backward, print sizes and costs; exit",
    )
    add_allow_plugins(parser)
    args, rest = parser.parse_known_args(arguments)  # argparse leaves a key=value behind an option over
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see --help")

    overrides = [*args.overrides, *rest]
    if args.print_config or args.dry_run:
        return _show(args, overrides, arguments)
    end_with_parent()
    with Interrupts() as interrupts:
        try:
            return _train(args, overrides, [sys.executable, *program, *arguments], interrupts)
        except InterruptedRun as stop:  # before the processes of the run had met
            print(f"stopped: {stop}, before the first step", file=sys.stderr)
            return exit_code(stop)


def _show(args: argparse.Namespace, overrides: Sequence[str], arguments: Sequence[str]) -> int:
    # Imported here, so that --help answers at once.
    from mixerlab.lm.model.match import sized
    from mixerlab.lm.recipe.load import load_recipe, to_yaml

    console = _console(stderr=args.print_config)  # whose output is YAML and nothing else
    recipe = sized(load_recipe(args.recipe, overrides, allow_plugins=args.allow_plugins))
    if args.print_config:
        print(to_yaml(recipe), end="")
        return 0
    from mixerlab.lm.training.dry_run import dry_run

    dry_run(recipe, console, [argument for argument in arguments if argument != "--dry-run"])
    return 0


def _train(
    args: argparse.Namespace, overrides: Sequence[str], command: Sequence[str], interrupts: Interrupts
) -> int:
    from mixerlab.lm.model.match import sized
    from mixerlab.lm.parallel.launch import launch
    from mixerlab.lm.parallel.processes import LostProcessError
    from mixerlab.lm.recipe.load import load_recipe
    from mixerlab.lm.training.endings import exit_code_of
    from mixerlab.lm.training.fit import train_with

    console = _console()
    recipe = sized(load_recipe(args.recipe, overrides, allow_plugins=args.allow_plugins))
    try:
        world = launch(recipe.strategy, command, interrupts)
    except LostProcessError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return exit_code_of(lambda: train_with(recipe, console, world), world, console)


def _console(stderr: bool = False) -> Console:
    """The console, to which the program's log goes too."""
    console = Console(stderr=stderr, emoji=False)  # ":x:" in a path is no picture
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    return console
