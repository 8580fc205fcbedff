import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest
from filelock import FileLock

from mixerlab.data import DataError, cache
from mixerlab.data.cache import ensure_folder
from mixerlab.sealed import damage

CONTENT = {"tokens": bytes(range(256)) * 20, "ends": b"\x05\x00\x00\x00"}


def fill(folder):
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def refuse(folder):
    raise AssertionError("filled again")


@pytest.fixture
def folder(tmp_path):
    ensure_folder(tmp_path / "a" / "key", fill)
    return tmp_path / "a" / "key"


def is_whole(folder) -> bool:
    return all((folder / name).read_bytes() == content for name, content in CONTENT.items())


def test_a_whole_folder_is_not_filled_again(folder):
    ensure_folder(folder, refuse)
    assert is_whole(folder)
    assert damage(folder, checksums=True) is None


def test_a_folder_of_an_older_version_whose_meta_file_has_no_checksum_is_whole(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    ensure_folder(folder, refuse)
    flip(folder / "tokens")
    assert damage(folder) == "the checksum of tokens is wrong"


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["tokens", "ends", "meta.json"])
@pytest.mark.parametrize("harm", [truncate, flip, empty, os.remove])
def test_a_damaged_file_is_reported_in_one_line_and_built_anew(folder, caplog, name, harm):
    harm(folder / name)
    assert damage(folder, checksums=True)
    ensure_folder(folder, fill)
    assert is_whole(folder)
    assert damage(folder, checksums=True) is None
    [record] = caplog.records
    assert f"{folder} is damaged" in record.message
    assert "\n" not in record.message


def test_a_longer_file_is_damaged_too(folder):
    extend(folder / "tokens")
    assert damage(folder, checksums=False) == "tokens has 5121 bytes instead of 5120"


@pytest.mark.parametrize(
    "meta", ["{}", "[]", "3", "null", '{"files": 3}', '{"files": {}}', '{"files": {"tokens": 1}}', "\xff"]
)
def test_a_meta_file_of_another_shape_is_damage(folder, meta):
    (folder / "meta.json").write_text(meta, encoding="latin-1")
    assert damage(folder, checksums=False)
    ensure_folder(folder, fill)
    assert is_whole(folder)


def test_an_interrupted_write_is_never_seen_and_its_remains_are_removed(tmp_path):
    folder = tmp_path / "key"

    def break_off(temporary):
        (temporary / "tokens").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_folder(folder, break_off)
    assert not folder.exists()
    left = tmp_path / "key.tmp"  # as of a process that was killed
    left.mkdir()
    (left / "stray").write_bytes(b"half")
    ensure_folder(folder, fill)
    assert sorted(path.name for path in folder.iterdir()) == ["ends", "meta.json", "tokens", "verified.json"]
    assert not left.exists()


def test_a_folder_that_cannot_be_created_is_an_error_about_the_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir: .*file cannot be created"):
        ensure_folder(tmp_path / "file" / "key", fill)


def test_sizes_are_in_the_meta_file(folder):
    files = json.loads((folder / "meta.json").read_text())["files"]
    assert {name: size for name, (size, _) in files.items()} == {n: len(c) for n, c in CONTENT.items()}


def fill_slowly(folder):
    fill(folder)
    with (folder.parent / "filled").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(0.3)


def test_of_processes_that_start_together_one_fills_and_all_see_it_whole(tmp_path):
    folder = tmp_path / "key"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_folder, args=(folder, fill_slowly)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert is_whole(folder)
    assert len((tmp_path / "filled").read_text().split()) == 1
    shutil.rmtree(folder)


# Looking again


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The folders of which all checksums were compared."""
    found: list[str] = []

    def counted(folder, checksums=True):
        if checksums:
            found.append(folder.name)
        return damage(folder, checksums)

    monkeypatch.setattr(cache, "damage", counted)
    return found


def test_a_cache_that_looks_as_before_is_not_read(tmp_path, checked):
    for _ in range(3):
        ensure_folder(tmp_path / "key", fill)
    assert checked == []
    ensure_folder(tmp_path / "key", refuse, verify=True)
    assert checked == ["key"]


def flip_and_hide(path):
    """A bit that the disk turned: nothing else changes."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_turned_bit_is_found_when_it_is_asked_for(folder, monkeypatch):
    looks = cache._looks(folder)
    flip_and_hide(folder / "tokens")
    monkeypatch.setattr(cache, "_looks", lambda folder: looks)  # a disk does not change the times
    ensure_folder(folder, refuse)
    ensure_folder(folder, fill, verify=True)
    assert is_whole(folder)


@pytest.mark.parametrize("harm", [os.remove, truncate, flip, empty])
def test_a_cache_without_a_sign_that_it_was_verified_is_read_once(folder, checked, harm):
    harm(folder / "verified.json")
    for _ in range(2):
        ensure_folder(folder, refuse)
    assert checked == ["key"]


def test_a_cache_of_an_older_version_is_verified_once(folder, checked):
    (folder / "verified.json").unlink()
    flip_and_hide(folder / "tokens")
    ensure_folder(folder, fill)
    assert is_whole(folder)


def test_a_file_that_was_touched_is_verified_once(folder, checked):
    (folder / "tokens").touch()
    for _ in range(2):
        ensure_folder(folder, refuse)
    assert checked == ["key"]


def test_a_read_only_cache_is_used(folder, monkeypatch):
    (folder / "tokens").touch()
    monkeypatch.setattr(
        cache, "write_file", lambda *a: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    ensure_folder(folder, refuse)


# Full disks


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stage", ["fill", "seal", "publish", "mkdir", "lock"])
def test_a_disk_that_fills_leaves_nothing_half_and_what_was_there(folder, monkeypatch, stage):
    def fill_half(temporary):
        (temporary / "tokens").write_bytes(b"half")
        if stage == "fill":
            full_disk()

    if stage in ("seal", "publish"):
        monkeypatch.setattr(cache, stage, full_disk)
    if stage == "mkdir":
        monkeypatch.setattr("pathlib.Path.mkdir", lambda self, **k: k or full_disk())
    if stage == "lock":
        monkeypatch.setattr(cache.FileLock, "acquire", full_disk)
    with pytest.raises(DataError) as error:
        ensure_folder(folder.with_name("other"), fill_half)
    assert "\n" not in str(error.value)
    assert f"data.cache_dir: the disk of {folder.parent} is full (No space left on device)" in str(
        error.value
    )
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["key"]
    assert damage(folder) is None
    monkeypatch.undo()
    ensure_folder(folder.with_name("other"), fill)
    assert is_whole(folder.with_name("other"))


def test_another_failure_to_write_is_named(tmp_path):
    def broken(temporary):
        raise OSError(errno.EIO, "Input/output error", str(temporary / "tokens"))

    with pytest.raises(
        DataError, match=r"data\.cache_dir: .*key cannot be written: .*Input/output error: .*tokens"
    ):
        ensure_folder(tmp_path / "key", broken)


# Signals and waiting


class Asked(BaseException):
    """What a handler raises."""


@pytest.mark.parametrize("stage", ["fill", "seal", "lock"])
def test_a_signal_leaves_nothing_half(tmp_path, monkeypatch, stage):
    def handler(signum, frame):
        raise Asked

    def wait(*args, **kwargs):
        time.sleep(60)

    def fill_slowly(temporary):
        fill(temporary)
        if stage == "fill":
            wait()

    if stage == "seal":
        ended = threading.Event()
        monkeypatch.setattr(
            cache, "seal", lambda *args: ended.wait(60)
        )  # as a library that looks at no signal
    holder = FileLock(str(tmp_path / "key.lock"))
    if stage == "lock":
        holder.acquire()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.monotonic()
        with pytest.raises(Asked):
            ensure_folder(tmp_path / "key", fill_slowly)
        assert time.monotonic() - start < 30
    finally:
        signal.signal(signal.SIGALRM, before)
        holder.release()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    ensure_folder(tmp_path / "key", fill)
    assert is_whole(tmp_path / "key")


def test_who_waits_for_another_process_says_so_while_that_one_writes(tmp_path):
    said: list[float] = []
    temporary = tmp_path / "key.tmp"
    temporary.mkdir()
    holder = FileLock(str(tmp_path / "key.lock"), thread_local=False)
    holder.acquire()

    def write_and_then_stand_still():
        for size in range(1, 20):
            (temporary / "tokens").write_bytes(bytes(size))
            time.sleep(0.2)
        said.append(0)
        time.sleep(3)
        holder.release()

    other = threading.Thread(target=write_and_then_stand_still)
    other.start()
    waiting = "waiting for another process, which fills the cache"
    ensure_folder(tmp_path / "key", fill, lambda doing: said.append(doing == waiting))
    other.join()
    assert said.index(0) >= 2
    assert len(said) - said.index(0) <= 2 + 1  # of what was written last, and of writing the cache
    assert is_whole(tmp_path / "key")
