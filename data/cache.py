"""Folders of derived files, sealed: made when they are first needed, and anew when they are damaged."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from mixerlab.data.background import in_background
from mixerlab.data.module import DataError
from mixerlab.sealed import META, damage, publish, read_meta, seal, write_file

logger = logging.getLogger(__name__)

VERIFIED = "verified.json"
"""In the folder: sizes and times of its files when their checksums were last found right."""


def ensure_folder(
    folder: Path,
    fill: Callable[[Path], None],
    report: Callable[[str], None] = lambda doing: None,
    verify: bool = False,
) -> None:
    """Makes `folder` exist with what `fill(empty folder)` writes, unless it exists undamaged.

    Of several processes that ask for the same folder, one fills it and the others wait.

    Args:
        folder: where.
        fill: writes the files; what it wrote is never seen if it raises.
        report: told what is done, while it is.
        verify: compare the checksums of all files though their sizes and times are as they were.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: {folder.parent} cannot be created: {error}") from error
    if _damage(folder, report, verify) is None:  # asked first, because the folder of a cache may be read-only
        return
    try:
        with _locked(folder, report):
            problem = _damage(folder, report, verify)
            if problem is None:
                return
            if folder.exists():
                logger.warning("the cache in %s is damaged (%s): building it anew", folder, problem)
            _make(folder, fill, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"data.cache_dir: the disk of {folder.parent} is full ({error.strerror}); nothing of the unfinished "
                "cache is left there. Free some space, or name a folder on another disk"
            ) from error
        raise DataError(f"data.cache_dir: {folder} cannot be written: {error}") from error


def _make(folder: Path, fill: Callable[[Path], None], report: Callable[[str], None]) -> None:
    temporary = _temporary(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that died
        temporary.mkdir()
        fill(temporary)
        in_background(lambda _: seal(temporary, folder.name), lambda: report("writing the cache to the disk"))
        publish(temporary, folder)
        _note_verified(folder, _looks(folder))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    found: object = None
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            before, found = found, _progress(folder)
            if found != before:  # one that is stuck is not waited for without end
                report("waiting for another process, which fills the cache")
    try:
        yield
    finally:
        lock.release()


def _progress(folder: Path) -> object:
    """Of the process that fills the folder: differs from an earlier one where it was written to, or touched, since."""
    files = []
    temporary = _temporary(folder)
    with suppress(OSError):  # it is being renamed, or cleared away
        for path in [temporary, *sorted(temporary.rglob("*"))]:
            found = path.stat()
            files.append((path.name, found.st_size, found.st_mtime_ns))
    return files


def _temporary(folder: Path) -> Path:
    """Where it is filled."""
    return folder.with_name(folder.name + ".tmp")


def _damage(folder: Path, report: Callable[[str], None], verify: bool) -> str | None:
    """What is wrong with the folder, or None. Files that look as when their checksums were right are not read."""
    problem = damage(folder, checksums=False)
    if problem is None:
        try:
            looks = _looks(folder)
        except (OSError, ValueError) as error:  # another process makes it anew
            return str(error)
        if verify or looks != _verified(folder):
            problem = in_background(lambda _: damage(folder), lambda: report("verifying the cache"))
            if problem is None:
                _note_verified(folder, looks)
    return problem


def _looks(folder: Path) -> dict[str, list[int]]:
    """What its files look like from outside."""
    found = {name: (folder / name).stat() for name in (META, *read_meta(folder)["files"])}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found.items()}


def _verified(folder: Path) -> object:
    try:
        return json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _note_verified(folder: Path, looks: dict[str, list[int]]) -> None:
    with suppress(OSError):  # a cache that is read-only is read at every start
        write_file(folder / VERIFIED, json.dumps(looks))
