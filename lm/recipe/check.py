"""From plain mappings to a Recipe that can be run, or an error that names the key."""

from collections.abc import Mapping
from typing import Any

from mixerlab.data import DATA
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers import choose_mixers, without_segments
from mixerlab.options import Choice, ConfigError, check_options, report_problems


def check_recipe(raw: Mapping[str, Any], check_data: bool = True) -> Recipe:
    """Plain mappings -> Recipe, typed to its leaves. Raises ConfigError at the first thing that is wrong.

    Without `check_data` the files that the data names may have gone, as those of an old run.
    """
    if "strategy" in raw:
        raw = {**raw, "strategy": named(raw["strategy"])}
    recipe = check_options(Recipe, raw)
    for section in ("model", "optim", "trainer", "strategy"):
        report_problems(getattr(recipe, section), section)
    if recipe.strategy.name == "fsdp" and recipe.trainer.precision == "bf16-true":
        raise ConfigError(
            "trainer.precision = 'bf16-true': fsdp keeps one dtype of weights; expected bf16-mixed, with "
            "strategy.param_dtype=bfloat16 for less traffic"
        )
    width = recipe.model.d_model if recipe.model.is_sized else None
    recipe.model.mixer = choose_mixers(recipe.model.mixer, "model.mixer", width)
    recipe.data = DATA.choose(recipe.data, "data")
    if check_data:
        with DATA.naming(recipe.data.name, "data"):
            report_problems(recipe.data.options, "data")
    if getattr(recipe.data.options, "pack", False):
        for name in (name for mixer in mixers_of(recipe) for name in without_segments(mixer)):
            raise ConfigError(
                f"data.pack = true: mixer {name!r} cannot keep packed documents apart; set data.pack=false"
            )
    return recipe


def mixers_of(recipe: Recipe) -> list[Choice]:
    """The mixers that are repeated over the depth."""
    return recipe.model.mixer if isinstance(recipe.model.mixer, list) else [recipe.model.mixer]


def named(section: Any) -> Any:
    """A section with a choice in it, given by name alone, as a mapping."""
    return {"name": section} if isinstance(section, str) else section
