"""Run folders: what a training run leaves behind, and how to read it again.

runs/<recipe name>/<time>-<label>/
    recipe.yaml         the whole recipe; training from it repeats the run
    environment.json    versions, device, git commit, time
    checkpoints/        a folder for each of the last few and the best: see lm/run/checkpoint.py
    data.fingerprint    tells whether the data have changed since
    tokenizer.json      where the data has a tokenizer
    metrics.csv         step, metric, value
    events.out.*        TensorBoard
    result.json         the final metrics; its presence marks a finished run
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from filelock import FileLock, Timeout

from mixerlab.data import TextTokenizer, load_tokenizer
from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.model.generation import stream_texts
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.recipe.load import differing_keys, load_saved, to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import Checkpoints, read, read_meta
from mixerlab.options import ConfigError, plain
from mixerlab.sealed import write_file


class Run:
    """A run folder: its recipe, checkpoints, metrics and tokenizer."""

    def __init__(self, path: str | Path):
        """`path` is the folder; `Run.create` makes one, `Run.open` checks one."""
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def __reduce__(self) -> Any:
        return type(self), (self.path,)  # what it has read stays here

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def create(cls, recipe: Recipe) -> Self:
        """Makes the folder of a new run, with the recipe and the environment in it. Raises ConfigError."""
        run = cls(new_path(recipe))
        try:
            run.path.mkdir(parents=True)
            run.checkpoints.folder.mkdir()
        except FileExistsError:  # another process has taken the name since
            return cls.create(recipe)
        except OSError as error:
            raise ConfigError(
                f"logging.dir = {recipe.logging.dir!r}: {run.path} cannot be made: {error.strerror}; expected a folder "
                "that can be written to"
            ) from None
        run.save_recipe(recipe)
        run.save_environment()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in a folder. Raises ConfigError unless it has a recipe and a checkpoint."""
        path = Path(path)
        if not path.is_dir():
            found = "that is a file" if path.exists() else "no such folder"
            raise ConfigError(f"run folder {path}: {found}; expected runs/<recipe name>/<run>")
        if inside := [run for run in runs_of(path) if run.has_recipe]:
            raise ConfigError(f"run folder {path}: it holds several runs; did you mean {inside[0].path}?")
        run = cls(path)
        needed = {"recipe.yaml": run.has_recipe, "checkpoints/step-*": bool(run.checkpoints.all())}
        for name, is_there in needed.items():
            if not is_there:
                raise ConfigError(f"run folder {path}: it has no {name}, so there is nothing to load")
        return run

    @property
    def has_recipe(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    @cached_property
    def recipe(self) -> Recipe:
        """What was trained; the data it names may have moved since."""
        return load_saved(self.path / "recipe.yaml")

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes the recipe that, trained, repeats the run: without `resume`."""
        write_file(self.path / "recipe.yaml", to_yaml(recipe))
        self.__dict__.pop("recipe", None)

    def save_environment(self) -> None:
        write_file(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")

    @property
    def started(self) -> str:
        """Digits that sort runs by when they began."""
        try:
            when = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))["started"]
        except (OSError, ValueError, KeyError, TypeError):  # of an older version, whose names are the time
            when = self.path.name
        return re.sub(r"\D", "", str(when))

    @property
    def data_fingerprint(self) -> str | None:
        """That of the data trained on; None where none is noted."""
        path = self.path / "data.fingerprint"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def save_data_fingerprint(self, fingerprint: str) -> None:
        write_file(self.path / "data.fingerprint", fingerprint + "\n")

    def differences(self, recipe: Recipe) -> list[tuple[str, Any, Any]]:
        """(key, this run's value, the recipe's) where they differ, but for names and places."""
        differing = differing_keys(plain(self.recipe), plain(recipe))
        return [d for d in differing if d[0] not in ("resume", "name", "label", "logging.dir")]

    def lock(self) -> FileLock:
        """The run's lock, held by the process that trains it. Raises ConfigError if another process does."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"resume = {str(self.path)!r}: another process is training that run") from None
        return lock

    def is_locked(self) -> bool:
        try:
            self.lock().release()
        except ConfigError:
            return True
        return False

    def finish(self, steps: int, metrics: dict[str, float]) -> None:
        """Marks the run as finished."""
        write_file(self.path / "result.json", json.dumps({"steps": steps, **metrics}, indent=2) + "\n")

    def reopen(self) -> None:
        """Marks the run as unfinished again."""
        (self.path / "result.json").unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, float]:
        """The final metrics, and `steps`; empty while the run is not finished."""
        return json.loads((self.path / "result.json").read_text()) if self.is_finished else {}

    def metrics(self) -> pd.DataFrame:
        """All logged metrics: a row per step, a column per metric, empty where a step has no value."""
        path = self.path / "metrics.csv"
        try:
            rows = pd.read_csv(path)
            return rows.pivot_table(
                index="step", columns="metric", values="value", aggfunc="last", dropna=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{path}: no table of metrics: {error}; expected the file of a run that was trained"
            ) from None

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer_config.json").is_file()

    def tokenizer(self) -> TextTokenizer:
        """Raises ConfigError if the run's data had none."""
        tokenizer = load_tokenizer(self.path)
        if tokenizer is None:
            raise ConfigError(f"run folder {self.path}: it has no tokenizer, so its tokens are not text")
        return tokenizer

    def decoder(self, checkpoint: str | int = "last", device: str | torch.device = "cpu") -> Decoder:
        """The trained decoder, in evaluation mode.

        `checkpoint` is "last", "best" or a step; it may be of any number of ranks. Raises ConfigError.
        """
        checkpoint, device = str(checkpoint), str(device)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device = {device!r}: no CUDA device is available here; expected cpu")
        folder = self.checkpoints.named(checkpoint)
        check_model(folder, self.recipe)
        weights = {
            key.removeprefix("decoder."): value
            for key, value in read(folder)["state_dict"].items()
            if key.startswith("decoder.")
        }
        decoder = build_decoder(self.recipe, vocab_size=weights["embedding.weight"].shape[0])
        if self.recipe.trainer.precision == "bf16-true":
            to_bf16(decoder)
        try:
            decoder.load_state_dict(weights)
        except RuntimeError as error:  # lists every name; the first is enough
            lines = [line.strip() for line in str(error).splitlines()]
            raise ConfigError(f"checkpoint {folder} does not fit the recipe's decoder: {lines[1]}") from None
        return decoder.to(device).eval()

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        *,
        checkpoint: str | int = "last",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> str:
        """The prompt with what the trained decoder adds to it.

        `options` are `temperature`, `top_p` and `seed` of `lm.model.generation.generate`. Raises ConfigError.
        """
        tokenizer, decoder = self.tokenizer(), self.decoder(checkpoint, device)
        pieces = stream_texts(decoder, tokenizer, [prompt], max_new_tokens=max_new_tokens, **options)
        return prompt + "".join(text for _, text in pieces)


def new_path(recipe: Recipe) -> Path:
    """The folder a new run would get: the time and the label, with a number behind it if that is taken."""
    folder = Path(recipe.logging.dir) / str(recipe.name)
    name = datetime.now().strftime("%Y%m%d-%H%M") + (f"-{recipe.label}" if recipe.label else "")
    path, n = folder / name, 1
    while path.exists():
        n += 1
        path = folder / f"{name}-{n}"
    return path


def runs_of(folder: Path) -> Sequence[Run]:
    """The runs in a recipe's folder, newest first."""
    return sorted((Run(path) for path in folder.glob("*/")), key=lambda run: run.started, reverse=True)


def check_model(checkpoint: Path, recipe: Recipe) -> None:
    """Raises ConfigError where a checkpoint is of another model than the recipe's, as one copied by mistake."""
    saved = read_meta(checkpoint).get("recipe")
    if saved is None:
        return
    now = _as_far_as(saved["model"], plain(recipe)["model"])
    differing = list(differing_keys(saved["model"], now, "model"))
    if differing:
        listed = "; ".join(f"{key} is {a!r} there and {b!r} in the recipe" for key, a, b in differing)
        raise ConfigError(f"checkpoint {checkpoint} is of another recipe: {listed}. Remove it from this run")


def _as_far_as(known: Any, tree: Any) -> Any:
    """The part of `tree` that an older version, which had fewer options, knew."""
    if isinstance(known, dict) and isinstance(tree, dict):
        return {key: _as_far_as(value, tree.get(key)) for key, value in known.items()}
    if isinstance(known, list) and isinstance(tree, list) and len(known) == len(tree):
        return [_as_far_as(a, b) for a, b in zip(known, tree, strict=True)]
    return tree


def environment() -> dict[str, str | None]:
    """Versions, device, commit and time: what is needed to tell why two runs differ."""
    packages = ("mixerlab", "torch", "lightning", "triton", "torchmetrics", "tokenizers", "datasets", "numpy")
    on_gpu = torch.cuda.is_available()
    return {
        "started": datetime.now().isoformat(),
        "python": sys.version.split()[0],
        **{name: _version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu",
        "threads": str(torch.get_num_threads()),
        "git_commit": _commit(),
        "command": " ".join(sys.argv),
    }


def _commit() -> str | None:
    """Of the repository that this file is in; None for an installed copy, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
