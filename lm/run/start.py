"""What a run begins from: nothing, or the last checkpoint of an earlier one that it continues."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mixerlab.data import DataModule
from mixerlab.lm.recipe.files import read_saved
from mixerlab.lm.recipe.load import differing_keys
from mixerlab.lm.recipe.schema import HORIZONS, Recipe
from mixerlab.lm.run.checkpoint import find_damage, read_meta, step_of
from mixerlab.lm.run.folder import NAMES, Run, runs_of, writing
from mixerlab.lm.run.weights import check_model
from mixerlab.options import ConfigError, plain, show, with_new_names

PLACE = (
    "strategy.",
    "data.cache_dir",
    "data.verify_cache",
    "logging.loggers",
    *(
        f"trainer.{key}"
        for key in (
            "batch_size",
            "accumulate",
            "rows_per_step",
            "num_workers",
            "max_time",
            "async_checkpoint",
        )
    ),
)
"""Keys that say where and for how long a run trains and where it is watched, not what; the rows of a step must stay as
many."""

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
    passed_over: str | None = field(default=None, compare=False)
    """Where resume=auto found no run to continue: the newest unfinished one, and in what it differs."""

    def plain(self) -> dict[str, Any]:
        """As JSON, for other ranks."""
        run, checkpoint = self.run and str(self.run.path), self.checkpoint and str(self.checkpoint)
        return {"run": run, "checkpoint": checkpoint, "meta": self.meta, "passed_over": self.passed_over}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Self:
        run, checkpoint = plain["run"], plain["checkpoint"]
        return cls(run and Run(run), checkpoint and Path(checkpoint), plain["meta"], plain["passed_over"])

    @property
    def row_order(self) -> int | None:
        """Of the run that goes on: which order its rows have; None: a new run chooses."""
        return (
            None if self.checkpoint is None else self.meta.get("row_order") or 1
        )  # versions up to 0.2 noted none

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
        """What `resume` asks for: nothing, a run to continue, or with "auto" one that is finished (`run.is_finished`).

        Raises ConfigError if a run is named that cannot be continued, or one that may be the wanted cannot be read.
        """
        start = cls.find_run(recipe)
        if start.run is None or (recipe.resume == "auto" and start.run.is_finished):
            return start
        return start.at(start.run.checkpoints.last(), recipe)

    @classmethod
    def find_run(cls, recipe: Recipe) -> Self:
        """As `find`, but for the checkpoint, which all ranks verify together: see `Checkpoints.last`, and `at`."""
        run, passed_over = _find_run(recipe)
        return cls(run, passed_over=passed_over)

    def at(self, checkpoint: Path | None, recipe: Recipe) -> Self:
        """With the checkpoint that the run goes on from. Raises ConfigError if it is of another model."""
        if checkpoint is None:
            return self
        check_model(checkpoint, recipe)
        return replace(self, checkpoint=checkpoint, meta=read_meta(checkpoint))

    def finish(self, steps: int) -> bool:
        """Whether the run was only killed between its last checkpoint and its result, which it gets now."""
        metrics = self.meta.get("metrics")
        if self.run is None or self.step != steps or self.run.is_finished or metrics is None:
            return False
        with self.run.lock():
            self.run.finish(steps, metrics)
        return True

    def open(
        self, recipe: Recipe, data: DataModule, steps: int, devices: int, say: Callable[[str], None] = print
    ) -> Run:
        """The run folder, made or checked, with the recipe and the tokenizer in it. Raises ConfigError.

        This process holds its lock from then on, until `release`. `steps` are those of the whole run; `say` is told
        which run goes on and what is otherwise than before.
        """
        run = Run.create(recipe) if self.run is None else self.run
        run.hold()
        try:
            if self.run is not None:
                self._go_on(run, recipe, data, steps, devices, say)
            with writing(run.path):
                data.save_tokenizer(run.path)
            run.save_data_fingerprint(data.fingerprint)
        except BaseException:
            run.release()
            raise
        return run

    def _go_on(
        self, run: Run, recipe: Recipe, data: DataModule, steps: int, devices: int, say: Callable[[str], None]
    ) -> None:
        if any(step_of(folder) > self.step and not find_damage(folder) for folder in run.checkpoints.all()):
            raise ConfigError(
                f"run folder {run.path}: another process has trained it further meanwhile; start again"
            )
        _check_continuation(self, run, data, steps)
        if data.tokenizer and run.has_tokenizer and run.tokenizer().pieces != data.tokenizer.pieces:
            raise ConfigError(
                f"run folder {run.path}: its tokenizer is not the one that the data have now; start a new run"
            )
        _check_rows(run, self.meta.get("rows_per_step"), recipe, devices)
        say(f"continuing {run.path} after step {self.step}")
        for key, old, new in run.differences(recipe):
            say(f"  {key}: was {old!r}, now {new!r}")
        run.reopen()
        run.checkpoints.set_aside_after(self.step)
        run.save_recipe(replace(recipe, label=run.recipe.label))  # that of the folder


def _find_run(recipe: Recipe) -> tuple[Run | None, str | None]:
    """The run that `resume` means; where "auto" finds none, in what the newest unfinished one differs."""
    if recipe.resume is None:
        return None, None
    if recipe.resume != "auto":
        if (run := Run(recipe.resume)).has_recipe:
            _put_back(run)
        run = Run.open(recipe.resume)
        differing = [d for d in run.differences(recipe) if not _may_differ(d, MAY_CHANGE)]
        if differing:
            listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, a, b in differing)
            raise ConfigError(f"resume = {recipe.resume!r}: that run has another recipe: {listed}")
        return run, None
    passed_over = None
    for run in filter(_concerns_us, runs_of(Path(recipe.logging.dir) / str(recipe.name))):
        try:
            if differing := _what_differs(run, recipe):
                if passed_over is None and not run.is_finished and _put_back(run):
                    passed_over = _in_words(run, differing)
                continue
            _ = run.order  # by which it was chosen, so it must not be damaged
            if run.is_finished or (_put_back(run) and run.checkpoints.all()):
                return run, None
        except ConfigError as error:
            raise ConfigError(
                f"resume = 'auto': {error}. {run.path} has checkpoints, so no new run is started: mend it, or "
                "move it away"
            ) from None
    return None, passed_over


def _concerns_us(run: Run) -> bool:
    """Whether a folder has checkpoints, be they damaged, and is not closed by another user."""
    path = run.path / "recipe.yaml"
    try:
        has_checkpoints = any(p.suffix in ("", ".old") for p in run.checkpoints.folder.glob("step-*"))
        return has_checkpoints and (not path.exists() or os.access(path, os.R_OK))
    except PermissionError:
        return False


def _what_differs(run: Run, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """The (key, the run's value, the recipe's) because of which "auto" must not continue a run. Imports nothing.

    Raises ConfigError if the run's recipe is damaged, or cannot be understood and does not clearly differ.
    """
    places = (*PLACE, "trainer.on_non_finite")
    raw = with_new_names(
        read_saved(run.path / "recipe.yaml", allow_plugins=True)
    )  # nothing is imported for it
    try:
        differing = run.differences(recipe)
    except ConfigError:  # of another version, or with plug-ins that are not this recipe's
        common = [d for d in differing_keys(raw, plain(recipe)) if None not in d and d[0] not in NAMES]
        if not (differing := [d for d in common if not _may_differ(d, places)]):
            raise
    return [d for d in differing if not _may_differ(d, places)]


def _may_differ(difference: tuple[str, Any, Any], keys: tuple[str, ...]) -> bool:
    key, before, now = difference
    return key.startswith(keys) or (
        key == "plugins" and isinstance(before, list) and all(name in now for name in before)
    )


def _in_words(run: Run, differing: list[tuple[str, Any, Any]], most: int = 3) -> str:
    listed = ", ".join(f"{key}: {show(before)}, now {show(now)}" for key, before, now in differing[:most])
    more = f" and {len(differing) - most} more" if len(differing) > most else ""
    return f"the newest unfinished run {run.path} differs in {listed}{more}"


def _put_back(run: Run) -> bool:
    """Makes checkpoints whole again whose replacement was killed; False where the run is not ours to touch now."""
    try:
        with run.lock():
            run.checkpoints.put_back()
    except ConfigError as error:  # another process trains it, or it is another user's
        if error.__cause__ is None or isinstance(error.__cause__, PermissionError):
            return False
        raise
    return True


def _check_continuation(start: Start, run: Run, data: DataModule, steps: int) -> None:
    """Raises ConfigError where going on with `run` would do nothing, or something else than before."""
    awaits_validation = start.step == steps and not start.is_validated and not run.is_finished
    if start.step >= steps and not awaits_validation:
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
    now = trainer.step_rows(devices)
    if before in (None, now):
        return
    per_device = trainer.batch_size * devices
    fitting = (
        f"trainer.rows_per_step={before}"
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
