"""Recipes: the dataclasses that are their schema, and the merging and checking that turns files into one.

Defaults, then the `base:` recipe, then the recipe, then the command line. Every error is a ConfigError whose
message names the key's full path, the value, and what would be right.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.registry import data_config, data_names
from mixers.registry import (
    PluginError,
    mixer_config,
    mixer_fields,
    mixer_names,
    one_of,
    without_segments,
)


class ConfigError(Exception):
    """A recipe or command line that cannot be run; the message is for the user."""


@dataclass
class ModelConfig:
    d_model: int = field(default=256, metadata={"help": "width of the residual stream", "min": 1})
    match_params: int | float | str | None = field(
        default=None,
        metadata={
            "help": "parameters to have, such as 10M: solves for d_model, and mlp_width if that is null",
            "above": 0,
            "below": 1e13,
        },
    )
    match: str | None = field(
        default=None, metadata={"help": "a recipe to have as many parameters as; solves for the width too"}
    )
    n_layers: int = field(default=4, metadata={"help": "number of blocks", "min": 1})
    mixer: Any = field(
        default="sessa",
        metadata={
            "help": "a mixer's name, a mapping with `name` and options, or a list of those, repeated over depth"
        },
    )
    block: Literal["gated", "transformer"] = field(
        default="gated",
        metadata={"help": "what surrounds the mixer: the Sessa paper's gated block, or mixer then MLP"},
    )
    mlp: Literal["swiglu", "gelu", "none"] = field(
        default="swiglu", metadata={"help": "MLP of the transformer block (the gated block has none)"}
    )
    mlp_width: int | None = field(
        default=None,
        metadata={"help": "hidden width of the MLP; null: 4 d_model, or 8/3 for swiglu", "min": 1},
    )
    norm: Literal["layernorm", "rmsnorm"] = field(default="layernorm", metadata={"help": "normalisation"})
    tie_embeddings: bool = field(default=True, metadata={"help": "use the embedding matrix as the head"})
    dropout: float = field(
        default=0.0,
        metadata={"help": "dropout on the embedding and every residual addition", "min": 0, "below": 1},
    )
    init_std: float = field(
        default=0.02, metadata={"help": "standard deviation of the initial weights", "above": 0}
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.match_params, str) and not _BUDGET.fullmatch(self.match_params):
            yield "match_params", "expected a number of parameters, such as 10M, 1.5B or 350000"
        elif isinstance(self.match_params, str) and not 1 <= (self.budget() or 0) < 1e13:
            yield "match_params", "expected at least 1 and below 10000B parameters"
        if self.match_params is not None and self.match is not None:
            yield "match", "expected at most one of model.match and model.match_params"

    def budget(self) -> float | None:
        """`match_params` as a number."""
        if not isinstance(self.match_params, str):
            return self.match_params
        found = _BUDGET.fullmatch(self.match_params)
        assert found is not None
        return float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2].lower()]


_BUDGET = re.compile(r"(?=.*[1-9])\s*(\d*\.?\d+)\s*([kmb]?)\s*", re.IGNORECASE)


@dataclass
class OptimConfig:
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW", "above": 0})
    betas: tuple[float, float] = field(
        default=(0.9, 0.95), metadata={"help": "decay of AdamW's two averages"}
    )
    eps: float = field(default=1e-8, metadata={"help": "AdamW's epsilon", "above": 0})
    weight_decay: float = field(
        default=0.1, metadata={"help": "decoupled weight decay; norms, biases and gains are spared", "min": 0}
    )
    schedule: Literal["cosine", "wsd", "constant"] = field(
        default="cosine",
        metadata={"help": "learning rate after warm-up: cosine, warm-up-stable-decay, or constant"},
    )
    warmup_steps: int = field(default=100, metadata={"help": "steps of linear warm-up", "min": 0})
    decay_fraction: float = field(
        default=0.2,
        metadata={"help": "wsd: share of the steps in which the rate falls linearly", "min": 0, "max": 1},
    )
    final_lr_ratio: float = field(
        default=0.1, metadata={"help": "learning rate at the end, as a share of the peak", "min": 0, "max": 1}
    )
    grad_clip: float | None = field(
        default=1.0, metadata={"help": "largest norm of the gradient; null: no clipping", "above": 0}
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", "expected two numbers of at least 0 and below 1"


@dataclass
class TrainerConfig:
    steps: int | None = field(
        default=None,
        metadata={"help": "optimiser steps to train; give exactly one of steps, epochs, tokens", "min": 1},
    )
    epochs: float | None = field(
        default=None, metadata={"help": "passes over the training split", "above": 0, "below": 1e9}
    )
    tokens: float | None = field(
        default=None,
        metadata={
            "help": "input positions to train on, over all devices (1e9 is allowed)",
            "above": 0,
            "below": 1e18,
        },
    )
    batch_size: int = field(default=16, metadata={"help": "rows per device and micro-batch", "min": 1})
    accumulate: int = field(default=1, metadata={"help": "micro-batches per optimiser step", "min": 1})
    precision: Literal["32", "bf16-mixed", "bf16-true"] = field(
        default="32",
        metadata={
            "help": "float32; bf16 arithmetic on float32 weights; or bf16 weights (norms and gains float32)"
        },
    )
    val_every: int = field(
        default=500, metadata={"help": "steps between validations (one more at the end)", "min": 1}
    )
    val_batches: int | None = field(
        default=None, metadata={"help": "validation batches per loader; null: the whole split", "min": 1}
    )
    checkpoint_every: int = field(
        default=500, metadata={"help": "steps between checkpoints (one more at the end)", "min": 1}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"help": "newest checkpoints to keep, besides the best one", "min": 1}
    )
    max_time: str | None = field(
        default=None,
        metadata={
            "help": "wall-clock limit such as 11h30m or 90s: then a checkpoint is written and the run ends, to be "
            "continued with resume=auto"
        },
    )
    on_non_finite: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "at a loss or gradient that is not finite: stop the run, or leave that step out"},
    )
    num_workers: int = field(default=0, metadata={"help": "data loading processes per device", "min": 0})

    def problems(self) -> Iterator[tuple[str, str]]:
        given = [name for name in HORIZONS if getattr(self, name) is not None]
        if len(given) != 1:
            yield (
                given[-1] if given else "steps",
                "expected exactly one of trainer.steps, trainer.epochs, trainer.tokens",
            )
        if self.max_time is not None and not self.max_seconds():
            yield "max_time", "expected hours, minutes and seconds, such as 11h30m, 45m or 90s"

    def max_seconds(self) -> float:
        """`max_time` in seconds; infinite without one, 0 where it cannot be read."""
        if self.max_time is None:
            return math.inf
        found = _DURATION.fullmatch(self.max_time)
        if found is None:
            return 0.0
        return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


HORIZONS = ("steps", "epochs", "tokens")


@dataclass
class StrategyConfig:
    name: Literal["auto", "ddp", "fsdp"] = field(
        default="auto",
        metadata={
            "help": "ddp: a copy of the model on every device; fsdp: weights, gradients and optimiser state cut in "
            "shards over the devices (FSDP2); auto: ddp where there are several devices"
        },
    )
    accelerator: Literal["auto", "cpu", "gpu"] = field(default="auto", metadata={"help": "kind of device"})
    devices: Literal["auto"] | int = field(
        default="auto",
        metadata={
            "help": "devices, a process each, per machine; auto: every GPU, or one CPU process",
            "min": 1,
        },
    )
    num_nodes: int = field(
        default=1, metadata={"help": "machines; torchrun or SLURM starts the processes on several", "min": 1}
    )
    replicate: int = field(
        default=1,
        metadata={
            "help": "fsdp: groups of devices that hold a whole model in shards each (HSDP); 1: one group",
            "min": 1,
        },
    )
    param_dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "fsdp: dtype in which weights are gathered, norms and gains included; bfloat16 halves the traffic"
        },
    )
    reduce_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "fsdp: dtype in which gradients are summed over devices"}
    )
    cpu_offload: bool = field(
        default=False,
        metadata={
            "help": "fsdp: keep the shards and the optimiser in the CPU's memory; slow, for huge models"
        },
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile each block, in place"})
    activation_checkpointing: Literal["none", "selective", "full"] = field(
        default="none",
        metadata={
            "help": "to save memory, recompute each block in the backward pass; selective: but for the operators that "
            "mix over time, whose outputs are kept"
        },
    )
    timeout: float = field(
        default=1800.0,
        metadata={
            "help": "seconds without progress after which a run of several processes is ended",
            "above": 0,
        },
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.name != "fsdp":
            for key in ("replicate", "param_dtype", "reduce_dtype", "cpu_offload"):
                if getattr(self, key) != getattr(StrategyConfig, key):
                    yield key, f"only used with strategy.name = fsdp, but it is {self.name}"
        if self.cpu_offload and self.accelerator == "cpu":
            yield "cpu_offload", "expected false: strategy.accelerator = cpu leaves nothing to offload"


@dataclass
class LoggingConfig:
    dir: str = field(default="runs", metadata={"help": "folder under which run folders are made"})
    every: int = field(default=10, metadata={"help": "steps between logged training metrics", "min": 1})
    sample_prompt: str = field(
        default="", metadata={"help": "prompt of the sample text written at each validation"}
    )
    sample_tokens: int = field(
        default=128, metadata={"help": "tokens of the sample text; 0: no sample", "min": 0}
    )


@dataclass
class Recipe:
    name: str | None = field(
        default=None, metadata={"help": "name of the run's folder; null: the recipe file's name"}
    )
    seed: int = field(
        default=0,
        metadata={"help": "seed of the weights, the data's order and dropout", "min": 0, "max": 2**31 - 1},
    )
    resume: str | None = field(
        default=None,
        metadata={
            "help": "auto: continue the newest unfinished run of this name and recipe; or a run folder"
        },
    )
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "modules to import first; they may register mixers and data modules"},
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = field(
        default="text", metadata={"help": "a data module's name, or a mapping with `name` and options"}
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# ---------------------------------------------------------------------------------------------- loading


def load_recipe(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, check_data: bool = True
) -> Recipe:
    """Reads a recipe, its bases and `key=value` overrides; returns it checked and whole.

    `model.mixer` and `data` come back as plain mappings (or a list of them) with every option filled in.
    Without `check_data` the files that the data names may have gone, as those of an old run. Raises ConfigError.
    """
    return _matched(_load(Path(path), overrides, check_data), Path(path).parent)


def _load(path: Path, overrides: list[str] | tuple[str, ...], check_data: bool) -> Recipe:
    """As `load_recipe`, but what `model.match_params` or `model.match` asks for is left to do."""
    defaults = {"model": {"mixer": ModelConfig.mixer}, "data": Recipe.data}
    raw = _merge(defaults, _read_with_bases(path, ()))
    layers = [_parse_override(override) for override in overrides]
    _refuse_two_horizons(layers)
    for layer in layers:
        raw = _merge(raw, layer)
    try:
        raw = _container(OmegaConf.create(raw), resolve=True)  # interpolations
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from None
    _import_plugins(raw.get("plugins"))
    recipe = check_recipe(raw, check_data)
    if recipe.name is None:
        recipe.name = path.stem
    if Path(recipe.name).name != recipe.name:
        raise ConfigError(f"name = {recipe.name!r}: expected the name of a folder, without slashes")
    return recipe


def _matched(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the widths that `model.match_params` or `model.match` asks for, and without these keys."""
    from lm.match import count_parameters, match_width  # which builds decoders, from recipes

    if (budget := recipe.model.budget()) is not None:
        return match_width(recipe, budget, f"model.match_params = {recipe.model.match_params}")
    if (other := recipe.model.match) is not None:
        path = next((p for p in (Path(other), folder / other) if p.is_file()), Path(other))
        matched = _load(path, (), check_data=False)
        if matched.model.match is not None:
            raise ConfigError(
                f"model.match = {other!r}: that recipe matches another itself; expected one with a width"
            )
        budget = count_parameters(_matched(matched, path.parent))
        return match_width(recipe, budget, f"model.match = {other} ({budget:,} parameters)")
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe as plain mappings, lists and numbers."""
    return _plain(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as YAML; training from this text repeats the run."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def differing_keys(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The leaves in which two recipes (as from `to_dict`) differ: (full key, value in a, value in b)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from differing_keys(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif a != b:
        yield path, a, b


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"recipe {path}: no such file{_near_file(path)}")
    if path.resolve() in seen:
        raise ConfigError(f"base: {path} is its own base, by way of {' -> '.join(map(str, seen))}")
    try:
        raw = _container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or _first_line(error)
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
    if not (path.parent / base).is_file():
        raise ConfigError(f"base = {base!r} in {path}: no such file as {path.parent / base}")
    return _merge(_read_with_bases(path.parent / base, (*seen, path.resolve())), raw)


def _container(config: Any, resolve: bool = False) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor is there a folder {folder})"
    recipes = {
        p.name: p for p in [*sorted((folder / "recipes").glob("*.yaml")), *sorted(folder.glob("*.yaml"))]
    }
    near = difflib.get_close_matches(path.name, recipes, n=1)
    if near:
        return f"; did you mean {recipes[near[0]]}?"
    return f"; there are: {', '.join(map(str, recipes.values()))}" if recipes else ""


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, _ = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"override {override!r}: expected key=value, such as model.mixer=attention")
    try:
        return _container(OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {_first_line(error)}"
        ) from None


def _refuse_two_horizons(layers: list[dict[str, Any]]) -> None:
    sections = [layer["trainer"] for layer in layers if isinstance(layer.get("trainer"), dict)]
    given = {key: s[key] for s in sections for key in HORIZONS if s.get(key) is not None}
    if len(given) > 1:
        shown = " and ".join(f"trainer.{key} = {_show(value)}" for key, value in given.items())
        raise ConfigError(f"{shown}: expected exactly one of them")


def _merge(old: Any, new: Any, path: str = "") -> Any:
    """`new` laid over `old`. Another choice in a section, or another horizon, drops what belonged to the old."""
    if path == "strategy":  # its name alone leaves the devices as they are
        old, new = _named(old), _named(new)
    is_choice = path == "data" or f"{path}.".startswith("model.mixer.")  # mixers inside mixers too
    if is_choice and isinstance(old, str) and isinstance(new, dict):
        old = {"name": old}
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if is_choice and "name" in new and new["name"] != old.get("name"):
        return new
    merged = dict(old)
    if path == "trainer" and any(new.get(name) is not None for name in HORIZONS):
        merged = {key: value for key, value in merged.items() if key not in HORIZONS}
    for key, value in new.items():
        merged[key] = (
            _merge(merged[key], value, f"{path}.{key}" if path else str(key)) if key in merged else value
        )
    return merged


def _named(section: Any) -> Any:
    return {"name": section} if isinstance(section, str) else section


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
            kind = type(error).__name__
            hint = ""
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                hint = "; it must be installed, or its folder be on PYTHONPATH"
            raise ConfigError(
                f"plugins: importing {name!r} failed: {kind}: {_first_line(error)}{hint}"
            ) from error


# --------------------------------------------------------------------------------------------- checking


def check_recipe(raw: Mapping[str, Any], check_data: bool = True) -> Recipe:
    """Plain mappings -> Recipe, or ConfigError at the first thing that is wrong."""
    if "strategy" in raw:
        raw = {**raw, "strategy": _named(raw["strategy"])}
    recipe = _check_dataclass(Recipe, raw, "")
    _report_problems(recipe.model, "model")
    _report_problems(recipe.optim, "optim")
    _report_problems(recipe.trainer, "trainer")
    _report_problems(recipe.strategy, "strategy")
    if recipe.strategy.name == "fsdp" and recipe.trainer.precision == "bf16-true":
        raise ConfigError(
            "trainer.precision = 'bf16-true': fsdp keeps one dtype of weights; expected bf16-mixed, with "
            "strategy.param_dtype=bfloat16 for less traffic"
        )
    open_width = recipe.model.match is not None or recipe.model.match_params is not None
    d_model = None if open_width else recipe.model.d_model
    recipe.model.mixer = check_mixers(recipe.model.mixer, "model.mixer", d_model)
    recipe.data = _check_choice(recipe.data, "data", "data module", data_names(), data_config)
    if check_data:
        _report_problems(data_config(recipe.data["name"])(**recipe.data), "data")
    if recipe.data.get("pack"):
        for spec in recipe.model.mixer if isinstance(recipe.model.mixer, list) else [recipe.model.mixer]:
            for name in without_segments(spec):
                raise ConfigError(
                    f"data.pack = true: mixer {name!r} cannot keep packed documents apart; set data.pack=false"
                )
    return recipe


def check_mixers(value: Any, path: str, d_model: int | None) -> Any:
    """The value of the key `path` (a spec or a list of them) with every option filled in. Raises ConfigError.

    Without `d_model` it is not asked whether the options fit a width.
    """
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{path} = []: expected at least one mixer; valid: {', '.join(mixer_names())}")
        return [_check_mixer(item, f"{path}[{i}]", d_model) for i, item in enumerate(value)]
    return _check_mixer(value, path, d_model)


def _check_mixer(value: Any, path: str, d_model: int | None) -> dict[str, Any]:
    try:
        spec = _check_choice(value, path, "mixer", mixer_names(), mixer_config)
        options = {key: option for key, option in spec.items() if key != "name"}
        schema = mixer_config(spec["name"])
        if d_model is not None:
            _report_problems(schema(**options), path, d_model)
        defaults = schema()
    except ConfigError:
        raise
    except Exception as error:  # a plug-in's config class may do anything, and the message must name it
        name = value.get("name") if isinstance(value, dict) else value
        raise ConfigError(
            f"{path} = {_show(name)}: the mixer's config class failed: {type(error).__name__}: {_first_line(error)}"
        ) from error
    for option in mixer_fields(schema):
        inner, default = spec[option], getattr(defaults, option)
        if isinstance(inner, dict) and "name" not in inner and isinstance(default, str):
            inner = {"name": default, **inner}
        spec[option] = check_mixers(inner, f"{path}.{option}", d_model)
    return spec


def _report_problems(config: Any, path: str, *context: Any) -> None:
    for option, expected in getattr(config, "problems", lambda *_: ())(*context):
        raise ConfigError(f"{path}.{option} = {_show(getattr(config, option))}: {expected}")


def _check_choice(
    value: Any, path: str, kind: str, names: list[str], schema_of: Callable[[str], type]
) -> dict[str, Any]:
    """A name, or a mapping with a name -> the mapping with every option of that choice filled in."""
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, dict):
        raise ConfigError(
            f"{path} = {_show(value)}: expected a {kind}'s name or a mapping; valid: {', '.join(names)}"
        )
    if "name" not in options:
        raise ConfigError(f"{path}.name is missing: {one_of('', names)}")
    name = options["name"]
    if name not in names:
        raise ConfigError(f"{path} = {_show(name)}: no such {kind}; {one_of(name, names)}")
    rest = {key: v for key, v in options.items() if key != "name"}
    try:
        schema = schema_of(name)
    except PluginError as error:
        raise ConfigError(f"{path} = {_show(name)}: {error}") from error
    config = _check_dataclass(schema, rest, path)
    return {"name": name, **_plain(config)}


def _check_dataclass(schema: type, raw: Any, path: str) -> Any:
    """A mapping -> an instance of the dataclass `schema`; its sections are checked in turn."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path} = {_show(raw)}: expected a mapping with keys {', '.join(_names(schema))}")
    dot = f"{path}." if path else ""
    hints = _type_hints(schema)
    values = {}
    for key in raw:
        if key not in _names(schema):
            raise ConfigError(f"{dot}{key} = {_show(raw[key])}: no such key; {one_of(key, _names(schema))}")
    for item in fields(schema):
        full_key, kind = dot + item.name, hints[item.name]
        if is_dataclass(kind):
            values[item.name] = _check_dataclass(
                cast(type, kind), {} if raw.get(item.name) is None else raw[item.name], full_key
            )
        elif item.name in raw:
            values[item.name] = _check_value(raw[item.name], kind, item.metadata, full_key)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{full_key} is missing: expected {describe(kind)} ({item.metadata['help']})")
    return schema(**values)


def _check_value(value: Any, kind: Any, limits: Mapping[str, Any], path: str) -> Any:
    converted = _convert(value, kind)
    if converted is MISSING:
        choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{path} = {_show(value)}: expected {describe(kind)}{hint}")
    bounds = [
        ("min", "at least", lambda v, b: v >= b),
        ("max", "at most", lambda v, b: v <= b),
        ("above", "above", lambda v, b: v > b),
        ("below", "below", lambda v, b: v < b),
    ]
    given = [(words, limits[name], holds) for name, words, holds in bounds if name in limits]
    if isinstance(converted, (int, float)) and not all(holds(converted, bound) for _, bound, holds in given):
        raise ConfigError(
            f"{path} = {_show(value)}: expected {' and '.join(f'{w} {b}' for w, b, _ in given)}"
        )
    return converted


def _convert(value: Any, kind: Any) -> Any:
    """`value` as an instance of the type `kind`, or MISSING. No conversion loses anything."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return next((c for arm in args if (c := _convert(value, arm)) is not MISSING), MISSING)
    if kind is types.NoneType:
        return None if value is None else MISSING
    if origin is Literal:
        return next(
            (choice for choice in args if _show(choice) == _show(value) or str(value) == choice), MISSING
        )
    if origin is list and isinstance(value, str):
        value = [value]  # one file or module needs no brackets
    if origin is list and isinstance(value, list):
        items = [_convert(item, args[0]) for item in value]
        return MISSING if MISSING in items else items
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        items = [_convert(item, arm) for item, arm in zip(value, args, strict=True)]
        return MISSING if MISSING in items else tuple(items)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return MISSING if math.isnan(value) else float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    return value if kind in (str, bool) and isinstance(value, kind) else MISSING


def describe(kind: Any) -> str:
    """A type of the schema in words."""
    origin, args = get_origin(kind), get_args(kind)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    if kind is Any:
        return "a name, or a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(arm) for arm in args)
    if origin is list:
        return f"a list, each item {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}, each {describe(args[0])}"
    return str(kind)


_type_hints = cache(typing.get_type_hints)  # evaluates text each time, and matching a size asks often


def _names(schema: type) -> list[str]:
    return [f.name for f in fields(schema)]


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
