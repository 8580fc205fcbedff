"""Options and named choices: what a recipe configures is made of these, and its errors are raised here.

The bottom of the package: it imports nothing else of it, so that mixers, data and lm can share it.
"""

import copy
import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Generic, Literal, TypeVar, cast, get_args, get_origin


class UserError(ValueError):
    """Something the user can put right. The message is one line: the key or file, its value, what would be right."""


class ConfigError(UserError):
    """A recipe, a command line or a run folder that cannot be used."""


class PluginError(ConfigError):
    """An installed package promises something and does not deliver it."""


def option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    mixers: bool = False,
) -> Any:
    """A field of a config dataclass.

    Args:
        default: its value where none is given; of a list every instance gets a copy.
        help: one sentence for the list of all keys.
        min: smallest value of a number; `max` the largest; `above` and `below` are limits that it must not reach.
        mixers: the value is the spec of a mixer inside this one, or a list of specs.
    """
    limits = {"min": min, "max": max, "above": above, "below": below}
    metadata = {"help": help, "mixers": mixers, **{k: v for k, v in limits.items() if v is not None}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


RENAMED = {"mlp_width": "mlp_dim", "head_width": "head_dim", "rope_base": "rope_theta"}
"""Keys that had another name before version 0.2: old -> new."""


def with_new_names(tree: Any) -> Any:
    """Mappings of an older version, at any depth, with the names that keys have now."""
    if isinstance(tree, Mapping):
        return {RENAMED.get(key, key): with_new_names(value) for key, value in tree.items()}
    return [with_new_names(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


def check_options(schema: type, raw: Any, path: str = "") -> Any:
    """A mapping -> an instance of the dataclass `schema`; its sections are checked in turn.

    `path` is the mapping's own key, for messages. Raises ConfigError.
    """
    names = [f.name for f in fields(schema)]
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} = {show(raw)}: expected a mapping with keys {', '.join(names)}")
    dot = f"{path}." if path else ""
    hints = _type_hints(schema)
    for key in raw:
        if key not in names:
            now = RENAMED.get(key)
            hint = f"it is called {now} now" if now in names else one_of(key, names)
            raise ConfigError(f"{dot}{key} = {show(raw[key])}: no such key; {hint}")
    values = {}
    for item in fields(schema):
        full_key, kind = dot + item.name, hints[item.name]
        if is_dataclass(kind) and kind is not Choice:
            section = {} if raw.get(item.name) is None else raw[item.name]
            values[item.name] = check_options(cast(type, kind), section, full_key)
        elif item.name in raw:
            values[item.name] = _check_value(raw[item.name], kind, item.metadata, full_key)
    return schema(**values)


def report_problems(config: Any, path: str, *context: Any) -> None:
    """Raises ConfigError for the first (option, what would be right) that the config's own `problems` yields."""
    for name, expected in getattr(config, "problems", lambda *_: ())(*context):
        raise ConfigError(f"{path}.{name} = {show(getattr(config, name))}: {expected}")


LIMITS = {
    "min": ("at least", "≥", lambda v, b: v >= b),
    "max": ("at most", "≤", lambda v, b: v <= b),
    "above": ("above", ">", lambda v, b: v > b),
    "below": ("below", "<", lambda v, b: v < b),
}
"""Limit of an option -> its words, its sign, and whether a value keeps it."""


def _check_value(value: Any, kind: Any, metadata: Mapping[str, Any], path: str) -> Any:
    if any(
        isinstance(text, str) and "\0" in text for text in (value if isinstance(value, list) else [value])
    ):
        raise ConfigError(f"{path} = {show(value)}: expected text without the character NUL")
    typed = _typed(value, kind)
    if typed is MISSING:
        choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{path} = {show(value)}: expected {in_words(kind)}{hint}")
    given = [(words, metadata[name], keeps) for name, (words, _, keeps) in LIMITS.items() if name in metadata]
    if isinstance(typed, (int, float)) and not all(keeps(typed, bound) for _, bound, keeps in given):
        expected = " and ".join(f"{words} {bound}" for words, bound, _ in given)
        raise ConfigError(f"{path} = {show(value)}: expected {expected}")
    return typed


def _typed(value: Any, kind: Any) -> Any:
    """`value` as an instance of the type `kind`, or MISSING. Nothing is lost on the way."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in (Any, Choice):
        return value
    if origin in (types.UnionType, typing.Union):
        return next((c for arm in args if (c := _typed(value, arm)) is not MISSING), MISSING)
    if kind is types.NoneType:
        return None if value is None else MISSING
    if origin is Literal:
        same = (c for c in args if show(c) == show(value) or str(value) == c)
        return next(same, MISSING)
    if origin is list and isinstance(value, str):
        value = [value]  # one file or module needs no brackets
    if origin is list and isinstance(value, (list, tuple)):
        items = [_typed(item, args[0]) for item in value]
        return MISSING if MISSING in items else items
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        items = [_typed(item, arm) for item, arm in zip(value, args, strict=True)]
        return MISSING if MISSING in items else tuple(items)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return MISSING if math.isnan(value) else float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    return value if kind in (str, bool) and isinstance(value, kind) else MISSING


def in_words(kind: Any) -> str:
    """A type of the schema, for people."""
    origin, args = get_origin(kind), get_args(kind)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    if kind in (Any, Choice):
        return "a name or a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(arm) for arm in args)
    if origin is list:
        return f"a list, each item {in_words(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {in_words(args[0])}"
    return str(kind)


def plain(value: Any) -> Any:
    """Configs and choices, at any depth, as mappings, lists and numbers; `check_options` reads them again."""
    if isinstance(value, Choice):
        return {"name": value.name, **plain(value.options)}
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == ():  # a number of numpy or torch
        return value.item()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


_type_hints = cache(typing.get_type_hints)  # evaluates text each time, and matching a size asks often


def show(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def one_of(given: Any, valid: Iterable[str]) -> str:
    """The part of an error message that says what is valid, with the nearest match first."""
    valid = list(valid)
    near = difflib.get_close_matches(str(given), valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(valid)}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Choice:
    """A registered name with its options, checked: what `data` and `model.mixer` hold in a recipe."""

    name: str
    options: Any
    """An instance of the config dataclass that is registered under the name."""


Base = TypeVar("Base")
Class = TypeVar("Class", bound=type)


class Registry(Generic[Base]):
    """Classes by name, each with the dataclass that is the schema of its options.

    Args:
        kind: what they are, for messages: "mixer".
        group: the entry-point group in which installed packages name theirs: name -> the module that registers it.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, tuple[type, type[Base]]] = {}

    def register(self, name: str, config_class: type) -> Callable[[Class], Class]:
        """Class decorator: from now on `name` in a recipe means this class, and `config_class` is its schema.

        The fields of `config_class` are made with `option`. It may have a method `problems(...)` that yields (option,
        what would be right) for values that do not fit together.
        """

        def register(made: Class) -> Class:
            self._check_schema(name, config_class)
            known = self._entries.get(name, (None, made))[1]
            # A module imported a second time registers another class of the same names.
            if (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
                raise ValueError(f"a {self.kind} named {name!r} is registered already: {known}")
            self._entries[name] = (config_class, made)
            return made

        return register

    def _check_schema(self, name: str, config_class: type) -> None:
        what = f"the config class of {self.kind} {name!r}"
        if not is_dataclass(config_class):
            raise TypeError(f"{what} must be a dataclass, not {config_class!r}")
        try:
            typing.get_type_hints(config_class)
        except NameError as error:
            raise TypeError(f"{what} has a type that is not defined: {error}") from error
        for item in fields(config_class):
            if item.default is MISSING and item.default_factory is MISSING:
                raise TypeError(f"{what} has no default for {item.name}")
            if "help" not in item.metadata:
                raise TypeError(f"{what} has no help for {item.name}; expected option(default, 'help')")

    def registered(self) -> list[str]:
        """The names that have been imported: ours, and those of plug-ins in use."""
        return sorted(self._entries)

    def names(self) -> list[str]:
        """The names that a recipe may use: registered, or installed and not yet imported."""
        return sorted({*self._entries, *_installed(self.group, tuple(sys.path)).names})

    def config_class(self, name: str) -> type:
        """The schema of `name`; ConfigError with the nearest name if there is none."""
        return self._lookup(name)[0]

    def implementation(self, name: str) -> type[Base]:
        """The class of `name`; ConfigError with the nearest name if there is none."""
        return self._lookup(name)[1]

    def _lookup(self, name: str) -> tuple[type, type[Base]]:
        if name not in self._entries:
            for entry_point in _installed(self.group, tuple(sys.path)).select(name=name):
                self._load(entry_point)
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}: {one_of(name, self.names())}")
        return self._entries[name]

    def _load(self, entry_point: EntryPoint) -> None:
        """Imports the module of an installed plug-in, which registers its class. Raises PluginError."""
        package = entry_point.dist.name if entry_point.dist else "?"
        where = f"{self.kind} {entry_point.name!r} of the installed package {package!r}"
        try:
            entry_point.load()
        except PluginError:  # it says itself what is wrong
            raise
        except (Exception, SystemExit) as error:  # whatever a plug-in does, the message must name it
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise PluginError(f"{where}: importing {entry_point.value!r} failed: {reason}") from error
        if entry_point.name not in self._entries:
            raise PluginError(f"{where}: {entry_point.value!r} registers no {self.kind} of that name")

    def choose(self, spec: Any, path: str | None = None) -> Choice:
        """A name, a mapping with `name` and options, or a Choice -> the Choice, its options checked.

        `path` is the key that holds it, for messages. Raises ConfigError.
        """
        path = path or self.kind
        spec = plain(spec) if isinstance(spec, Choice) else {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            valid = ", ".join(self.names())
            raise ConfigError(
                f"{path} = {show(spec)}: expected a {self.kind}'s name or a mapping; valid: {valid}"
            )
        if "name" not in spec:
            raise ConfigError(f"{path}.name is missing: {one_of('', self.names())}")
        name = spec["name"]
        if name not in self.names():
            raise ConfigError(f"{path} = {show(name)}: no such {self.kind}; {one_of(name, self.names())}")
        with self.naming(name, path):
            schema = self.config_class(name)
            return Choice(name, check_options(schema, {k: v for k, v in spec.items() if k != "name"}, path))

    @contextmanager
    def naming(self, name: str, path: str) -> Iterator[None]:
        """Around what a config class does: a plug-in's may do anything, and the message must name it."""
        try:
            yield
        except PluginError as error:
            raise ConfigError(f"{path} = {show(name)}: {error}") from error
        except ConfigError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise ConfigError(
                f"{path} = {show(name)}: the {self.kind}'s config class failed: {reason}"
            ) from error


@cache
def _installed(group: str, path: tuple[str, ...]) -> EntryPoints:
    """The entry points of the packages on `path`, which is sys.path: looking takes milliseconds."""
    return entry_points(group=group)
