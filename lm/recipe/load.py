"""Recipes from files, names, Python and the command line, merged in order.

Defaults, then the `base:` recipe, then the recipe, then `key=value` overrides. Nothing is built on the way.
"""

import difflib
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixerlab.lm.recipe.check import check_recipe, named
from mixerlab.lm.recipe.schema import HORIZONS, ModelConfig, Recipe
from mixerlab.options import ConfigError, first_line, plain, show, with_new_names

Overrides = Sequence[str]
SHIPPED = Path(str(resources.files("mixerlab") / "recipes"))


def load_recipe(
    source: str | Path | Recipe, overrides: Overrides = (), *, check_data: bool = True, **sections: Any
) -> Recipe:
    """Reads a recipe with its bases and overrides; returns it checked and whole.

    Args:
        source: a YAML file, the name of a recipe that comes with mixerlab (`quickstart`), or a Recipe to change.
        overrides: `key=value` texts, as on the command line.
        check_data: whether the files that the data names must be there.
        sections: the same from Python: `model={"mixer": "attention"}, seed=1`.

    Raises:
        ConfigError: the message names the key, its value, and what would be right.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    layers = [*map(_parse_override, overrides), _escaped(plain(sections))]
    if isinstance(source, Recipe):
        raw, name, folder = _escaped(plain(source)), source.name, Path()
    else:
        path = find_recipe(source)
        raw, name, folder = read_with_bases(path), path.stem, path.parent
    return from_layers(raw, layers, name, folder, check_data)


def from_layers(
    raw: dict[str, Any], layers: list[dict[str, Any]], name: str | None, folder: Path, check_data: bool
) -> Recipe:
    """The recipe of a file's mapping and what is laid over it; `folder` is where other recipes are looked for."""
    _refuse_two_horizons(layers)
    for key in (f.name for layer in layers for f in fields(Recipe) if layer.get(f.name, f) is None):
        if is_dataclass(getattr(Recipe(), key)) or key == "data":
            raise ConfigError(f"{key} = null: expected options of that section, such as {key}.KEY=VALUE")
    changes: dict[str, Any] = {}
    for layer in layers:
        changes = _merge(changes, layer)
    merged = _merge({"model": {"mixer": ModelConfig.mixer}, "data": Recipe.data}, raw)
    for layer in layers:
        merged = _merge(merged, layer)
    try:
        merged = _container(OmegaConf.create(merged), resolve=True)  # interpolations
    except OmegaConfBaseException as error:
        raise ConfigError(f"{folder / (name or '')}.yaml: {first_line(error)}") from None
    _import_plugins(merged.get("plugins"))
    recipe = check_recipe(merged, check_data)
    recipe.name = recipe.name or name
    for key in ("name", "label"):
        value = getattr(recipe, key)
        if value is not None and (
            len(value) > LONGEST_NAME or not re.fullmatch(r"(?!\.\.?$)[^/\\\0]+", value)
        ):
            expected = f"expected the name of a folder, without slashes, of at most {LONGEST_NAME} characters"
            raise ConfigError(f"{key} = {value!r}: {expected}")
    if changes.get("label") is None:
        recipe.label = label(changes, recipe.label)
    if recipe.model.match is not None:
        recipe.model.match = str(find_recipe(recipe.model.match, folder))
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; training from this text repeats the run."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(plain(replace(recipe, resume=None)))))


def _escaped(tree: Any) -> Any:
    """Text that only looks like an interpolation, as it is read again."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    return tree.replace("${", r"\${") if isinstance(tree, str) else tree


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
        *("data.cache_dir", "trainer.num_workers", "trainer.max_time"),
    )
)
"""Keys that say where and how a run trains, and do not tell one of an ablation from another."""
LONGEST_VALUE, LONGEST_LABEL, LONGEST_NAME = 32, 100, 128


def label(changes: dict[str, Any], before: str | None = None) -> str | None:
    """What tells a run from others of its recipe: `mixer=mamba2+sessa-lr=0.003`; None where nothing does.

    `before` is the label that the recipe has already, in which what is changed again is replaced.
    """
    known = dict.fromkeys(re.split(r"-(?=[A-Za-z_]\w*=)", before)) if before else {}
    shown = {part.partition("=")[0]: part for part in known}
    for key, value in _leaves(changes):
        if not f"{key}.".startswith(UNLABELLED):
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


def find_recipe(source: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: a path, from here or from `folder`, or the name of one that comes with mixerlab."""
    for path in (Path(source), folder / source, SHIPPED / source, SHIPPED / f"{source}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(f"recipe {source}: no such file{_near_file(Path(source))}")


def _near_file(path: Path) -> str:
    here = path.parent
    if not here.is_dir():
        return f" (nor is there a folder {here})"
    files = [*sorted((here / "recipes").glob("*.yaml")), *sorted(here.glob("*.yaml"))]
    offered = {p.stem: p.stem for p in SHIPPED.glob("*.yaml")} | {p.name: str(p) for p in files}
    near = difflib.get_close_matches(path.name, offered, n=1)
    return f"; did you mean {offered[near[0]]}?" if near else f"; there are: {', '.join(offered.values())}"


def read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, laid over that of its `base:`. Raises ConfigError."""
    if path.resolve() in seen:
        raise ConfigError(f"base: {path} is its own base, by way of {' -> '.join(map(str, seen))}")
    try:
        raw = _container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"recipe {path}:{where} not valid YAML: {what}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path}: expected a mapping of sections, found {type(raw).__name__}")
    if not raw:
        raise ConfigError(f"recipe {path}: it is empty; expected sections such as model, data, trainer")
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r} in {path}: expected the path of a recipe, relative to this one")
    candidates = (path.parent / base, SHIPPED / base, SHIPPED / f"{base}.yaml")
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ConfigError(f"base = {base!r} in {path}: no such file as {path.parent / base}")
    return _merge(read_with_bases(found, (*seen, path.resolve())), raw)


def load_saved(path: Path) -> Recipe:
    """The recipe of a run folder: perhaps of an older version, and its data may have moved since."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return from_layers(with_new_names(read_with_bases(path)), [], path.stem, path.parent, check_data=False)


def _container(config: Any, resolve: bool = False) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, _ = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"override {override!r}: expected key=value, such as model.mixer=attention")
    try:
        return _container(OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {first_line(error)}"
        ) from None


def _refuse_two_horizons(layers: list[dict[str, Any]]) -> None:
    sections = [layer["trainer"] for layer in layers if isinstance(layer.get("trainer"), dict)]
    given = {key: s[key] for s in sections for key in HORIZONS if s.get(key) is not None}
    if len(given) > 1:
        shown = " and ".join(f"trainer.{key} = {show(value)}" for key, value in given.items())
        raise ConfigError(f"{shown}: expected exactly one of them")


def _merge(old: Any, new: Any, path: str = "") -> Any:
    """`new` laid over `old`. Another choice in a section, or another horizon, drops what belonged to the old."""
    if path == "strategy":  # its name alone leaves the devices as they are
        old, new = named(old), named(new)
    is_choice = path == "data" or f"{path}.".startswith("model.mixer.")  # mixers inside mixers too
    if is_choice and isinstance(new, dict):
        old = named(old)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if is_choice and "name" in new and new["name"] != old.get("name"):
        return new
    merged = dict(old)
    if path == "trainer" and any(new.get(name) is not None for name in HORIZONS):
        merged = {key: value for key, value in merged.items() if key not in HORIZONS}
    for key, value in new.items():
        full = f"{path}.{key}" if path else str(key)
        merged[key] = _merge(merged[key], value, full) if key in merged else value
    return merged


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
