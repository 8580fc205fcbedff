"""From plain mappings to a Recipe that can be run, or an error that names the key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mixerlab.data import DATA
from mixerlab.kernels.backend import INTERPRETED
from mixerlab.lm.recipe.loggers import choose_loggers
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers import auto_backends, choose_mixers, needing_triton, without_segments
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
    if recipe.logging.memory_every and recipe.strategy.name == "fsdp":
        raise ConfigError(
            f"logging.memory_every = {recipe.logging.memory_every}: with strategy.name = fsdp no rank has the whole "
            "decoder; expected 0, and `mixerlab memory RUN` afterwards"
        )
    recipe.logging.loggers = choose_loggers(recipe.logging.loggers, "logging.loggers")
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


def for_devices(recipe: Recipe, devices: int) -> Recipe:
    """The recipe with the `trainer.accumulate` that its rows a step ask for on so many devices. Raises ConfigError."""
    trainer = recipe.trainer
    rows, each = trainer.rows_per_step, trainer.batch_size * devices
    if rows is None:
        return recipe
    if rows % each:
        fitting = (
            f"a trainer.batch_size that divides {rows // devices}"
            if rows % devices == 0
            else f"a number of devices that divides {rows // trainer.batch_size}"
        )
        raise ConfigError(
            f"trainer.rows_per_step = {rows}: trainer.batch_size = {trainer.batch_size} x {devices} devices do not "
            f"divide it; expected {fitting}, or {_around(rows, each)} rows"
        )
    if trainer.accumulate not in (1, rows // each):
        raise ConfigError(
            f"trainer.accumulate = {trainer.accumulate}: trainer.rows_per_step = {rows} is {rows // each} x "
            f"trainer.batch_size = {trainer.batch_size} x {devices} devices; expected {rows // each}, or only one of "
            "them"
        )
    return replace(recipe, trainer=replace(trainer, accumulate=rows // each))


def for_cpu(recipe: Recipe) -> None:
    """Raises ConfigError for a mixer that a CPU cannot run."""
    names = [] if INTERPRETED else [name for mixer in mixers_of(recipe) for name in needing_triton(mixer)]
    if names:
        raise ConfigError(
            f"model.mixer: {names[0]!r} runs on a GPU alone, and this would train on a CPU; expected another mixer"
        )


def for_any_devices(recipe: Recipe) -> Recipe:
    """What `for_devices` was given: `trainer.accumulate` follows from the rows a step again, if they are given."""
    if recipe.trainer.rows_per_step is None:
        return recipe
    return replace(recipe, trainer=replace(recipe.trainer, accumulate=1))


def with_auto_backends(recipe: Recipe) -> Recipe:
    """The recipe for any device and dtype: no mixer in it, at any depth, names the backend of its operator."""
    return replace(recipe, model=replace(recipe.model, mixer=auto_backends(recipe.model.mixer)))


def _around(rows: int, each: int) -> str:
    """The multiples of `each` next to `rows`, in words."""
    below = rows // each * each
    return " or ".join(str(n) for n in (below, below + each) if n)


def mixers_of(recipe: Recipe) -> list[Choice]:
    """The mixers that are repeated over the depth."""
    return recipe.model.mixer if isinstance(recipe.model.mixer, list) else [recipe.model.mixer]


def named(section: Any) -> Any:
    """A section with a choice in it, given by name alone, as a mapping."""
    return {"name": section} if isinstance(section, str) else section
