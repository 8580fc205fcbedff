"""Folders of derived files, sealed: made when they are first needed, and anew when they are damaged."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mixerlab.data.module import DataError
from mixerlab.sealed import damage, publish, seal

logger = logging.getLogger(__name__)


def ensure_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` exist with what `fill(empty folder)` writes, unless it exists undamaged.

    Of several processes that ask for the same folder, one fills it and the others wait.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder.parent} cannot be created: {error}") from error
    if damage(folder) is None:  # asked first, because the folder of a cache may be read-only
        return
    with FileLock(f"{folder}.lock"):
        problem = damage(folder)
        if problem is None:
            return
        if folder.exists():
            logger.warning("the cache in %s is damaged (%s): building it anew", folder, problem)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died
        temporary.mkdir()
        try:
            fill(temporary)
            seal(temporary, folder.name)
            publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
