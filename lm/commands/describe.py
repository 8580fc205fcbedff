"""mixerlab describe: what a recipe's decoder costs, for one or several mixers side by side."""

import argparse
import logging
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixerlab.lm.commands.arguments import add_allow_plugins, at_least

EXAMPLES = """
examples:
  mixerlab describe quickstart
  mixerlab describe quickstart --mixers sessa attention mamba2 '[mamba2, sessa]'
  mixerlab describe quickstart model.match_params=10M --mixers sessa mamba2
  mixerlab describe fineweb-125m --lengths 2048 16384 131072
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab describe",
        description="Print parameters by group, training FLOPs and the size of the decoding state. Needs no data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe such as quickstart"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace what the recipe says")
    parser.add_argument(
        "--mixers",
        nargs="+",
        default=[],
        metavar="MIXER",
        help="a column for each: names, mappings with options, or lists, as in model.mixer=MIXER",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=[],
        metavar="T",
        help="default: the recipe's, and 16 times it",
    )
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)
    # argparse gives all that follows --mixers or --lengths to it.
    overrides = [*args.overrides, *(value for value in [*args.mixers, *args.lengths] if "=" in value)]
    mixers = [value for value in args.mixers if "=" not in value]
    try:
        lengths = [int(at_least(int, 1)(value)) for value in args.lengths if "=" not in value]
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(f"argument --lengths: {error}")

    from mixerlab.lm.model.cost import costs
    from mixerlab.lm.model.match import sized
    from mixerlab.lm.recipe.check import mixers_of
    from mixerlab.lm.recipe.load import load_recipe

    logging.basicConfig(format="%(message)s")
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    columns: dict[str, dict[str, str]] = {}
    for mixer in mixers or [""]:
        chosen = [f"model.mixer={mixer}"] if mixer else []
        recipe = sized(load_recipe(args.recipe, [*overrides, *chosen], allow_plugins=args.allow_plugins))
        names = ", ".join(choice.name for choice in mixers_of(recipe))
        columns[mixer or names] = costs(recipe, lengths)
    table = Table(title=escape(args.recipe), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for mixer in columns:
        table.add_column(escape(mixer), justify="right")
    for quantity in next(iter(columns.values())):
        table.add_row(quantity, *(column[quantity] for column in columns.values()))
    console = Console(emoji=False)  # ":x:" in a path is no picture
    if not console.is_terminal:
        console.width = 200  # a file has no width to fit into
    console.print(table)
    return 0
