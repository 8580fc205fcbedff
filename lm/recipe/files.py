"""The mappings in recipe files: their bases under them, and nothing trusted that lies in a run folder."""

import difflib
import io
import re
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixerlab.lm.recipe.check import named
from mixerlab.lm.recipe.schema import HORIZONS
from mixerlab.options import ConfigError, first_line
from mixerlab.sealed import NOTED, read_noted

SHIPPED = Path(str(resources.files("mixerlab") / "recipes"))


def find_recipe(source: str | Path, folder: Path = Path()) -> Path:
    """The file of a recipe: a path, from here or from `folder`, or the name of one that comes with mixerlab."""
    for path in (Path(source), folder / source, SHIPPED / source, SHIPPED / f"{source}.yaml"):
        try:
            if path.is_file():
                return path
        except OSError as error:  # a name that is too long, or a folder that must not be looked into
            raise ConfigError(f"recipe {source}: {error.strerror}") from None
    raise ConfigError(f"recipe {source}: no such file{_near_file(Path(source))}")


def _near_file(path: Path) -> str:
    here = path.parent
    if not here.is_dir():
        return f" (nor is there a folder {here})"
    files = [*sorted((here / "recipes").glob("*.yaml")), *sorted(here.glob("*.yaml"))]
    offered = {p.stem: p.stem for p in SHIPPED.glob("*.yaml")} | {p.name: str(p) for p in files}
    near = difflib.get_close_matches(path.name, offered, n=1)
    return f"; did you mean {offered[near[0]]}?" if near else f"; there are: {', '.join(offered.values())}"


def read_with_bases(path: Path, allow_plugins: bool = False, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, laid over that of its `base:`. Raises ConfigError."""
    if path.resolve() in seen:
        raise ConfigError(f"base: {path} is its own base, by way of {' -> '.join(map(str, seen))}")
    if _is_saved(path.resolve()):
        return read_saved(path, allow_plugins)
    try:
        raw = _mapping(path, path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"recipe {path}: not valid YAML: {first_line(error)}") from None
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r} in {path}: expected the path of a recipe, relative to this one")
    candidates = (path.parent / base, SHIPPED / base, SHIPPED / f"{base}.yaml")
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise ConfigError(f"base = {base!r} in {path}: no such file as {path.parent / base}")
    allow_plugins = allow_plugins or "plugins" in raw
    return merge(read_with_bases(found, allow_plugins, (*seen, path.resolve())), raw)


def _mapping(path: Path, text: str) -> dict[str, Any]:
    """What a YAML text, the content of `path`, says. Raises ConfigError."""
    try:
        raw = container(OmegaConf.load(io.StringIO(text)))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"recipe {path}:{where} not valid YAML: {what}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path}: expected a mapping of sections, found {type(raw).__name__}")
    if not raw:
        raise ConfigError(f"recipe {path}: it is empty; expected sections such as model, data, trainer")
    return raw


def _is_saved(path: Path) -> bool:
    """Whether a file is the recipe of a run folder, or of a point of a sweep, which we wrote, here or elsewhere."""
    is_noted = (path.parent / NOTED).exists()
    return is_noted or (path.name == "recipe.yaml" and (path.parent / "checkpoints").exists())


LONGEST_SAVED, MOST_BRACKETS = 10**6, 500
"""Bytes of a saved recipe, and brackets that open in it; of ours some thousand and a few dozen. PyYAML takes time that
grows faster than their square."""


def too_odd(text: str) -> str | None:
    """Why a saved recipe of this text would not be read again, or None."""
    if len(text.encode()) > LONGEST_SAVED:
        return f"it has over {LONGEST_SAVED} bytes"
    if text.count("[") + text.count("{") > MOST_BRACKETS:
        return f"it has over {MOST_BRACKETS} brackets"
    return None


def read_saved(path: Path, allow_plugins: bool = False) -> dict[str, Any]:
    """The mapping in the recipe of a run folder, which may be a stranger's: nothing is imported or looked up for it.

    Raises ConfigError where it is damaged, holds what training never writes, or names plug-ins that are not allowed.
    """
    try:
        # Before it is read: it may be larger than the memory.
        text = "" if path.stat().st_size > LONGEST_SAVED else read_noted(path)
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if problem := too_odd(text) if text else f"it has over {LONGEST_SAVED} bytes":
        raise ConfigError(f"{path}: {problem}, so it is no recipe of a run")
    if _has_aliases(text):  # a few of which can stand for more than any memory holds
        raise ConfigError(f"{path}: it has YAML aliases, which a run's recipe does not")
    raw = _mapping(path, text)
    for value in _texts(raw):
        if re.search(r"(?<!\\)(\\\\)*\$\{", value):
            raise ConfigError(
                f"{path}: {value!r} is an interpolation, which is not resolved in the recipe of a run; expected a value"
            )
    model = raw.get("model")
    match = model.get("match") if isinstance(model, dict) else None
    for key, other in (("base", raw.get("base")), ("model.match", match)):
        if other is not None:
            raise ConfigError(
                f"{path}: {key} = {other!r}: the recipe of a run depends on no other; leave it out"
            )
    plugins = raw.get("plugins")
    names = [name for name in (plugins if isinstance(plugins, list) else [plugins]) if isinstance(name, str)]
    # What this process has imported already runs nothing more.
    if not allow_plugins and (unknown := [name for name in names if name not in sys.modules]):
        raise ConfigError(
            f"{path}: plugins = {plugins!r}: reading that run would import and run {unknown[0]!r}; if you trust it, "
            "give --allow-plugins (from Python allow_plugins=True), or name it in the plugins of a recipe of your own"
        )
    return raw


def _has_aliases(text: str) -> bool:
    try:
        return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))
    except yaml.YAMLError:
        return False


def _texts(tree: Any) -> Iterator[str]:
    """Every text in mappings and lists, keys included."""
    if isinstance(tree, dict):
        for item in tree.items():
            yield from _texts(list(item))
    elif isinstance(tree, list):
        for item in tree:
            yield from _texts(item)
    elif isinstance(tree, str):
        yield tree


def container(config: Any, resolve: bool = False) -> dict[str, Any]:
    """A config of OmegaConf as plain mappings and lists; `resolve` replaces interpolations."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def merge(old: Any, new: Any, path: str = "") -> Any:
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
    for key, other in (("accumulate", "rows_per_step"), ("rows_per_step", "accumulate")):
        if path == "trainer" and new.get(key) is not None:
            merged.pop(other, None)  # of which one is enough
    for key, value in new.items():
        full = f"{path}.{key}" if path else str(key)
        merged[key] = merge(merged[key], value, full) if key in merged else value
    return merged
