"""Files for people beside those of a run or a sweep: tables, pictures, pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixerlab.options import ConfigError


@contextmanager
def results_in(folder: Path, option: str = "--out") -> Iterator[None]:
    """Around what writes files for people into a folder, which is made. Raises ConfigError where it cannot.

    The folder may be in a stranger's run or sweep, so links are refused: a file would be written where they lead.
    `option` is what names it on the command line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder, *folder.iterdir()):
            if path.is_symlink():
                raise ConfigError(f"{path}: a link, which writing results would follow; remove it")
        yield
    except OSError as error:
        raise ConfigError(
            f"{option} {error.filename or folder}: it cannot be written: {error.strerror}; expected a folder that can "
            "be"
        ) from None
