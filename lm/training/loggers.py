"""Where metrics go: a file of lines that anything can read, and TensorBoard."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb

from mixerlab.lm.recipe.check import mixers_of
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.start import Start


class CSVMetrics(Logger):
    """Appends `step,metric,value` lines to metrics.csv; a resumed run goes on below and drops what it repeats."""

    def __init__(self, path: Path, start: Start | None = None):
        super().__init__()
        self.path = path
        start = start or Start()
        kept = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
            # Of the step itself, a validation that is not in the checkpoint is repeated.
            kept = [
                row
                for row in rows
                if int(row[0]) < start.step
                or (
                    int(row[0]) == start.step
                    and (start.is_validated or row[1].startswith(("train/", "speed/", "memory/")))
                )
            ]
        new = self.path.with_suffix(".new")
        with new.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "metric", "value"), *kept])
        new.replace(self.path)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder holds the recipe."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", newline="") as file:
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
