"""What the quickstart reaches with each mixer after the same steps, and what counting token pairs reaches.

    python benchmarks/quickstart.py [key=value ...] [--mixers sessa '[mamba2, sessa]' ...]

Trains the recipe once per mixer, nothing else changed. The bigram is counted on the training tokens and
measured on the same validation positions; its smoothing is the best of a grid on the validation split itself,
which favours it.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixerlab.data import Rows, build_data
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.training.fit import train

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def token_pairs(dataset: Rows, n_rows: int, vocab_size: int) -> np.ndarray:
    """Counts (V, V) of (token, next token) over the labelled positions of the first rows."""
    counts = np.zeros(vocab_size * vocab_size, dtype=np.int64)
    for i in range(n_rows):
        row = dataset[i]
        labelled = row["labels"] >= 0
        pairs = row["input_ids"][labelled] * vocab_size + row["labels"][labelled]
        counts += np.bincount(pairs.numpy(), minlength=counts.size)
    return counts.reshape(vocab_size, vocab_size)


def bigram_bits_per_byte(recipe: Recipe) -> float:
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    data.setup()
    assert data.token_bytes is not None
    training, validation = data.train_dataset(), data.val_datasets()["valid"]
    n_valid = len(validation)
    if recipe.trainer.val_batches is not None:
        n_valid = min(n_valid, recipe.trainer.val_batches * recipe.trainer.batch_size)
    seen = token_pairs(training, len(training), data.vocab_size).astype(np.float64)
    held_out = token_pairs(validation, n_valid, data.vocab_size)
    unigram = (seen.sum(0) + 1) / (seen.sum() + data.vocab_size)  # (V,)
    n_bytes = (held_out.sum(0) * data.token_bytes.numpy()).sum()

    def bits(strength: float) -> float:
        # Dirichlet smoothing towards the unigram distribution.
        p = (seen + strength * unigram) / (seen.sum(1, keepdims=True) + strength)
        return float(-(held_out * np.log2(p)).sum() / n_bytes)

    return min(bits(strength) for strength in (1, 3, 10, 30, 100, 300, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mixers", nargs="+", default=["sessa", "attention", "identity"], help="as model.mixer= takes them"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    console = Console()
    rows: list[tuple[str, str, str]] = []
    for mixer in args.mixers:
        name = re.sub(r"\W+", "-", f"quickstart-{mixer}").strip("-")
        recipe = load_recipe(RECIPE, [*args.overrides, f"model.mixer={mixer}", f"name={name}"])
        began = time.perf_counter()
        run = train(recipe, console=console)
        seconds = time.perf_counter() - began
        rows.append((mixer, f"{run.result['valid/bits_per_byte']:.3f}", f"{seconds:.0f} s"))
    rows.append(("(count bigram)", f"{bigram_bits_per_byte(load_recipe(RECIPE, args.overrides)):.3f}", ""))
    table = Table("mixer", "valid bits per byte", "time", title="quickstart, the same steps")
    for row in rows:
        table.add_row(escape(row[0]), *row[1:])
    console.print(table)


if __name__ == "__main__":
    main()
