"""Every key of a recipe in Markdown, from the dataclasses: docs/recipes.md."""

import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import yaml

from mixerlab.data import DATA
from mixerlab.lm.recipe.loggers import LOGGERS
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers import MIXERS
from mixerlab.options import LIMITS, Choice, in_words

INTRODUCTION = """\
# Recipes

<!-- Written by `mixerlab keys` from the dataclasses. Change those, not this page. -->

A recipe is a YAML file; `mixerlab train RECIPE key=value ...` trains it, as `python train.py RECIPE ...` does in the
repository. RECIPE is a path, or the name of one that comes with mixerlab, such as `quickstart`. What is not given has
its default; a recipe may build on another with `base: other.yaml` (a path relative to its own), and `key=value` on the
command line comes last. `--print-config` prints the whole, defaults included.

A mixer or data module given by name alone (`model.mixer=attention`) replaces the whole section, options
included; so does another `name` in a mapping. Options of the same name are merged. Another horizon (`steps`,
`epochs`, `tokens`) replaces the one that the recipe has.

`logging.loggers` is a list of such names and mappings, `[tensorboard, {name: wandb, project: mine}]`: see
[logging.md](logging.md).

A section `sweep:`, of keys with a list of values each, is for `mixerlab sweep`: see [sweeps.md](sweeps.md).

Where an option of a mixer is itself a mixer (`mixers` of `parallel`, `below` of `selective_attention`), it is given in
the same way, with the options of that mixer's own section.
"""


def recipes_markdown() -> str:
    """The page's whole text."""
    parts = [INTRODUCTION]
    sections = [(f, typing.get_type_hints(Recipe)[f.name]) for f in fields(Recipe)]
    parts.append(_section("Top level", "", Recipe, [f for f, kind in sections if not _is_section(kind)]))
    for field, kind in sections:
        if _is_section(kind):
            parts.append(_section(f"`{field.name}`", f"{field.name}.", typing.cast(type, kind)))
    for title, key, registry in (("Mixer", "model.mixer.", MIXERS), ("Data", "data.", DATA)):
        for name in registry.registered():
            documented = registry.implementation(name)
            about = (documented.__doc__ or "").partition("\n")[0]
            parts.append(_section(f"{title} `{name}`", key, registry.config_class(name), about=about))
    for name, schema in LOGGERS.items():
        about = (schema.__doc__ or "").partition("\n")[0]
        parts.append(_section(f"Logger `{name}`", "", schema, about=about))
    return "\n".join(parts)


def _is_section(kind: Any) -> bool:
    return is_dataclass(kind) and kind is not Choice


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
        kind = " ".join([in_words(hints[key.name]), *_limits(key)])
        cells = (f"`{prefix}{key.name}`", kind, f"`{_default(key)}`", key.metadata["help"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _limits(key: Field) -> Iterator[str]:
    for limit, (_, sign, _) in LIMITS.items():
        if limit in key.metadata:
            yield f"{sign} {key.metadata[limit]}"


def _default(key: Field) -> str:
    value: Any = key.default if key.default_factory is MISSING else key.default_factory()
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
