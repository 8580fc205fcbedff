"""Writes docs/recipes.md, every key of a recipe, from the dataclasses: python -m lm.docs"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from data import data_config, data_names
from lm.config import Recipe, describe
from mixers import mixer_class, mixer_config, registered_names

PATH = Path(__file__).parent.parent / "docs" / "recipes.md"

INTRODUCTION = """\
# Recipes

<!-- Written by `python -m lm.docs` from the dataclasses. Change those, not this page. -->

A recipe is a YAML file; `python train.py RECIPE key=value ...` trains it. What is not given has its default;
a recipe may build on another with `base: other.yaml` (a path relative to its own), and `key=value` on the
command line comes last. `--print-config` prints the whole, defaults included.

A mixer or data module given by name alone (`model.mixer=attention`) replaces the whole section, options
included; so does another `name` in a mapping. Options of the same name are merged. Another horizon (`steps`,
`epochs`, `tokens`) replaces the one that the recipe has.

Where an option of a mixer is itself a mixer (`mixers` of `parallel`, `below` of `selective_attention`), it is given in
the same way, with the options of that mixer's own section.
"""


def recipes_markdown() -> str:
    """The page's whole text."""
    parts = [INTRODUCTION]
    sections = [(f, typing.get_type_hints(Recipe)[f.name]) for f in fields(Recipe)]
    parts.append(_section("Top level", "", Recipe, [f for f, kind in sections if not is_dataclass(kind)]))
    for field, kind in sections:
        if is_dataclass(kind):
            parts.append(_section(f"`{field.name}`", f"{field.name}.", typing.cast(type, kind)))
    for name in registered_names():
        about = _first_line(mixer_class(name))
        schema = mixer_config(name)
        parts.append(_section(f"Mixer `{name}`", "model.mixer.", schema, about=about))
    for name in data_names():
        schema = data_config(name)
        about = _first_line(schema)
        options = [f for f in fields(schema) if f.name != "name"]
        parts.append(_section(f"Data `{name}`", "data.", schema, options, about))
    return "\n".join(parts)


def _first_line(documented: type) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def _section(title: str, prefix: str, schema: type, keys: list[Field] | None = None, about: str = "") -> str:
    lines = [f"## {title}", ""]
    if about:
        lines += [about, ""]
    keys = list(fields(schema)) if keys is None else keys
    if not keys:
        return "\n".join([*lines, "No options.", ""])
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    hints = typing.get_type_hints(schema)
    for key in keys:
        kind = " ".join([describe(hints[key.name]), *_limits(key)])
        cells = (f"`{prefix}{key.name}`", kind, f"`{_default(key)}`", key.metadata["help"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _limits(key: Field) -> Iterator[str]:
    words = {"min": "≥", "max": "≤", "above": ">", "below": "<"}
    for limit, word in words.items():
        if limit in key.metadata:
            yield f"{word} {key.metadata[limit]}"


def _default(key: Field) -> str:
    value: Any = key.default if key.default_factory is MISSING else key.default_factory()
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    PATH.write_text(recipes_markdown(), encoding="utf-8")
    print(f"wrote {PATH}")
