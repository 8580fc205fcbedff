"""Widths that give a decoder a wanted number of parameters, so that mixers are compared at the same size.

Letters: D model width, F MLP width.
"""

import logging
import math
from dataclasses import replace
from functools import cache

from mixerlab.lm.model.blocks import MLP_RATIO
from mixerlab.lm.model.decoder import count_parameters
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers import choose_mixers
from mixerlab.options import ConfigError

logger = logging.getLogger("mixerlab.match")

TOLERANCE = 0.01
FAR = 0.1
MLP_PLAY = 1 / 8
"""How far F may be from its usual multiple of D, as a share of it, so that D can be a round number."""
GAP = 4096
"""More widths in a row than a sensible choice of heads forbids."""
DIVISIBLE = 20160
"""A width that most numbers of heads divide, to ask what else is wrong."""
REACH = 0.2
"""How far from the crossing widths are tried: the count need not grow at every step, since head_dim varies."""


def sized(recipe: Recipe) -> Recipe:
    """The recipe with the widths that `model.match_params` or `model.match` asks for, and without these keys."""
    if (budget := recipe.model.budget()) is not None:
        return match_width(recipe, budget, f"model.match_params = {recipe.model.match_params}")
    if (other := recipe.model.match) is not None:
        matched = load_recipe(other, check_data=False)
        if matched.model.match is not None:
            raise ConfigError(
                f"model.match = {other!r}: that recipe matches another itself; expected one with a width"
            )
        budget = count_parameters(sized(matched))
        return match_width(recipe, budget, f"model.match = {other} ({budget:,} parameters)")
    return recipe


def match_width(recipe: Recipe, budget: float, wanted: str) -> Recipe:
    """The recipe with the `model.d_model` that brings its decoder within 1% of `budget` parameters.

    Of the widths that do, the one that the largest power of 2 up to 64 divides is taken, and of those the
    closest: heads keep usual widths, and products are fast. A transformer block's MLP whose width the recipe
    leaves open is fitted as well. Where none does, because the heads given allow few widths, the closest is
    taken with a warning. Raises ConfigError if that is off by more than 10%. Messages call the request `wanted`.
    """
    model = recipe.model
    open_mlp = model.block == "transformer" and model.mlp != "none" and model.mlp_dim is None
    play = MLP_PLAY if open_mlp else 0.0

    @cache
    def count(d_model: int, mlp_dim: int | None) -> int:
        tried = replace(model, d_model=d_model, mlp_dim=mlp_dim, match=None, match_params=None)
        return count_parameters(replace(recipe, model=tried))

    @cache
    def valid(d_model: int) -> bool:
        try:
            choose_mixers(model.mixer, "model.mixer", d_model)
        except ConfigError:
            return False
        return True

    def usual(d_model: int) -> int | None:
        return round(MLP_RATIO[model.mlp] * d_model) if open_mlp else model.mlp_dim

    def next_valid(d_model: int) -> int:
        for width in range(d_model, d_model + GAP):
            if valid(width):
                return width
        choose_mixers(model.mixer, "model.mixer", DIVISIBLE)  # raises, with the reason
        raise ConfigError(f"{wanted}: no width from {d_model} to {width} suits the options in model.mixer")

    def too_small(d_model: int) -> bool:
        d_model = next_valid(d_model)
        return count(d_model, usual(d_model)) < budget

    def fit(d_model: int) -> tuple[int, int | None]:
        """Parameters at this width, and F."""
        width = usual(d_model)
        number = count(d_model, width)
        if not open_mlp or width is None:
            return number, width
        each = count(d_model, width + 1) - number
        exact = width + min(max((budget - number) / each, -play * width), play * width)
        # A multiple of 8 if that is near enough.
        fits = [(number + (f - width) * each, f) for f in (8 * round(exact / 8), round(exact))]
        return fits[0] if fits[0][1] and _error(fits[0][0], budget) <= TOLERANCE else fits[1]

    low, high = 0, 1
    while too_small(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    around = range(math.floor(high * (1 - REACH)), math.ceil(high * (1 + REACH)) + 1)
    near = [d for d in {low, next_valid(high), *around} if d > 0 and valid(d)]
    near.sort(key=lambda d: (-math.gcd(d, 64), abs(d - high)))
    within = (d for d in near if _error(fit(d)[0], budget) <= TOLERANCE)
    d_model = next(within, None) or min(near, key=lambda d: _error(fit(d)[0], budget))
    number, mlp_dim = fit(d_model)
    chosen = f"d_model = {d_model}" + (f", mlp_dim = {mlp_dim}" if open_mlp else "")
    found = f"{wanted}: {chosen} gives {number:,} parameters, {number / budget - 1:+.2%}"
    if _error(number, budget) > FAR:
        raise ConfigError(f"{found}; no width comes closer with the other options as they are")
    if _error(number, budget) > TOLERANCE:
        logger.warning(
            "%s: the closest there is with the mixer's heads and the other options as they are", found
        )
    else:
        logger.info(found)
    found_model = replace(model, d_model=d_model, mlp_dim=mlp_dim, match=None, match_params=None)
    return replace(recipe, model=found_model)


def _error(number: int, budget: float) -> float:
    return abs(number / budget - 1)
