"""A config.json whose values are asked for by name."""

import json
import math
from pathlib import Path
from typing import Any, Self

from mixerlab.options import ConfigError


class Published:
    """A mapping from a JSON file, whose values are asked for by name. What is wrong raises ConfigError."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def read(cls, path: Path) -> Self:
        """The mapping in a file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:  # not JSON, not UTF-8, or not readable
            raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {type(values).__name__} in JSON; expected a mapping")
        return cls(path, values)

    def problem(self, key: str, expected: str) -> ConfigError:
        found = f"= {self.values[key]!r}" if key in self.values else "is missing"
        return ConfigError(f"{self.path}: {self.prefix}{key} {found}; expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.problem(key, "an integer of at least 1 and below 2^31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.problem(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.problem(key, "true or false")
        return value

    def only(self, key: str, supported: Any, why: str = "") -> None:
        """Refuses a value, where there is one, other than the one that this code has."""
        if key in self.values and self.values[key] != supported:
            raise self.problem(key, f"{json.dumps(supported)}{why and ', ' + why}")

    def section(self, key: str) -> Self:
        value = self.values.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self.problem(key, "a mapping")
        return type(self)(self.path, value, f"{self.prefix}{key}.")

    def step_limits(self, key: str) -> list[float]:
        """Bounds of the step size. Infinity is a tagged mapping in newer files of transformers."""
        value = self.values.get(key, [0.0, math.inf])
        try:
            low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise self.problem(key, "two numbers") from None
        if not 0 <= low < high:
            raise self.problem(key, "two numbers, 0 <= the first < the second")
        return [low, high]
