"""Data modules by name: what a recipe's `data.name` is looked up in."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar

from data.module import DataModule

DataClass = TypeVar("DataClass", bound=type[DataModule])

DATA_MODULES: dict[str, tuple[type, type[DataModule]]] = {}
"""name -> (config dataclass, data module)."""


def register_data(name: str, config_class: type) -> Callable[[DataClass], DataClass]:
    """Class decorator: from now on `name` in a recipe means this module, and `config_class` is its schema.

    `config_class` is a dataclass with a field `name`, by default this name; its fields all have defaults and
    a `help` in their metadata. It may have a method `problems()` that yields (field, what would be right) for
    values that do not fit together.
    """

    def register(data_class: DataClass) -> DataClass:
        if not is_dataclass(config_class):
            raise TypeError(
                f"the config class of data module {name!r} must be a dataclass, not {config_class!r}"
            )
        known = DATA_MODULES.get(name, (None, data_class))[1]
        # A module imported a second time registers another class of the same names.
        if (known.__module__, known.__qualname__) != (data_class.__module__, data_class.__qualname__):
            raise ValueError(f"a data module named {name!r} is registered already: {known}")
        DATA_MODULES[name] = (config_class, data_class)
        return data_class

    return register


def data_names() -> list[str]:
    """The names that `data.name` may have."""
    return sorted(DATA_MODULES)


def data_config(name: str) -> type:
    """The config dataclass of a data module; ValueError with the nearest name if there is none."""
    return _lookup(name)[0]


def build_data(config: Any, seed: int) -> DataModule:
    """The data module that `config` (an instance of its config dataclass) describes. Touches no data."""
    return _lookup(config.name)[1](config, seed)


def _lookup(name: str) -> tuple[type, type[DataModule]]:
    if name not in DATA_MODULES:
        near = difflib.get_close_matches(str(name), data_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown data module {name!r}: {hint}valid: {', '.join(data_names())}")
    return DATA_MODULES[name]
