"""Where metrics go: a file of lines that anything can read, and the loggers that the recipe names."""

import csv
import io
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb

from mixerlab.lm.recipe.check import mixers_of
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.curves import lines_of
from mixerlab.lm.run.folder import Run, writing
from mixerlab.lm.run.start import Start
from mixerlab.options import ConfigError, first_line
from mixerlab.sealed import write_file

EXTRAS = ("wandb", "mlflow")
"""Loggers that need a module of their name, which an extra of the same name installs."""


@runtime_checkable
class Board(Protocol):
    """A logger that shows more than curves."""

    def log_text(self, tag: str, text: str, step: int) -> None: ...

    def log_picture(self, tag: str, png: bytes, step: int) -> None: ...

    def log_comparison(self, values: dict[str, Any], metrics: list[str]) -> None: ...


def check_installed(recipe: Recipe) -> None:
    """Raises ConfigError where a logger's package is not there."""
    for i, choice in enumerate(recipe.logging.loggers):
        if choice.name in EXTRAS and find_spec(choice.name) is None:
            raise ConfigError(
                f"logging.loggers[{i}] = {choice.name!r}: No module named {choice.name!r}; expected it "
                f"installed: pip install 'mixerlab[{choice.name}]'"
            )


def make_loggers(recipe: Recipe, run: Run, start: Start) -> list[Logger]:
    """Those of the recipe and metrics.csv, for rank 0. Raises ConfigError where one cannot begin."""
    loggers: list[Logger] = []
    for i, choice in enumerate(recipe.logging.loggers):
        try:
            if choice.name == "tensorboard":
                loggers.append(TensorBoard(run.path, start.step))
                continue
            from mixerlab.lm.training.trackers import Mlflow, Wandb

            if choice.name == "wandb":
                loggers.append(Wandb(choice.options, str(recipe.name), run.path))
            else:
                loggers.append(Mlflow(choice.options, str(recipe.name), run.path, start.run is not None))
        except Exception as error:  # of a server, an account or a version
            raise ConfigError(
                f"logging.loggers[{i}] = {choice.name!r}: it cannot begin: {first_line(error)}"
            ) from error
    return [*loggers, CSVMetrics(run.path / "metrics.csv", start)]


class CSVMetrics(Logger):
    """Appends `step,metric,value` lines to metrics.csv; a resumed run goes on below and drops what it repeats."""

    def __init__(self, path: Path, start: Start | None = None):
        super().__init__()
        self.path = path
        start = start or Start()
        kept = []
        if self.path.exists():
            # Of the step itself, a validation that is not in the checkpoint is repeated.
            kept = [
                (step, metric, value)
                for step, metric, value in lines_of(self.path)
                if step < start.step
                or (
                    step == start.step
                    and (start.is_validated or metric.startswith(("train/", "speed/", "memory/")))
                )
            ]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("step", "metric", "value"), *kept])
        with writing(self.path):
            write_file(self.path, text.getvalue())

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the recipe."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows((step, name, repr(float(value))) for name, value in metrics.items())


class TensorBoard(TensorBoardLogger):
    """TensorBoard events in the run folder itself, so that the run's name is what the legend shows."""

    def __init__(self, folder: Path, first_step: int):
        purge = first_step + 1 if first_step else None
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All of them as one record: SummaryWriter takes six times as long, one by one."""
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Text as it is: an indented block of TensorBoard's Markdown."""
        block = "\n".join("    " + line for line in text.splitlines())
        self.experiment.add_text(tag, block, step)

    def log_picture(self, tag: str, png: bytes, step: int) -> None:
        """A picture as it is; add_image would decode it and compress it again."""
        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which comes first
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.experiment._get_file_writer().add_summary(summary, step)

    def log_comparison(self, values: dict[str, Any], metrics: list[str]) -> None:
        """The run's row of the HPARAMS page: what was chosen, and the tags of the curves whose last value it shows."""
        # The page sorts by name, and shows the other one.
        columns = [HParam(f"{i:02} {name}", display_name=name) for i, name in enumerate(values)]
        for summary in (
            hparams_config_pb(columns, [Metric(tag) for tag in metrics]),
            hparams_pb(dict(zip(columns, values.values(), strict=True)), trial_id=Path(self.log_dir).name),
        ):
            self.experiment._get_file_writer().add_summary(summary)

    def save(self) -> None:
        """Flushes; without the hparams.yaml of Lightning, since the run folder holds the recipe."""
        self.experiment.flush()


def compared(recipe: Recipe, parameters: int, tokens: int) -> dict[str, str | float]:
    """What people compare runs by, in the order of the HPARAMS page."""
    return {
        "mixer": "+".join(mixer.name for mixer in mixers_of(recipe)),
        "parameters": parameters,
        "d_model": recipe.model.d_model,
        "n_layers": recipe.model.n_layers,
        "lr": recipe.optim.lr,
        "seed": recipe.seed,
        "tokens": tokens,
        "block": recipe.model.block,
        "changed": recipe.label or "",
    }
