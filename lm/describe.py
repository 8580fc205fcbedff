"""What a recipe's decoder costs, for one or several mixers side by side: python -m lm.describe RECIPE"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data import DataError
from lm.config import ConfigError, Recipe, load_recipe
from lm.run import build_decoder, make_data

EXAMPLES = """
examples:
  python -m lm.describe recipes/quickstart.yaml
  python -m lm.describe recipes/quickstart.yaml --mixers sessa attention mamba2 '[mamba2, sessa]'
  python -m lm.describe recipes/quickstart.yaml model.match_params=10M --mixers sessa mamba2
  python -m lm.describe recipes/fineweb-125m.yaml --lengths 2048 16384 131072
"""


def describe(recipe: Recipe, lengths: Sequence[int] = ()) -> dict[str, str]:
    """Quantity -> value of the recipe's decoder, in the order of the table. No parameter is allocated.

    FLOPs and decoding state are given at each of `lengths`, by default the recipe's own and 16 times that.
    """
    data = make_data(recipe)
    with torch.device("meta"):
        decoder = build_decoder(recipe, data.vocab_size)
    rows = {"d_model": str(recipe.model.d_model), "layers": str(recipe.model.n_layers)}
    rows |= {f"{group} parameters": f"{number:,}" for group, number in decoder.parameter_groups().items()}
    rows["all parameters"] = f"{sum(p.numel() for p in decoder.parameters()):,}"
    state_dtype = torch.bfloat16 if recipe.trainer.precision == "bf16-true" else torch.float32
    for length in lengths or (data.seq_len, 16 * data.seq_len):
        rows[f"training FLOPs/token, T = {length}"] = si(3 * decoder.flops(length) / length)
        state = sum(block.mixer.state_bytes(length, state_dtype) for block in decoder.layers)
        rows[f"decoding state, T = {length}"] = size(state)
    return rows


def si(number: float) -> str:
    """Three digits and a prefix: 1234567 -> "1.23M"."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:  # which rounds to the unit
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def size(number: float) -> str:
    """Bytes in the largest unit of which there are some tenths."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit / 10:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f} B"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lm.describe",
        description="Print parameters by group, training FLOPs and the size of the decoding state. Needs no data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")
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
        type=_length,
        default=[],
        metavar="T",
        help="default: the recipe's, and 16 times it",
    )
    args = parser.parse_args(arguments)
    # argparse gives all that follows --mixers to it.
    overrides = [*args.overrides, *(value for value in args.mixers if "=" in value)]
    mixers = [value for value in args.mixers if "=" not in value]

    logging.basicConfig(format="%(message)s")
    logging.getLogger("mixerlab").setLevel(logging.INFO)
    columns: dict[str, dict[str, str]] = {}
    try:
        for mixer in mixers or [""]:
            recipe = load_recipe(args.recipe, [*overrides, *([f"model.mixer={mixer}"] if mixer else [])])
            columns[mixer or _label(recipe.model.mixer)] = describe(recipe, args.lengths)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=args.recipe, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for mixer in columns:
        table.add_column(escape(mixer), justify="right")
    for quantity in next(iter(columns.values())):
        table.add_row(quantity, *(column[quantity] for column in columns.values()))
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width to fit into
    console.print(table)
    return 0


def _label(mixer: dict | list[dict]) -> str:
    return mixer["name"] if isinstance(mixer, dict) else f"[{', '.join(map(_label, mixer))}]"


def _length(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of positions, at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
