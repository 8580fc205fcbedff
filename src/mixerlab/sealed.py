"""Files and folders that are either whole or absent: written aside, checksummed, moved into place.

A sealed folder has a meta.json with the size and checksum of every other file in it, and what its owner notes there.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

META = "meta.json"


def write_file(path: Path, text: str) -> None:
    """Replaces the file as a whole; a crash leaves the old one or the new one. Touches nothing if the text is there."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def seal(folder: Path, name: str, files: Mapping[str, tuple[int, int]] | None = None, **notes: Any) -> None:
    """Writes meta.json, and everything in the folder to the disk.

    Args:
        folder: holds the files, and nothing else.
        name: the folder's later name: under another the content is taken for damaged.
        files: (bytes, checksum) of each file, where they are known; None: of all that are there.
        notes: plain values to keep in meta.json.
    """
    if files is None:
        files = {path.name: size_and_checksum(path) for path in sorted(folder.iterdir())}
    write_meta(folder, {**notes, "name": name, "files": {file: list(size) for file, size in files.items()}})


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Replaces meta.json as a whole, with a checksum of its own."""
    meta = {key: value for key, value in meta.items() if key != "checksum"}
    write_file(folder / META, json.dumps({**meta, "checksum": _checksum(meta)}, indent=1))


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a sealed folder. Raises ValueError, with the reason, if it is not what was written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        files, checksum = dict(meta["files"]), meta.pop("checksum", None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{META} cannot be read: {error!r}") from None
    if checksum is not None and checksum != _checksum(meta):  # caches of older versions have none
        raise ValueError(f"the checksum of {META} is wrong")
    return {**meta, "files": files}


def damage(folder: Path, checksums: bool = True) -> str | None:
    """What is wrong with a sealed folder, or None. `checksums` reads every byte of it."""
    try:
        meta = read_meta(folder)
        if not meta["files"]:
            return f"{META} names no files"
        if (name := meta.get("name", folder.name)) != folder.name:
            return f"it was made as {name}, of something else, and renamed"
        for name, (size, checksum) in meta["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if checksums and crc32(path) != checksum:
                return f"the checksum of {name} is wrong"
    except (OSError, TypeError) as error:
        return f"{META} cannot be read: {error!r}"
    except ValueError as error:
        return str(error)
    return None


def publish(temporary: Path, folder: Path) -> None:
    """Gives a sealed folder its name. What had it goes last; `put_back` mends a crash in between."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Gives its name back to a folder in whose replacement the process was killed."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Of a file that was just written, once it is on the disk."""
    sync(path)
    return path.stat().st_size, crc32(path)


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


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
