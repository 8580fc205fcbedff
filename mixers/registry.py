"""Mixers by name: what a recipe's `model.mixer` is looked up in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

from mixerlab.mixers.mixer import Mixer
from mixerlab.options import Choice, ConfigError, Registry, plain, report_problems

MIXERS: Registry[Mixer] = Registry("mixer", "mixerlab.mixers")
register_mixer = MIXERS.register


def choose_mixers(value: Any, path: str, d_model: int | None = None) -> Choice | list[Choice]:
    """A mixer's spec (its name, a mapping with `name` and options, or a Choice) or a list of them -> Choices.

    Every option is checked and filled in; those that hold mixers hold Choices then. Without `d_model` it is not
    asked whether options fit a width. `path` is the key that holds the value, for messages. Raises ConfigError.
    """
    if not isinstance(value, (list, tuple)):
        return _choose(value, path, d_model)
    if not value:
        raise ConfigError(f"{path} = []: expected at least one mixer; valid: {', '.join(MIXERS.names())}")
    return [_choose(item, f"{path}[{i}]", d_model) for i, item in enumerate(value)]


def _choose(spec: Any, path: str, d_model: int | None) -> Choice:
    choice = MIXERS.choose(spec, path)
    options = choice.options
    with MIXERS.naming(choice.name, path):
        if d_model is not None:
            report_problems(options, path, d_model)
        defaults = type(options)()
    chosen = {}
    for name in _mixer_fields(options):
        inner, default = getattr(options, name), getattr(defaults, name)
        if isinstance(inner, Mapping) and "name" not in inner and not isinstance(default, (list, tuple)):
            # Options alone, such as `model.mixer.below.d_state=4`, are those of the default mixer.
            inner = {**plain(MIXERS.choose(default, f"{path}.{name}")), **inner}
        chosen[name] = choose_mixers(inner, f"{path}.{name}", d_model)
    return Choice(choice.name, replace(options, **chosen))


def _mixer_fields(options: Any) -> list[str]:
    """The options whose values are specs of mixers, or lists of them."""
    return [field.name for field in fields(options) if field.metadata.get("mixers")]


def build_mixer(
    spec: str | Mapping[str, Any] | Choice, d_model: int, layer_index: int = 0, n_layers: int = 1
) -> Mixer:
    """Builds one mixer: a name, a mapping with `name` and options, or a Choice. Raises ConfigError."""
    choice = _choose(spec, "mixer", d_model)
    return MIXERS.implementation(choice.name)(choice.options, d_model, layer_index, n_layers)


def without_segments(chosen: Choice | list[Choice]) -> list[str]:
    """The names of the mixers that cannot keep packed documents apart, at any depth.

    `chosen` is what `choose_mixers` returned.
    """
    return _names_of(chosen, lambda mixer: not mixer.supports_segments)


def needing_triton(chosen: Choice | list[Choice]) -> list[str]:
    """The names of the mixers that run on a GPU alone, or else in Triton's interpreter, at any depth."""
    return _names_of(chosen, lambda mixer: mixer.contract.needs_triton)


def _names_of(chosen: Choice | list[Choice], wanted: Callable[[type[Mixer]], bool]) -> list[str]:
    if isinstance(chosen, list):
        return [name for choice in chosen for name in _names_of(choice, wanted)]
    names = [chosen.name] if wanted(MIXERS.implementation(chosen.name)) else []
    for field in _mixer_fields(chosen.options):
        names += _names_of(getattr(chosen.options, field), wanted)
    return names


def auto_backends(chosen: Choice | list[Choice]) -> Choice | list[Choice]:
    """The same mixers, at any depth, with the backend "auto", wherever a mixer's option `backend` has that default.

    `chosen` is what `choose_mixers` returned.
    """
    if isinstance(chosen, list):
        return [cast(Choice, auto_backends(choice)) for choice in chosen]
    options = chosen.options
    changed: dict[str, Any] = {
        field: auto_backends(getattr(options, field)) for field in _mixer_fields(options)
    }
    if getattr(type(options)(), "backend", None) == "auto":
        changed["backend"] = "auto"
    return Choice(chosen.name, replace(options, **changed))
