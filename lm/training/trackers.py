"""Experiment trackers by Lightning's own loggers: one run there for each run folder, which goes on when that does.

What fails once a run has begun, such as a server that has gone, is said once and stops no training.
"""

import html
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from mixerlab.lm.recipe.loggers import MlflowConfig, WandbConfig

log = logging.getLogger("mixerlab")


class _Sparing:
    """Lets a tracker fail without the run."""

    has_failed = False

    @contextmanager
    def sparing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.has_failed:
                log.warning("%s: logging fails, and the run goes on: %s", type(self).__name__, error)
            self.has_failed = True


@contextmanager
def _as_file(content: bytes, name: str) -> Iterator[Path]:
    """A file, for those that take nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield path


class Wandb(_Sparing, WandbLogger):
    """A run of Weights & Biases, whose id is the run folder's name with that of the recipe."""

    def __init__(self, config: WandbConfig, recipe_name: str, folder: Path):
        super().__init__(
            name=folder.name,
            id=re.sub(r"[^\w.=+-]+", "-", f"{recipe_name}-{folder.name}")[-128:],
            save_dir=folder,
            project=config.project or os.environ.get("WANDB_PROJECT", "mixerlab"),
            entity=config.entity,
            group=config.group or recipe_name,
            tags=config.tags,
            mode="offline" if config.offline else None,  # of the environment
        )
        self.experiment  # noqa: B018  # begins it

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        with self.sparing():
            super().log_metrics(metrics, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Text as it is."""
        import wandb

        self.log_metrics({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step)

    def log_picture(self, tag: str, png: bytes, step: int) -> None:
        import wandb

        with _as_file(png, "picture.png") as path:
            self.log_metrics({tag: wandb.Image(str(path))}, step)

    def log_comparison(self, values: dict[str, Any], metrics: list[str]) -> None:
        """What people compare runs by, as the run's config."""
        with self.sparing():
            self.experiment.config.update(values, allow_val_change=True)

    def finalize(self, status: str) -> None:
        """Ends it there: another run of this process has one of its own."""
        with self.sparing():
            if self._experiment is not None:
                self._experiment.finish(exit_code=int(status != "success"))


class Mlflow(_Sparing, MLFlowLogger):
    """A run of MLflow, which is found again by its name, that of the run folder."""

    def __init__(self, config: MlflowConfig, recipe_name: str, folder: Path, goes_on: bool):
        experiment = config.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME", recipe_name)
        super().__init__(
            experiment_name=experiment,
            run_name=folder.name,
            tracking_uri=config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"),
        )
        if goes_on and (known := self._mlflow_client.get_experiment_by_name(experiment)) is not None:
            name = folder.name.replace("'", "\\'")
            runs = self._mlflow_client.search_runs(
                [known.experiment_id], f"attributes.run_name = '{name}'", max_results=1
            )
            if runs:
                self._run_id = runs[0].info.run_id
                self._mlflow_client.update_run(self._run_id, status="RUNNING")
        self.experiment  # noqa: B018  # begins it

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.sparing():
            super().log_metrics(metrics, step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A file of text among the run's artifacts."""
        self._log_file(tag, f"{step:08}.txt", text.encode())

    def log_picture(self, tag: str, png: bytes, step: int) -> None:
        self._log_file(tag, f"{step:08}.png", png)

    def _log_file(self, tag: str, name: str, content: bytes) -> None:
        with self.sparing(), _as_file(content, name) as path:
            self.experiment.log_artifact(self.run_id, str(path), tag)

    def log_comparison(self, values: dict[str, Any], metrics: list[str]) -> None:
        """What people compare runs by, as parameters; those of a run that goes on stay."""
        with self.sparing():
            known = self.experiment.get_run(self.run_id).data.params
            self.log_hyperparams({name: value for name, value in values.items() if name not in known})

    def finalize(self, status: str = "success") -> None:
        with self.sparing():
            super().finalize(status)
