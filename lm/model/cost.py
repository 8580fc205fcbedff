"""What a recipe's decoder costs: parameters, FLOPs, decoding state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixerlab.data import build_data
from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.recipe.schema import Recipe


@dataclass(frozen=True)
class Cost:
    """Of a recipe's decoder, at the length of its rows."""

    parameters: int
    row_flops: float
    """Of training on a row."""
    state_bytes: int
    """Of decoding a row."""
    seq_len: int


def cost(recipe: Recipe) -> Cost:
    """What the recipe's decoder costs. No parameter is allocated."""
    decoder, length = _on_meta(recipe)
    parameters = sum(p.numel() for p in decoder.parameters())
    return Cost(parameters, 3 * decoder.flops(length), _state_bytes(decoder, recipe, length), length)


def costs(recipe: Recipe, lengths: Sequence[int] = ()) -> dict[str, str]:
    """Quantity -> value of the recipe's decoder, in the order of a table. No parameter is allocated.

    FLOPs and decoding state are given at each of `lengths`, by default the recipe's own and 16 times that.
    """
    decoder, seq_len = _on_meta(recipe)
    rows = {"d_model": str(recipe.model.d_model), "layers": str(recipe.model.n_layers)}
    rows |= {f"{group} parameters": f"{number:,}" for group, number in decoder.parameter_groups().items()}
    rows["all parameters"] = f"{sum(p.numel() for p in decoder.parameters()):,}"
    for length in lengths or (seq_len, 16 * seq_len):
        rows[f"training FLOPs/token, T = {length}"] = si(3 * decoder.flops(length) / length)
        rows[f"decoding state, T = {length}"] = size(_state_bytes(decoder, recipe, length))
    return rows


def _on_meta(recipe: Recipe) -> tuple[Decoder, int]:
    """The recipe's decoder without numbers, and T of its rows."""
    data = build_data(recipe.data, recipe.seed)
    with torch.device("meta"):
        return build_decoder(recipe, data.vocab_size), data.seq_len


def _state_bytes(decoder: Decoder, recipe: Recipe, length: int) -> int:
    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16-true" else torch.float32
    return sum(block.mixer.state_bytes(length, dtype) for block in decoder.layers)


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
