"""Digests of files, remembered, so that files that have not changed are not read at every start."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from mixerlab.data.background import in_background
from mixerlab.data.module import DataError

GRANULARITY = 2 * 10**9
"""Nanoseconds: no clock of a file system is coarser."""

REMEMBERED = 1000
"""Digests that are kept, the latest."""


class Digests:
    """Digests of lists of files, by their names, sizes and times.

    They are remembered in one small file. Where that is damaged, missing, or cannot be written, files are read again;
    of processes that write it at the same time, one is remembered.

    Args:
        memory: the file.
        report: told, while files are looked at, what is done.
    """

    def __init__(self, memory: Path, report: Callable[[str], None] = lambda doing: None) -> None:
        self.memory = memory
        self.report = report

    def of(self, heading: Sequence[str], files: Sequence[str]) -> str:
        """Of `heading` and the contents of the files, in order. Raises DataError where one cannot be read."""
        now = time.time_ns()
        key, newest = self._listing(heading, files)
        if known := self._read().get(key):
            return known
        found = digest([*heading, *self._read_files(files)])
        # A file that is changed as soon as it was read may have the same time afterwards: as long as that can be, its
        # digest is not remembered.
        if newest < now - GRANULARITY and self._listing(heading, files)[0] == key:
            self._remember(key, found)
        return found

    def _listing(self, heading: Sequence[str], files: Sequence[str]) -> tuple[str, int]:
        """A digest of what the files look like from outside, and the time of the last change of any."""
        listing = hashlib.blake2b(json.dumps([os.getcwd(), *heading]).encode(), digest_size=16)
        newest = 0
        for number, name in enumerate(files):
            try:
                found = os.stat(name)
            except OSError as error:
                raise DataError(f"data.files: {name} cannot be read: {error.strerror}") from error
            # The time of the last change of its entry tells files apart whose time of modification was set.
            look = f"\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\0"
            listing.update(os.fsencode(name) + look.encode())
            newest = max(newest, found.st_mtime_ns)
            if number % 10_000 == 0:
                self.report("looking for the documents")
        return listing.hexdigest(), newest

    def _read_files(self, files: Sequence[str]) -> list[str]:
        """The digest of each file's content."""

        def digests(names: Sequence[str], stop: Event) -> list[str]:
            found = []
            for name in names:
                if stop.is_set():
                    break
                content = hashlib.blake2b()
                try:
                    with open(name, "rb", buffering=0) as file:
                        while (block := file.read(1 << 20)) and not stop.is_set():
                            content.update(block)
                except OSError as error:
                    raise DataError(f"data.files: {name} cannot be read: {error.strerror}") from error
                found.append(content.hexdigest())
            return found

        def work(stop: Event) -> list[str]:
            some = max(1, len(files) // 1000)
            parts = [files[i : i + some] for i in range(0, len(files), some)]
            with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
                return [d for part in pool.map(lambda names: digests(names, stop), parts) for d in part]

        return in_background(
            work, lambda: self.report("reading the documents, to see whether they have changed")
        )

    def _read(self) -> dict[str, str]:
        try:
            checksum, content = self.memory.read_bytes().split(b"\n", 1)
            return json.loads(content) if int(checksum, 16) == zlib.crc32(content) else {}
        except (OSError, ValueError):
            return {}

    def _remember(self, key: str, found: str) -> None:
        remembered = [*self._read().items(), (key, found)][-REMEMBERED:]
        content = json.dumps(dict(remembered), indent=0).encode()
        new = self.memory.with_name(f"{self.memory.name}.{secrets.token_hex(4)}.new")
        with suppress(OSError):  # a folder that is read-only, or full
            try:
                self.memory.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(b"%08x\n%s" % (zlib.crc32(content), content))
                new.replace(self.memory)
            finally:
                new.unlink(missing_ok=True)


def digest(parts: Sequence[str]) -> str:
    """Of texts, in order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
