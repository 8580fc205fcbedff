"""Folders of derived files, either whole or absent: written aside, checksummed, renamed into place."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from data.module import DataError

logger = logging.getLogger(__name__)


def ensure_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes `folder` exist with what `fill(empty folder)` writes, unless it exists undamaged.

    Of several processes that ask for the same folder, one fills it and the others wait.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder.parent} cannot be created: {error}") from error
    if damage(folder, checksums=True) is None:  # asked first, because the folder of a cache may be read-only
        return
    with FileLock(f"{folder}.lock"):
        problem = damage(folder, checksums=True)
        if problem is None:
            return
        if folder.exists():
            logger.warning("the cache in %s is damaged (%s): building it anew", folder, problem)
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died
        temporary.mkdir()
        try:
            fill(temporary)
            _seal(temporary, folder.name)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def damage(folder: Path, checksums: bool) -> str | None:
    """What is wrong with a folder that `ensure_folder` made, or None. `checksums` reads every byte of it."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = meta["files"]
        if not files:
            return "meta.json names no files"
        if (name := meta.get("name", folder.name)) != folder.name:
            return f"it was made as {name}, of something else, and renamed"
        for name, (size, checksum) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksums and crc32(path) != checksum:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"meta.json cannot be read: {error!r}"
    return None


def _seal(folder: Path, name: str) -> None:
    """Writes the sizes and checksums of all files to meta.json, with the folder's later name; and all to the disk."""
    files = {path.name: (path.stat().st_size, crc32(path)) for path in sorted(folder.iterdir())}
    (folder / "meta.json").write_text(json.dumps({"name": name, "files": files}, indent=1))
    for path in [*folder.iterdir(), folder]:
        sync(path)


def crc32(path: Path) -> int:
    """Checksum of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
