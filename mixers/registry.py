"""Mixers by name: what a recipe's `model.mixer` is looked up in."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, TypeVar, get_type_hints

from mixers.mixer import Mixer

MixerClass = TypeVar("MixerClass", bound=type[Mixer])


class PluginError(ValueError):
    """An installed package promises a mixer and does not deliver it."""


ENTRY_POINTS = "mixerlab.mixers"
"""The group in which an installed package names its mixers: name -> the module that registers it."""

_REGISTRY: dict[str, tuple[type, type[Mixer]]] = {}


def register_mixer(name: str, config_class: type) -> Callable[[MixerClass], MixerClass]:
    """Class decorator: from now on `name` in a recipe means this mixer, with `config_class` as the schema.

    `config_class` is a dataclass whose fields all have defaults and a `help` in their metadata. It may have a
    method `problems(d_model)` that yields (option, what would be right) for values that do not fit together.
    A field with `"mixers": True` in its metadata holds the spec of a mixer inside this one, or a list of specs.
    """

    def register(mixer_class: MixerClass) -> MixerClass:
        if not is_dataclass(config_class):
            raise TypeError(f"the config class of mixer {name!r} must be a dataclass, not {config_class!r}")
        try:
            get_type_hints(config_class)
        except NameError as error:
            raise TypeError(
                f"the config class of mixer {name!r} has a type that is not defined: {error}"
            ) from error
        for field in fields(config_class):
            if field.default is MISSING and field.default_factory is MISSING:
                raise TypeError(f"the config class of mixer {name!r} has no default for {field.name}")
            if "help" not in field.metadata:
                raise TypeError(
                    f"the config class of mixer {name!r} has no help for {field.name}; expected "
                    'field(default=..., metadata={"help": "..."})'
                )
        known = _REGISTRY.get(name, (None, mixer_class))[1]
        # A module imported a second time registers another class of the same names.
        if (known.__module__, known.__qualname__) != (mixer_class.__module__, mixer_class.__qualname__):
            raise ValueError(f"a mixer named {name!r} is registered already: {known}")
        _REGISTRY[name] = (config_class, mixer_class)
        return mixer_class

    return register


def registered_names() -> list[str]:
    """The names of the mixers that have been imported: ours, and those of plug-ins in use."""
    return sorted(_REGISTRY)


def mixer_names() -> list[str]:
    """The names that `model.mixer` may have: registered, or installed and not yet imported."""
    return sorted({*_REGISTRY, *_installed(tuple(sys.path)).names})


@cache
def _installed(path: tuple[str, ...]) -> EntryPoints:
    """The entry points of the packages on `path`, which is sys.path: looking takes milliseconds."""
    return entry_points(group=ENTRY_POINTS)


def mixer_config(name: str) -> type:
    """The config dataclass of a mixer; ValueError with the nearest name if there is none."""
    return _lookup(name)[0]


def mixer_class(name: str) -> type[Mixer]:
    """The class of a mixer; ValueError with the nearest name if there is none."""
    return _lookup(name)[1]


def _lookup(name: str) -> tuple[type, type[Mixer]]:
    if name not in _REGISTRY:
        for entry_point in _installed(tuple(sys.path)).select(name=name):
            _load(entry_point)
    if name not in _REGISTRY:
        raise ValueError(f"unknown mixer {name!r}: {one_of(name, mixer_names())}")
    return _REGISTRY[name]


def _load(entry_point: EntryPoint) -> None:
    """Imports the module of an installed plug-in, which registers its mixer. Raises PluginError."""
    package = entry_point.dist.name if entry_point.dist else "?"
    where = f"mixer {entry_point.name!r} of the installed package {package!r}"
    try:
        entry_point.load()
    except (Exception, SystemExit) as error:  # whatever a plug-in does, the message must name it
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise PluginError(
            f"{where}: importing {entry_point.value!r} failed: {type(error).__name__}: {reason}"
        ) from error
    if entry_point.name not in _REGISTRY:
        raise PluginError(f"{where}: {entry_point.value!r} registers no mixer of that name")


def one_of(given: Any, valid: list[str]) -> str:
    """The part of an error message that says what is valid, with the nearest match first."""
    near = difflib.get_close_matches(str(given), valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(valid)}"


def build_mixer(
    spec: str | Mapping[str, Any], d_model: int, layer_index: int = 0, n_layers: int = 1
) -> Mixer:
    """Builds one mixer from `spec`: a name, or a mapping with `name` and the mixer's options.

    Raises ValueError naming the option, its value and what would be right.
    """
    name, config = _parse(spec)
    for option, expected in getattr(config, "problems", lambda d_model: ())(d_model):
        raise ValueError(f"mixer {name!r}: {option} = {getattr(config, option)!r}: {expected}")
    return mixer_class(name)(config, d_model, layer_index, n_layers)


def without_segments(spec: str | Mapping[str, Any]) -> list[str]:
    """The names of the mixers in `spec`, itself and those inside it, that cannot keep packed documents apart."""
    name, config = _parse(spec)
    names = [] if mixer_class(name).supports_segments else [name]
    for field in mixer_fields(type(config)):
        inner = getattr(config, field)
        for inner_spec in inner if isinstance(inner, (list, tuple)) else [inner]:
            names += without_segments(inner_spec)
    return names


def mixer_fields(config_class: type) -> list[str]:
    """The options of a config class whose values are specs of mixers, or lists of them."""
    return [field.name for field in fields(config_class) if field.metadata.get("mixers")]


def _parse(spec: str | Mapping[str, Any]) -> tuple[str, Any]:
    """A spec -> the mixer's name and its config."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in options:
        raise ValueError(f"a mixer needs a name, and {options} has none; {one_of('', mixer_names())}")
    name = options.pop("name")
    config_class = mixer_config(name)
    valid = [field.name for field in fields(config_class)]
    for option in options:
        if option not in valid:
            raise ValueError(f"mixer {name!r} has no option {option!r}: {one_of(option, valid)}")
    return name, config_class(**options)
