"""Train a model from a recipe: python train.py recipes/quickstart.yaml model.mixer=attention"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.logging import RichHandler

EXAMPLES = """
examples:
  python train.py recipes/quickstart.yaml                         train
  python train.py recipes/quickstart.yaml model.mixer=attention   the same with another mixer
  python train.py recipes/quickstart.yaml trainer.steps=50 seed=1
  python train.py recipes/quickstart.yaml resume=auto             continue the newest unfinished run
  python train.py recipes/fineweb-350m.yaml strategy=fsdp         shards over every GPU
  python train.py recipes/quickstart.yaml --dry-run               size, cost and memory; needs no data

exit codes: 0 trained to the end; 75 interrupted (SIGTERM, SIGUSR1 or trainer.max_time), checkpoint written, go on
with resume=auto; 130 the same after Ctrl-C; 2 wrong recipe or data; 1 anything else. Every key is in docs/recipes.md.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python train.py",
        description="Train a model from a recipe.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file, such as recipes/quickstart.yaml")
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
    args.overrides += rest
    # Imported here, so that --help answers at once.
    from data import DataError
    from kernels.backend import BackendError
    from lm.config import ConfigError, load_recipe, to_yaml

    console = Console(stderr=args.print_config)  # whose output is YAML and nothing else
    plain = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(format="%(message)s", handlers=[plain])
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.print_config:
            print(to_yaml(recipe), end="")
            return 0
        if args.dry_run:
            from lm.dry_run import dry_run

            dry_run(recipe, console, ["train.py", *(a for a in given if a != "--dry-run")])
            return 0
        from lm.training import run_recipe

        return run_recipe(recipe, console, [sys.executable, __file__, *given])
    except (BackendError, ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries load
        sys.exit(130)
