"""Files and folders that are either whole or absent: written aside, checksummed, moved into place.

A sealed folder has a meta.json with the size and checksum of every other file in it, and what its owner notes there.
A folder whose files change one by one has a checksums.json instead: `write_noted`, `read_noted`.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import xxhash

Checksum = int | str
"""A CRC-32, or "xxh3:" and 64 bits of XXH3 in hexadecimal, which takes a seventh of the time."""

META = "meta.json"
NOTED = "checksums.json"


def write_file(path: Path, text: str) -> None:
    """Replaces the file as a whole; a crash leaves the old one or the new one. Touches nothing if the text is there."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        sync(new)
        new.replace(path)
        sync(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)  # a half on a full disk
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_noted(path: Path, text: str) -> None:
    """As `write_file`, with the checksum in the folder's checksums.json; raises ValueError where that is damaged.

    Of a file that changes the old checksum stays noted beside the new one: a crash may leave either content.
    """
    noted, checksum = _noted(path.parent), zlib.crc32(text.encode())
    allowed = [checksum]
    if path.is_file() and (before := crc32(path)) in noted.get(path.name, [before]):
        allowed = list(dict.fromkeys([before, checksum]))
    if not set(allowed) <= set(noted.get(path.name, [])):
        write_meta(path.parent, {"files": {**noted, path.name: allowed}}, NOTED)
    write_file(path, text)


def read_noted(path: Path) -> str:
    """The text of a file. Raises ValueError, with the reason, if it is not what was written; OSError.

    A file of which no checksum is noted is taken as it is.
    """
    content = path.read_bytes()
    checksums = _noted(path.parent).get(path.name)
    if checksums is not None and zlib.crc32(content) not in checksums:
        raise ValueError(
            f"{path} is not what was written there: it is damaged, or was changed by hand. Put it back, or delete "
            f"{NOTED} beside it to have the files there taken as they are"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def noted_damage(folder: Path) -> list[str]:
    """What is wrong with the files whose checksums are noted, a line for each. A file may have gone."""
    problems = []
    try:
        for name in _noted(folder):
            try:
                read_noted(folder / name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                problems.append(str(error))
    except ValueError as error:
        problems.append(str(error))
    return problems


def _noted(folder: Path) -> dict[str, list[int]]:
    """The last checksums of each file. Raises ValueError."""
    if not (folder / NOTED).exists():
        return {}
    try:
        files = read_meta(folder, NOTED)["files"]
        if all(isinstance(checksums, list) for checksums in files.values()):
            return files
        problem = f"{NOTED} holds no checksums"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{folder}: {problem}; delete that file to have the others taken as they are")


def seal(
    folder: Path, name: str, files: Mapping[str, tuple[int, Checksum]] | None = None, **notes: Any
) -> None:
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


def write_meta(folder: Path, meta: dict[str, Any], name: str = META) -> None:
    """Replaces meta.json, or another file of its form, as a whole, with a checksum of its own."""
    meta = {key: value for key, value in meta.items() if key != "checksum"}
    write_file(folder / name, json.dumps({**meta, "checksum": _checksum(meta)}, indent=1))


def read_meta(folder: Path, name: str = META) -> dict[str, Any]:
    """meta.json of a sealed folder, or another file of its form. Raises ValueError, with the reason, if damaged."""
    try:
        meta = json.loads((folder / name).read_text(encoding="utf-8"))
        files, checksum = dict(meta["files"]), meta.pop("checksum", None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read: {error!r}") from None
    if checksum is not None and checksum != _checksum(meta):  # caches of older versions have none
        raise ValueError(f"the checksum of {name} is wrong")
    return {**meta, "files": files}


def damage(
    folder: Path,
    checksums: bool | Collection[str] = True,
    sign: Callable[[], None] = lambda: None,
) -> str | None:
    """What is wrong with a sealed folder, or None.

    `checksums` reads every byte of it, or of the files it names, and calls `sign` whenever a part is read.
    """
    checked = None if isinstance(checksums, bool) else set(checksums)
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
            if (
                checksums
                and (checked is None or name in checked)
                and _checksum_like(checksum, path, sign) != checksum
            ):
                return f"the checksum of {name} is wrong"
    except (OSError, TypeError) as error:
        return f"{META} cannot be read: {error!r}"
    except ValueError as error:
        return str(error)
    return None


def publish(temporary: Path, folder: Path) -> None:
    """Gives a sealed folder its name. What had it goes last; `put_back` mends a crash in between."""
    old = folder.with_name(folder.name + ".old")
    while True:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
            break
        except OSError:
            if not folder.exists():
                raise  # else another process has put it back in this instant
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Gives its name back to a folder in whose replacement the process was killed."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


class Summed:
    """A file that is written once, from its beginning, and knows its checksum then without being read again."""

    def __init__(self, path: Path, sign: Callable[[], None] = lambda: None):
        """`sign` is called whenever a part is written."""
        self._file, self._sign = path.open("wb"), sign
        self._hash = xxhash.xxh3_64()
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Writes all of it."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self._hash.update(block)  # and while it is in the processor's cache
            self._file.write(block)
            self._sign()
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def size_and_checksum(self) -> tuple[int, Checksum]:
        """Of all that was written, once it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._size, f"xxh3:{self._hash.hexdigest()}"


_BLOCK = 1 << 20


def size_and_checksum(path: Path) -> tuple[int, int]:
    """Of a file that was just written, once it is on the disk."""
    sync(path)
    return path.stat().st_size, crc32(path)


def crc32(path: Path, sign: Callable[[], None] = lambda: None) -> int:
    """Checksum of a file's bytes; `sign` is called whenever a part is read."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
            sign()
    return checksum


def xxh3(path: Path, sign: Callable[[], None] = lambda: None) -> str:
    """As `crc32`, of the other kind."""
    found = xxhash.xxh3_64()
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            found.update(buffer[:read])
            sign()
    return f"xxh3:{found.hexdigest()}"


def _checksum_like(known: Checksum, path: Path, sign: Callable[[], None]) -> Checksum:
    """Of a file, of the kind of the one that is known."""
    return crc32(path, sign) if isinstance(known, int) else xxh3(path, sign)


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
