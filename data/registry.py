"""Data modules by name: what a recipe's `data` is looked up in."""

from __future__ import annotations

from typing import Any

from mixerlab.data.module import DataModule
from mixerlab.options import Choice, Registry, report_problems

DATA: Registry[DataModule] = Registry("data module", "mixerlab.data")

register_data = DATA.register


def build_data(spec: Any, seed: int) -> DataModule:
    """The data module that `spec` names. Touches no data.

    `spec` is a Choice, which is used as it is; or a name, or a mapping with `name` and options, which are checked:
    raises ConfigError.
    """
    if not isinstance(spec, Choice):
        spec = DATA.choose(spec, "data")
        report_problems(spec.options, "data")
    return DATA.implementation(spec.name)(spec.options, seed)
