"""Run folders: what a training run leaves behind, and how to read it again.

runs/<recipe name>/<time>-<label>/
    recipe.yaml         the whole recipe; training from it repeats the run
    environment.json    versions, device, git commit, time, and the run's number among its neighbours
    checkpoints/        a folder for each of the last few and the best: see lm/run/checkpoint.py
    data.fingerprint    tells whether the data have changed since
    tokenizer.json      where the data has a tokenizer
    metrics.csv         step, metric, value
    events.out.*        TensorBoard
    result.json         the final metrics; it marks a finished run
    checksums.json      of the files of text above, but for metrics.csv, of which damaged lines are skipped
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from filelock import FileLock, Timeout

from mixerlab.data import DataError, TextTokenizer, load_tokenizer
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.generation import stream_texts
from mixerlab.lm.recipe.check import for_any_devices, with_auto_backends
from mixerlab.lm.recipe.files import read_saved, too_odd
from mixerlab.lm.recipe.load import differing_keys, load_saved, to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import Checkpoints, read
from mixerlab.lm.run.curves import lines_of
from mixerlab.lm.run.environment import environment
from mixerlab.lm.run.weights import check_model, check_tokens, decoder_of
from mixerlab.options import ConfigError, UserError, first_line, plain
from mixerlab.sealed import read_noted, write_noted

NAMES = ("resume", "name", "label", "logging.dir")
"""Keys that say what a run is called and where it lies."""

_held: dict[Path, FileLock] = {}
"""The locks of the runs that this process holds."""


class Run:
    """A run folder: its recipe, checkpoints, metrics and tokenizer."""

    def __init__(self, path: str | Path, allow_plugins: bool = False):
        """`path` is the folder; `Run.create` makes one, `Run.open` checks one."""
        self.path, self.allow_plugins = Path(path), allow_plugins
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    def __reduce__(self) -> Any:
        return type(self), (self.path, self.allow_plugins)  # what it has read stays here

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
        try:
            run.save_recipe(recipe)
            run.save_environment()
        except ConfigError:
            shutil.rmtree(run.path, ignore_errors=True)  # nothing is in it yet
            raise
        return run

    @classmethod
    def open(cls, path: str | Path, allow_plugins: bool = False) -> Self:
        """The run in a folder, which may be a stranger's: nothing in it is imported or unpickled.

        With `allow_plugins` the `plugins` of its recipe are imported when the recipe is asked for.

        Raises ConfigError unless it has a recipe that can be read, and a checkpoint.
        """
        run, path = cls(path, allow_plugins), Path(path)
        try:
            if not path.is_dir():
                found = "that is a file" if path.exists() else "no such folder"
                raise ConfigError(f"run folder {path}: {found}; expected runs/<recipe name>/<run>")
            if inside := [other for other in runs_of(path) if other.has_recipe]:
                raise ConfigError(f"run folder {path}: it holds several runs; did you mean {inside[0].path}?")
            run.checkpoints.put_back()
            needed = {"recipe.yaml": run.has_recipe, "checkpoints/step-*": bool(run.checkpoints.all())}
        except OSError as error:  # a name that is too long, or a folder that must not be looked into
            raise ConfigError(f"run folder {path}: {error.strerror}") from None
        for name, is_there in needed.items():
            if not is_there:
                raise ConfigError(f"run folder {path}: it has no {name}, so there is nothing to load")
        read_saved(path / "recipe.yaml", allow_plugins)
        return run

    @property
    def has_recipe(self) -> bool:
        try:
            return (self.path / "recipe.yaml").is_file()
        except OSError:  # a name that is too long, or a folder that must not be looked into
            return False

    @cached_property
    def recipe(self) -> Recipe:
        """What was trained; the data it names may have moved since."""
        return load_saved(self.path / "recipe.yaml", self.allow_plugins)

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes the recipe that, trained, repeats the run: without `resume`."""
        text = to_yaml(recipe)
        if problem := too_odd(text):
            raise ConfigError(
                f"the recipe of {self.path} could not be read again: {problem}; name files by a glob, shorten texts"
            )
        self._write("recipe.yaml", text)
        self.__dict__.pop("recipe", None)

    def save_environment(self) -> None:
        """Writes versions, device and time, and a number one above those of the runs beside this one."""
        others = (_order(run)[0] for run in runs_of(self.path.parent) if run.path != self.path)
        number = 1 + max((n for n in others if n < math.inf), default=0)
        self._write("environment.json", json.dumps({"number": number, **environment()}, indent=2) + "\n")

    @property
    def order(self) -> tuple[float, str]:
        """Sorts runs by when they began: by their numbers, since clocks may be wrong. Raises ConfigError."""
        noted = self._read_json("environment.json")
        number = noted.get("number", 0)  # an older version wrote none
        return number if isinstance(number, int) else 0, re.sub(
            r"\D", "", str(noted.get("started", self.path.name))
        )

    @property
    def data_fingerprint(self) -> str | None:
        """That of the data trained on; None where none is noted. Raises ConfigError."""
        text = self._read("data.fingerprint")
        return None if text is None else text.strip()

    def save_data_fingerprint(self, fingerprint: str) -> None:
        self._write("data.fingerprint", fingerprint + "\n")

    def differences(self, recipe: Recipe) -> list[tuple[str, Any, Any]]:
        """(key, this run's value, the recipe's) where they differ, but for names and places."""
        differing = differing_keys(plain(self.recipe), plain(for_any_devices(recipe)))
        return [d for d in differing if d[0] not in NAMES]

    def lock(self) -> FileLock:
        """The run's lock, for a `with`. Raises ConfigError if another process, or this one, holds it."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0.5)  # one that looks for a run to continue holds it for an instant
        except Timeout:
            raise ConfigError(f"run folder {self.path}: another process is training that run") from None
        except OSError as error:
            raise ConfigError(f"run folder {self.path}: it cannot be locked: {error.strerror}") from error
        return lock

    def hold(self) -> None:
        """Takes the lock until `release`, or the process's end. Raises ConfigError as `lock` does."""
        _held[self.path.resolve()] = self.lock()

    def release(self) -> None:
        """Gives up the lock that this process holds, if it does."""
        if lock := _held.pop(self.path.resolve(), None):
            lock.release()

    def finish(self, steps: int, metrics: dict[str, float]) -> None:
        """Marks the run as finished."""
        self._write("result.json", json.dumps({"steps": steps, **metrics}, indent=2) + "\n")

    def reopen(self) -> None:
        """Marks the run as unfinished again."""
        (self.path / "result.json").unlink(missing_ok=True)

    @property
    def is_finished(self) -> bool:
        """Whether it has a result; one that is damaged counts for none, and is made anew where the run goes on."""
        try:
            return bool(self.result)
        except ConfigError:
            return False

    @property
    def result(self) -> dict[str, float]:
        """The final metrics, and `steps`; empty while the run is not finished. Raises ConfigError."""
        result = self._read_json("result.json")
        is_whole = isinstance(result.get("steps"), int)
        if result and not (is_whole and all(isinstance(value, (int, float)) for value in result.values())):
            raise ConfigError(f"{self.path / 'result.json'}: it is no result of a run")
        return result

    def _read(self, name: str) -> str | None:
        """The text of one of the folder's files, None where there is none. Raises ConfigError if it is damaged."""
        try:
            return read_noted(self.path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.path / name}: it cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _read_json(self, name: str) -> dict[str, Any]:
        """As `_read`, of a JSON object, empty where there is none."""
        if (text := self._read(name)) is None:
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.path / name} is damaged: {first_line(error)}") from None
        if not isinstance(found, dict):
            raise ConfigError(f"{self.path / name} is damaged: expected a JSON object")
        return found

    def _write(self, name: str, text: str) -> None:
        """Replaces one of the folder's files as a whole, if it changes. Raises ConfigError; then it is as it was."""
        with writing(self.path / name):
            write_noted(self.path / name, text)

    def metrics(self) -> pd.DataFrame:
        """All logged metrics: a row per step, a column per metric, empty where a step has no value."""
        path = self.path / "metrics.csv"
        try:
            lines = [(step, metric, float(value)) for step, metric, value in lines_of(path)]
        except OSError as error:
            raise ConfigError(
                f"{path}: no table of metrics: {error.strerror}; expected the file of a run that was trained"
            ) from None
        rows = pd.DataFrame(lines, columns=["step", "metric", "value"])
        return rows.pivot_table(index="step", columns="metric", values="value", aggfunc="last", dropna=False)

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer_config.json").is_file()

    def tokenizer(self) -> TextTokenizer:
        """Raises ConfigError if the run's data had none, or it cannot be read."""
        try:
            tokenizer = load_tokenizer(self.path)
        except DataError as error:
            raise ConfigError(str(error)) from None
        if tokenizer is None:
            raise ConfigError(f"run folder {self.path}: it has no tokenizer, so its tokens are not text")
        return tokenizer

    def decoder(
        self, checkpoint: str | int = "last", device: str | torch.device = "cpu", auto_backends: bool = False
    ) -> Decoder:
        """The trained decoder, in evaluation mode; with `auto_backends`, or on a CPU, mixers choose their backends.

        `checkpoint` is "last", "best" or a step; it may be of any number of ranks. Raises ConfigError.
        """
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device = {str(device)!r}: no CUDA device is available here; expected cpu")
        folder = self.checkpoints.named(str(checkpoint))
        check_model(folder, self.recipe)
        recipe = with_auto_backends(self.recipe) if auto_backends or str(device) == "cpu" else self.recipe
        return decoder_of(recipe, read(folder), folder).to(device).eval()

    def texts(
        self,
        prompts: Sequence[str],
        checkpoint: str | int = "last",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Iterator[tuple[int, str]]:
        """(the prompt's number, a piece of text), as `lm.model.generation.stream_texts`, whose `options` it takes.

        Raises ConfigError.
        """
        decoder, tokenizer = self.decoder(checkpoint, device), self.tokenizer()
        check_tokens(self.path, tokenizer, decoder)
        return stream_texts(decoder, tokenizer, prompts, **options)

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
        pieces = self.texts([prompt], checkpoint, device, max_new_tokens=max_new_tokens, **options)
        return prompt + "".join(text for _, text in pieces)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file of a run folder: a disk that is full, or the like, is said in one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path} cannot be written: {error.strerror}. It is as it was, and so are the "
            "checkpoints: make room, then continue with resume=auto"
        ) from None
    except UserError:
        raise
    except ValueError as error:  # the checksums beside it are damaged
        raise ConfigError(str(error)) from None


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
    return sorted((Run(path) for path in folder.glob("*/")), key=_order, reverse=True)


def _order(run: Run) -> tuple[float, str]:
    """As `Run.order`, where that is damaged the newest: to be looked at, and named, before others."""
    try:
        return run.order
    except ConfigError:
        return math.inf, run.path.name
