"""From lists of values to the runs of a sweep: the product of the lists, each point a whole recipe."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import yaml

from mixerlab.lm.model.cost import Cost, cost
from mixerlab.lm.model.match import sized
from mixerlab.lm.recipe.check import for_devices
from mixerlab.lm.recipe.files import merge
from mixerlab.lm.recipe.load import UNLABELLED, label, load_recipe, parse_override, sweep_section
from mixerlab.lm.recipe.schema import ModelConfig, Recipe
from mixerlab.options import ConfigError, show

OPENING, CLOSING = "[{(", "]})"


@dataclass(frozen=True)
class Point:
    """One run of a sweep, and what is known of it before it trains."""

    label: str
    """End of the run's name; no other point of the sweep has it."""
    values: dict[str, str]
    """Key -> value, of the keys that the sweep has lists for, as the command line writes them."""
    parameters: int
    step_rows: int
    """Of an optimiser step, over all devices."""
    row_flops: float
    """Of training on a row."""
    state_bytes: int
    """Of decoding a row of the recipe's length."""
    steps: int | None
    """Optimiser steps; None where it takes the data to tell."""


def split_values(text: str) -> list[str]:
    """The values of a list on the command line: commas inside brackets or quotation marks belong to a value."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in OPENING or character in CLOSING:
            depth += 1 if character in OPENING else -1
        if character == "," and not quote and depth <= 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def grid_of(source: str, overrides: Sequence[str], allow_plugins: bool = False) -> dict[str, list[str]]:
    """Key -> its values, from the recipe's `sweep:` and the command line, which comes last. Raises ConfigError."""
    section = sweep_section(source, allow_plugins)
    if not isinstance(section, dict):
        raise ConfigError(f"sweep = {show(section)}: expected a mapping of keys to lists of values")
    grid: dict[str, list[str]] = {}
    for key, values in section.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"sweep.{key} = {show(values)}: expected a list of at least one value")
        grid[str(key)] = [_as_text(value) for value in values]
    for override in overrides:
        key, _, text = override.partition("=")
        values = split_values(text)
        if len(values) > 1 and "" in values:
            raise ConfigError(f"{key} = {text!r}: an empty value; expected values with commas between them")
        if len(values) > 1 or key in grid:
            grid[key] = values
    for key, values in grid.items():
        if len(values) > 1 and f"{key}.".startswith(UNLABELLED):
            raise ConfigError(
                f"{key} = {','.join(values)!r}: expected one value, for it says how a run is called or trained, not "
                "what it learns"
            )
    if not grid:
        raise ConfigError(
            f"{source}: nothing to sweep over; give a key several values, such as seed=0,1, or the recipe a section "
            "`sweep:` with lists"
        )
    return grid


def _as_text(value: Any) -> str:
    """A value of YAML as the command line writes it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def plan(source: str, overrides: Sequence[str], allow_plugins: bool = False) -> list[tuple[Point, Recipe]]:
    """The points of a sweep, in the order of the lists, each with its recipe, whole and sized. Raises ConfigError.

    Plug-ins that a recipe of a run folder names are imported with `allow_plugins`, or where `plugins=` is given.
    """
    allow_plugins = allow_plugins or any(override.startswith("plugins=") for override in overrides)
    grid = grid_of(source, overrides, allow_plugins)
    given = [override.partition("=")[0] for override in overrides]
    planned: list[tuple[Point, Recipe]] = []
    costs: dict[str, tuple[ModelConfig, Cost]] = {}  # by model and data: to find a width takes a second
    same: dict[str, str] = {}  # what is trained -> which point does
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        point = {key: f"{key}={value}" for key, value in values.items()}
        # In the order of the command line: a choice drops the options that stand before it.
        layers = [point.get(key, override) for key, override in zip(given, overrides, strict=True)]
        layers = [*(point[key] for key in grid if key not in given), *layers]
        recipe = load_recipe(source, layers, allow_plugins=allow_plugins)
        if recipe.resume is not None:
            raise ConfigError(f"resume = {recipe.resume!r}: a sweep goes on by itself; leave it out")
        if recipe.strategy.devices == "auto":
            recipe = replace(recipe, strategy=replace(recipe.strategy, devices=1))
        if "name" not in given:
            recipe.name = f"{recipe.name}-sweep"
        costly = repr((recipe.model, recipe.data, recipe.trainer.precision))
        if costly not in costs:
            recipe = sized(recipe)
            costs[costly] = recipe.model, cost(recipe)
        model, found = costs[costly]
        varied = reduce(merge, map(parse_override, point.values()))
        name = label(varied) or "run"
        taken = [point.label for point, _ in planned]
        if _are_confused(name, taken):  # long values are cut
            name = next(f"{name}-v{n}" for n in itertools.count(2) if f"{name}-v{n}" not in taken)
        recipe = replace(recipe, model=model, label=name)
        if (other := same.setdefault(repr(replace(recipe, label=None)), name)) != name:
            raise ConfigError(f"{' '.join(point.values())}: the same run as {other}; leave one of them out")
        planned.append((_point(recipe, name, values, found), recipe))
    return planned


def _are_confused(label: str, others: Iterable[str]) -> bool:
    """Whether a run of one could be taken for that of another: runs of one minute have a number behind the label."""
    pairs = [pair for other in others for pair in ((label, other), (other, label))]
    return any(re.fullmatch(rf"{re.escape(a)}(-\d+)?", b) for a, b in pairs)


def _point(recipe: Recipe, label: str, values: dict[str, str], cost: Cost) -> Point:
    devices = int(recipe.strategy.devices) * recipe.strategy.num_nodes
    trainer = for_devices(recipe, devices).trainer
    rows, steps = trainer.step_rows(devices), trainer.steps
    if trainer.tokens is not None:
        steps = math.ceil(trainer.tokens / (rows * cost.seq_len))
    return Point(label, values, cost.parameters, rows, cost.row_flops, cost.state_bytes, steps)
