"""mixerlab keys: every key of a recipe, as the Markdown of docs/recipes.md."""

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="mixerlab keys",
        description="Print every key of a recipe with its type, default, limits and meaning, in Markdown.",
    ).parse_args(arguments)

    from mixerlab.lm.recipe.docs import recipes_markdown

    print(recipes_markdown(), end="")
    return 0
