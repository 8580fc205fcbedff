"""mixerlab train: a recipe and overrides in, a trained run folder out."""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

EXAMPLES = """
examples:
  mixerlab train quickstart                           a recipe that comes with mixerlab; or a YAML file
  mixerlab train quickstart model.mixer=attention     the same with another mixer
  mixerlab train quickstart trainer.steps=50 seed=1
  mixerlab train quickstart resume=auto               continue the newest unfinished run
  mixerlab train fineweb-350m strategy=fsdp           shards over every GPU
  mixerlab train quickstart --dry-run                 size, cost and memory; needs no data

exit codes: 0 trained to the end; 75 interrupted (SIGTERM, SIGUSR1 or trainer.max_time), checkpoint written, go on
with resume=auto; 130 the same after Ctrl-C; 2 wrong recipe or data; 1 anything else. `mixerlab keys` lists every key.
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
    args, rest = parser.parse_known_args(arguments)  # argparse leaves a key=value behind an option over
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}; see --help")

    # Imported here, so that --help answers at once.
    from mixerlab.lm.model.match import sized
    from mixerlab.lm.recipe.load import load_recipe, to_yaml

    console = Console(stderr=args.print_config)  # whose output is YAML and nothing else
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    recipe = sized(load_recipe(args.recipe, [*args.overrides, *rest]))
    if args.print_config:
        print(to_yaml(recipe), end="")
        return 0
    if args.dry_run:
        from mixerlab.lm.training.dry_run import dry_run

        dry_run(recipe, console, [argument for argument in arguments if argument != "--dry-run"])
        return 0
    from mixerlab.lm.parallel.processes import start
    from mixerlab.lm.training.endings import exit_code_of
    from mixerlab.lm.training.fit import train_with

    world = start(recipe.strategy, [sys.executable, *program, *arguments])
    return exit_code_of(lambda: train_with(recipe, console, world), world, console)
