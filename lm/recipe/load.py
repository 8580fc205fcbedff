"""Recipes from files, names, Python and the command line, merged in order.

Defaults, then the `base:` recipe, then the recipe, then `key=value` overrides. Nothing is built on the way.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixerlab.lm.recipe.check import check_recipe, for_any_devices
from mixerlab.lm.recipe.files import container, find_recipe, merge, read_saved, read_with_bases
from mixerlab.lm.recipe.schema import HORIZONS, ModelConfig, Recipe
from mixerlab.options import ConfigError, first_line, plain, show, with_new_names

Overrides = Sequence[str]


def load_recipe(
    source: str | Path | Recipe,
    overrides: Overrides = (),
    *,
    check_data: bool = True,
    allow_plugins: bool = False,
    **sections: Any,
) -> Recipe:
    """Reads a recipe with its bases and overrides; returns it checked and whole.

    Args:
        source: a YAML file, the name of a recipe that comes with mixerlab (`quickstart`), or a Recipe to change.
        overrides: `key=value` texts, as on the command line.
        check_data: whether the files that the data names must be there.
        allow_plugins: import the `plugins` that the recipe.yaml of a run folder names; it may be a stranger's.
        sections: the same from Python: `model={"mixer": "attention"}, seed=1`.

    Raises:
        ConfigError: the message names the key, its value, and what would be right.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    layers = [*map(parse_override, overrides), _escaped(plain(sections))]
    if isinstance(source, Recipe):
        raw, name, folder = _escaped(plain(source)), source.name, Path()
    else:
        path = find_recipe(source)
        allow_plugins = allow_plugins or any("plugins" in layer for layer in layers)  # instead of the file's
        raw, name, folder = read_with_bases(path, allow_plugins), path.stem, path.parent
        raw.pop("sweep", None)  # of which this recipe is a part
    try:
        return from_layers(raw, layers, name, folder, check_data)
    except ConfigError as error:
        wrong = str(error).partition(" = ")[0]
        if any(override.startswith(f"{wrong}=") and "," in override for override in overrides):
            raise ConfigError(
                f"{error}; `mixerlab sweep` takes several values, with commas between"
            ) from None
        raise


def sweep_section(source: str | Path, allow_plugins: bool = False) -> Any:
    """What the recipe's file has under `sweep`: keys, and for each a list of values; {} without it."""
    return read_with_bases(find_recipe(source), allow_plugins).get("sweep") or {}


def from_layers(
    raw: dict[str, Any], layers: list[dict[str, Any]], name: str | None, folder: Path, check_data: bool
) -> Recipe:
    """The recipe of a file's mapping and what is laid over it; `folder` is where other recipes are looked for."""
    _refuse_both(layers, *HORIZONS)
    _refuse_both(layers, "accumulate", "rows_per_step")
    for key in (f.name for layer in layers for f in fields(Recipe) if layer.get(f.name, f) is None):
        if is_dataclass(getattr(Recipe(), key)) or key == "data":
            raise ConfigError(f"{key} = null: expected options of that section, such as {key}.KEY=VALUE")
    changes: dict[str, Any] = {}
    for layer in layers:
        changes = merge(changes, layer)
    merged = merge({"model": {"mixer": ModelConfig.mixer}, "data": Recipe.data}, raw)
    for layer in layers:
        merged = merge(merged, layer)
    try:
        merged = container(OmegaConf.create(merged), resolve=True)  # interpolations
    except OmegaConfBaseException as error:
        raise ConfigError(f"{folder / (name or '')}.yaml: {first_line(error)}") from None
    _import_plugins(merged.get("plugins"))
    recipe = check_recipe(merged, check_data)
    recipe.name = name if recipe.name is None else recipe.name
    for key in ("name", "label"):
        value = getattr(recipe, key)
        if value is not None and not is_folder_name(value):
            expected = f"expected the name of a folder, without slashes, of at most {LONGEST_NAME} characters"
            raise ConfigError(f"{key} = {value!r}: {expected}")
    if changes.get("label") is None:
        recipe.label = label(changes, recipe.label)
    if recipe.model.match is not None:
        recipe.model.match = str(find_recipe(recipe.model.match, folder))
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; training from this text repeats the run."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(plain(replace(for_any_devices(recipe), resume=None)))))


def is_folder_name(text: str) -> bool:
    parts = text not in ("", ".", "..") and not re.search(r"[/\\]", text)
    return parts and text.isprintable() and len(text.encode(errors="replace")) <= LONGEST_NAME


def _escaped(tree: Any) -> Any:
    """Text that only looks like an interpolation, as it is read again."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    return re.sub(
        r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", tree
    )  # backslashes in front count double


def differing_keys(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two recipes (as from `plain`) differ: (full key, value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from differing_keys(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif a != b:
        yield path, a, b


UNLABELLED = tuple(
    f"{key}."
    for key in (
        *("name", "label", "resume", "plugins", "logging", "strategy"),
        *("data.cache_dir", "data.verify_cache", "data.num_proc"),
        *("trainer.num_workers", "trainer.max_time", "trainer.async_checkpoint"),
    )
)
"""Keys that say where and how a run trains, and do not tell one of an ablation from another."""
LONGEST_VALUE, LONGEST_LABEL, LONGEST_NAME = 32, 100, 128


def label(changes: dict[str, Any], before: str | None = None) -> str | None:
    """What tells a run from others of its recipe: `mixer=mamba2+sessa-lr=0.003`; None where nothing does.

    `before` is the label that the recipe has already, in which what is changed again is replaced.
    """
    changed = {key: value for key, value in _leaves(changes) if not f"{key}.".startswith(UNLABELLED)}
    if not changed:
        return before  # as it is: of one that was cut not all parts are known
    known = dict.fromkeys(re.split(r"-(?=[A-Za-z_]\w*=)", before)) if before else {}
    shown = {part.partition("=")[0]: part for part in known}
    for key, value in changed.items():
        name = key.removesuffix(".name").rpartition(".")[2]
        shown[name] = f"{name}={_short(value)}"
    parts = list(shown.values())
    whole = ""
    for n, part in enumerate(parts):
        if len(whole) + len(part) >= LONGEST_LABEL:
            return f"{whole}-and-{len(parts) - n}-more"
        whole += f"-{part}" if whole else part
    return whole or None


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        text = "+".join(map(_short, value))
    elif isinstance(value, dict):  # a mixer with options, in a list
        text = str(value.get("name", ""))
    else:
        text = f"{value:g}" if isinstance(value, float) else show(value).strip("'\"/").rpartition("/")[2]
    return re.sub(r"[^\w.+=-]+", "_", text, flags=re.ASCII)[:LONGEST_VALUE].strip("_") or "none"


def load_saved(path: Path, allow_plugins: bool = False) -> Recipe:
    """The recipe of a run folder: perhaps of an older version, and its data may have moved since."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    raw = with_new_names(read_saved(path, allow_plugins))
    return from_layers(raw, [], path.stem, path.parent, check_data=False)


def parse_override(override: str) -> dict[str, Any]:
    """A `key=value` of the command line as nested mappings. Raises ConfigError."""
    key, equals, _ = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"override {override!r}: expected key=value, such as model.mixer=attention")
    try:
        return container(OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {first_line(error)}"
        ) from None


def _refuse_both(layers: list[dict[str, Any]], *keys: str) -> None:
    sections = [layer["trainer"] for layer in layers if isinstance(layer.get("trainer"), dict)]
    given = {key: s[key] for s in sections for key in keys if s.get(key) is not None}
    if len(given) > 1:
        shown = " and ".join(f"trainer.{key} = {show(value)}" for key, value in given.items())
        raise ConfigError(f"{shown}: expected exactly one of them")


def _import_plugins(plugins: Any) -> None:
    if plugins is None:
        return
    plugins = [plugins] if isinstance(plugins, str) else plugins
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f"plugins = {plugins!r}: expected a list of module names")
    for name in plugins:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a plug-in does, the message must name it
            hint = ""
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                hint = "; it must be installed, or its folder be on PYTHONPATH"
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(f"plugins: importing {name!r} failed: {reason}{hint}") from error
