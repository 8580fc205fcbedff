"""What a run begins from: nothing, or the last checkpoint of an earlier one that it continues."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mixerlab.data import DataModule
from mixerlab.lm.recipe.schema import HORIZONS, Recipe
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run, check_model, runs_of
from mixerlab.options import ConfigError

PLACE = (
    "strategy.",
    "data.cache_dir",
    *(f"trainer.{key}" for key in ("batch_size", "accumulate", "num_workers", "max_time")),
)
"""Keys that say where and for how long a run trains, not what; the rows of a step must stay as many."""

MAY_CHANGE = (
    *(
        f"trainer.{key}"
        for key in (*HORIZONS, "val_every", "val_batches", "checkpoint_every", "keep_checkpoints")
    ),
    "trainer.on_non_finite",
    "logging.",
    *PLACE,
)
"""Keys that a resumed run may have otherwise than before. Of the rest, some decide what was learnt already, and
the optimiser's would be overwritten by its saved state."""


@dataclass(frozen=True)
class Start:
    """Where training starts."""

    run: Run | None = None
    """The run that goes on; None: a new one."""
    checkpoint: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    """meta.json of the checkpoint."""

    @property
    def step(self) -> int:
        """Optimiser steps that are done."""
        return self.meta.get("global_step", 0)

    @property
    def is_validated(self) -> bool:
        """Whether the validation of this step, if one was due, is done."""
        return self.checkpoint is None or self.meta.get("metrics") is not None

    @classmethod
    def find(cls, recipe: Recipe) -> Self:
        """What `resume` asks for. Raises ConfigError if a run is named that cannot be continued."""
        run = _find_run(recipe)
        checkpoint = run.checkpoints.last() if run else None
        if checkpoint is None:
            return cls(run)
        check_model(checkpoint, recipe)
        return cls(run, checkpoint, read_meta(checkpoint))

    def finish(self, steps: int) -> bool:
        """Whether the run was only killed between its last checkpoint and its result, which it gets now."""
        metrics = self.meta.get("metrics")
        if self.run is None or self.step != steps or self.run.is_finished or metrics is None:
            return False
        self.run.lock().release()  # raises if another process trains it
        self.run.finish(steps, metrics)
        return True

    def open(
        self, recipe: Recipe, data: DataModule, steps: int, devices: int, say: Callable[[str], None] = print
    ) -> Run:
        """The run folder, made or checked, with the recipe and the tokenizer in it. Raises ConfigError.

        `steps` are those of the whole run; `say` is told which run goes on and what is otherwise than before.
        """
        if self.run is None:
            run = Run.create(recipe)
        else:
            run = self.run
            run.lock().release()  # raises if another process trains it
            _check_continuation(self, run, data, steps)
            _check_rows(run, self.meta.get("rows_per_step"), recipe, devices)
            say(f"continuing {run.path} after step {self.step}")
            for key, old, new in run.differences(recipe):
                say(f"  {key}: was {old!r}, now {new!r}")
            run.reopen()
            run.checkpoints.set_aside_after(self.step)
            run.save_recipe(replace(recipe, label=run.recipe.label))  # that of the folder
        data.save_tokenizer(run.path)
        run.save_data_fingerprint(data.fingerprint)
        return run


def _find_run(recipe: Recipe) -> Run | None:
    """The run to continue. "auto" takes the newest unfinished one of the same name and recipe with a checkpoint."""
    if recipe.resume is None:
        return None
    if recipe.resume != "auto":
        _put_back(Run(recipe.resume))
        run = Run.open(recipe.resume)
        differing = [d for d in run.differences(recipe) if not d[0].startswith(MAY_CHANGE)]
        if differing:
            listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, a, b in differing)
            raise ConfigError(f"resume = {recipe.resume!r}: that run has another recipe: {listed}")
        return run
    for run in runs_of(Path(recipe.logging.dir) / str(recipe.name)):
        if run.has_recipe and not run.is_finished and _put_back(run) and run.checkpoints.all():
            try:
                differing = run.differences(recipe)
            except ConfigError:  # of an older version, or with a plug-in that has gone
                continue
            if all(key.startswith((*PLACE, "trainer.on_non_finite")) for key, *_ in differing):
                return run
    return None


def _put_back(run: Run) -> bool:
    """Makes checkpoints whole again whose replacement was killed; False where another process trains the run."""
    if run.has_recipe and run.is_locked():
        return False
    run.checkpoints.put_back()
    return True


def _check_continuation(start: Start, run: Run, data: DataModule, steps: int) -> None:
    """Raises ConfigError where going on with `run` would do nothing, or something else than before."""
    if start.step >= steps:
        raise ConfigError(
            f"resume = {str(run.path)!r}: that run has done {start.step} steps, and this recipe ends after {steps}; "
            f"expected a horizon of more, such as trainer.steps={2 * start.step}"
        )
    if run.data_fingerprint not in (None, data.fingerprint):
        raise ConfigError(
            f"resume = {str(run.path)!r}: the data are not what that run was trained on; the documents must have "
            "changed since. Restore them, or start a new run"
        )


def _check_rows(run: Run, before: int | None, recipe: Recipe, devices: int) -> None:
    """Raises ConfigError where a step would have other rows than before."""
    trainer = recipe.trainer
    now = trainer.rows_per_step(devices)
    if before in (None, now):
        return
    per_device = trainer.batch_size * devices
    fitting = (
        f"trainer.accumulate={before // per_device}"
        if before % per_device == 0
        else f"a trainer.batch_size that divides {before // devices}"
        if before % devices == 0
        else f"a number of devices that divides {before}"
    )
    raise ConfigError(
        f"resume = {str(run.path)!r}: a step of that run has {before} rows, and here {now} (trainer.batch_size = "
        f"{trainer.batch_size} x trainer.accumulate = {trainer.accumulate} x {devices} devices); expected {fitting}, "
        "for as many"
    )
