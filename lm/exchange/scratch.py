"""A folder that is written aside and gets its name when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mixerlab.options import ConfigError, first_line
from mixerlab.sealed import sync


def check_free(to: Path) -> None:
    """Raises ConfigError unless `--to` names a folder that is not there, or is empty."""
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ConfigError(f"--to {to}: it exists already; expected a new or an empty folder")


@contextmanager
def written_aside(to: Path, verb: str) -> Iterator[Path]:
    """A new folder to fill, which becomes `to` at the end, unless something is raised. Raises ConfigError.

    What a killed process left of another go. `verb` is the command's.
    """
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(to.resolve().with_name(f".{verb}-{to.resolve().name}"), to, verb) as folder:
            yield folder
            folder.rename(to)
            sync(to.parent)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--to {to}: it cannot be written: {first_line(error)}") from None


@contextmanager
def _scratch(scratch: Path, to: Path, verb: str) -> Iterator[Path]:
    scratch.mkdir(exist_ok=True)
    try:
        with FileLock(scratch / ".lock", timeout=0):
            folder = scratch / "new"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Timeout:
        raise ConfigError(f"--to {to}: another process is {verb}ing to that folder") from None
