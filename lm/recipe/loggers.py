"""Where curves may go beside metrics.csv: the loggers that a recipe names, and their options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixerlab.options import Choice, ConfigError, check_options, one_of, option, plain, show


@dataclass
class TensorBoardConfig:
    """Events in the run folder."""


@dataclass
class WandbConfig:
    """Weights & Biases, by Lightning's WandbLogger; it needs the extra `wandb`."""

    project: str | None = option(None, "null: the environment's WANDB_PROJECT, else mixerlab")
    entity: str | None = option(None, "user or team; null: the account's default")
    group: str | None = option(None, "null: the recipe's name")
    tags: list[str] = option([], "of the run")
    offline: bool = option(False, "write into the run folder alone, for `wandb sync`")


@dataclass
class MlflowConfig:
    """MLflow, by Lightning's MLFlowLogger; it needs the extra `mlflow`."""

    experiment_name: str | None = option(
        None, "null: the environment's MLFLOW_EXPERIMENT_NAME, else the recipe's name"
    )
    tracking_uri: str | None = option(
        None, "the server, as http://host:5000; null: the environment's MLFLOW_TRACKING_URI"
    )


LOGGERS = {"tensorboard": TensorBoardConfig, "wandb": WandbConfig, "mlflow": MlflowConfig}


def choose_loggers(specs: list[Any], path: str) -> list[Choice]:
    """Names, or mappings with `name` and options -> Choices, their options checked. Raises ConfigError."""
    chosen: list[Choice] = []
    for i, spec in enumerate(specs):
        spec = {"name": spec} if isinstance(spec, str) else plain(spec)
        if not isinstance(spec, Mapping) or "name" not in spec:
            raise ConfigError(
                f"{path}[{i}] = {show(spec)}: expected a logger's name, or a mapping with `name` and options; "
                f"{one_of('', LOGGERS)}"
            )
        name, options = spec["name"], {key: value for key, value in spec.items() if key != "name"}
        if name not in LOGGERS:
            raise ConfigError(f"{path}[{i}] = {show(name)}: no such logger; {one_of(name, LOGGERS)}")
        if name in [choice.name for choice in chosen]:
            raise ConfigError(f"{path}[{i}] = {show(name)}: expected each logger once")
        chosen.append(Choice(name, check_options(LOGGERS[name], options, f"{path}[{i}]")))
    return chosen
