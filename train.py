"""Train a model from a recipe: python train.py recipes/quickstart.yaml model.mixer=attention"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from rich.console import Console

EXAMPLES = """
examples:
  python train.py recipes/quickstart.yaml                         train
  python train.py recipes/quickstart.yaml model.mixer=attention   the same with another mixer
  python train.py recipes/quickstart.yaml trainer.steps=50 seed=1
  python train.py recipes/quickstart.yaml resume=auto             continue the newest unfinished run
  python train.py recipes/quickstart.yaml --dry-run               size, cost and memory; needs no data

Every key is in docs/recipes.md.
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
    from lm.config import ConfigError, load_recipe, to_yaml

    console = Console()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        if args.print_config:
            print(to_yaml(recipe), end="")
            return 0
        if args.dry_run:
            from lm.dry_run import dry_run

            dry_run(recipe, console)
            return 0
        from lm.module import NonFiniteError
        from lm.training import train

        try:
            result = train(recipe, console)
        except NonFiniteError as error:
            print(f"stopped: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; continue with the same command and resume=auto", file=sys.stderr)
            return 130
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result.sample:
        console.print("\n[bold]sample[/bold]")
        print(result.sample, end="\n\n")
    reached = " · ".join(
        f"{name.replace('/', ' ').replace('_', ' ')} {v:.4f}" for name, v in result.metrics.items()
    )
    run = result.run
    console.print(
        f"[bold]reached[/bold] after {result.steps} steps: {reached}", highlight=False, soft_wrap=True
    )
    for what, text in {
        "run folder ": run,
        "watch      ": f"tensorboard --logdir {run.parent}",
        "generate   ": f"python -m lm.generate {run} --prompt {json.dumps(recipe.logging.sample_prompt)}",
    }.items():
        console.print(f"[bold]{what}[/bold]", text, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while the libraries load
        sys.exit(130)
