"""What a recipe's decoder costs: parameters, FLOPs, decoding state."""

from collections.abc import Sequence

import torch

from mixerlab.data import build_data
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.schema import Recipe


def costs(recipe: Recipe, lengths: Sequence[int] = ()) -> dict[str, str]:
    """Quantity -> value of the recipe's decoder, in the order of a table. No parameter is allocated.

    FLOPs and decoding state are given at each of `lengths`, by default the recipe's own and 16 times that.
    """
    data = build_data(recipe.data, recipe.seed)
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
