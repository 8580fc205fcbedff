"""Run folders: what a training run leaves behind, and how to read it again.

runs/<recipe name>/<run id>/
    recipe.yaml         the whole recipe; training from it repeats the run
    environment.json    versions, device, git commit
    checkpoints/        a folder for each of the last few and the best: see lm/checkpoint.py
    data.fingerprint    tells whether the data have changed since
    tokenizer.json      where the data has a tokenizer
    metrics.csv         step, metric, value
    events.out.*        TensorBoard
    result.json         the final metrics; its presence marks a finished run
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from data import DataModule, TextTokenizer, build_data, data_config, load_tokenizer
from lm.checkpoint import list_checkpoints, named_checkpoint, read, read_meta
from lm.config import HORIZONS, ConfigError, Recipe, differing_keys, load_recipe, to_dict, to_yaml
from lm.decoder import Decoder
from lm.precision import to_bf16

DATA = "data.fingerprint"

PLACE = (
    "strategy.",
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


def new_run_dir(recipe: Recipe) -> Path:
    """The folder a new run would get: named by the time, with a number behind it if that is taken."""
    folder = Path(recipe.logging.dir) / str(recipe.name)
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    path, n = folder / name, 1
    while path.exists():
        n += 1
        path = folder / f"{name}-{n}"
    return path


def create_run(recipe: Recipe) -> Path:
    """Makes the run folder and writes down the recipe and the environment. Raises ConfigError."""
    run = new_run_dir(recipe)
    try:
        (run / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"logging.dir = {recipe.logging.dir!r}: {run} cannot be made: {error.strerror}; expected a folder that "
            "can be written to"
        ) from None
    save_recipe(run, recipe)
    (run / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
    return run


def save_recipe(run: Path, recipe: Recipe) -> None:
    """Writes the recipe that, trained, repeats the run: without `resume`."""
    (run / "recipe.yaml").write_text(to_yaml(replace(recipe, resume=None)), encoding="utf-8")


def environment() -> dict[str, str | None]:
    """Versions, device and commit: what is needed to tell why two runs differ."""
    packages = ("torch", "lightning", "triton", "torchmetrics", "tokenizers", "datasets", "numpy")
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "python": sys.version.split()[0],
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "threads": str(torch.get_num_threads()),
        "git_commit": git.stdout.strip() or None,
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def find_resumable(recipe: Recipe) -> Path | None:
    """The run folder that `resume` asks for, or None if a new run should start.

    "auto" takes the newest unfinished run of the same name and recipe that has a checkpoint. Raises ConfigError
    if a folder is named that cannot be continued.
    """
    if recipe.resume is None:
        return None
    if recipe.resume != "auto":
        run = Path(recipe.resume)
        check_run(run)
        differing = [d for d in _differences(run, recipe) if not d[0].startswith(MAY_CHANGE)]
        if differing:
            listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, a, b in differing)
            raise ConfigError(f"resume = {recipe.resume!r}: that run has another recipe: {listed}")
        return run
    folder = Path(recipe.logging.dir) / str(recipe.name)
    for run in sorted(folder.glob("*/"), key=lambda path: path.name, reverse=True):
        unfinished = list_checkpoints(run) and not (run / "result.json").exists()
        if unfinished and (run / "recipe.yaml").is_file() and not _is_locked(run):
            try:
                same = all(
                    key.startswith((*PLACE, "trainer.on_non_finite")) for key, *_ in _differences(run, recipe)
                )
            except ConfigError:  # of an older version, or with a plug-in that has gone
                continue
            if same:
                return run
    return None


def lock_run(run: Path) -> FileLock:
    """The run's lock, held by the process that trains it. Raises ConfigError if another process does."""
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"resume = {str(run)!r}: another process is training that run") from None
    return lock


def _is_locked(run: Path) -> bool:
    try:
        lock_run(run).release()
    except ConfigError:
        return True
    return False


def _differences(run: Path, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    before = to_dict(load_run_recipe(run))
    differing = differing_keys(before, to_dict(recipe))
    return [d for d in differing if d[0] not in ("resume", "name", "logging.dir")]


def load_run_recipe(run: Path) -> Recipe:
    """The recipe of a run, whose data may have moved since."""
    return load_recipe(run / "recipe.yaml", check_data=False)


def check_run(run: Path) -> None:
    """Raises ConfigError unless `run` is a run folder with a checkpoint."""
    if not run.is_dir():
        found = "that is a file" if run.exists() else "no such folder"
        raise ConfigError(f"run folder {run}: {found}; expected runs/<recipe name>/<run id>")
    if inside := sorted(run.glob("*/recipe.yaml")):
        raise ConfigError(f"run folder {run}: it holds several runs; did you mean {inside[-1].parent}?")
    if not (run / "recipe.yaml").is_file():
        raise ConfigError(f"run folder {run}: it has no recipe.yaml, so there is nothing to load")
    if not list_checkpoints(run):
        raise ConfigError(f"run folder {run}: it has no checkpoints/step-*, so there is nothing to load")


def load_decoder(run: Path, device: str = "cpu", checkpoint: str = "last") -> tuple[Decoder, Recipe]:
    """The trained decoder of a run, in evaluation mode, and its recipe.

    `checkpoint` is "last", "best" or a step; it may be of any number of ranks. Raises ConfigError.
    """
    check_run(run)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device = {device!r}: no CUDA device is available here; expected cpu")
    recipe = load_run_recipe(run)
    folder = named_checkpoint(run, checkpoint)
    check_recipe_of(folder, recipe)
    weights = {
        key.removeprefix("decoder."): value
        for key, value in read(folder)["state_dict"].items()
        if key.startswith("decoder.")
    }
    decoder = build_decoder(recipe, vocab_size=weights["embedding.weight"].shape[0])
    if recipe.trainer.precision == "bf16-true":
        to_bf16(decoder)
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:  # lists every name; the first is enough
        lines = [line.strip() for line in str(error).splitlines()]
        raise ConfigError(f"checkpoint {folder} does not fit the recipe's decoder: {lines[1]}") from None
    return decoder.to(device).eval(), recipe


def check_recipe_of(folder: Path, recipe: Recipe) -> None:
    """Raises ConfigError where a checkpoint is of another model than the recipe's, as one copied by mistake."""
    saved = read_meta(folder).get("recipe")
    if saved is None:
        return
    differing = list(differing_keys(saved["model"], to_dict(recipe)["model"], "model"))
    if differing:
        listed = "; ".join(f"{key} is {a!r} there and {b!r} in the recipe" for key, a, b in differing)
        raise ConfigError(f"checkpoint {folder} is of another recipe: {listed}. Remove it from this run")


def make_data(recipe: Recipe) -> DataModule:
    """The recipe's data module; touches no data."""
    return build_data(data_config(recipe.data["name"])(**recipe.data), recipe.seed)


def build_decoder(recipe: Recipe, vocab_size: int) -> Decoder:
    """The recipe's decoder, not yet initialised."""
    options = {
        key: value for key, value in vars(recipe.model).items() if key not in ("match", "match_params")
    }
    return Decoder(vocab_size, **options)


def load_run_tokenizer(run: Path) -> TextTokenizer:
    """The tokenizer saved in the run. Raises ConfigError if its data had none."""
    tokenizer = load_tokenizer(run)
    if tokenizer is None:
        raise ConfigError(f"run folder {run}: it has no tokenizer, so its tokens are not text")
    return tokenizer
