import json
import multiprocessing
import os
import shutil
import time

import pytest

from mixerlab.data import DataError
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
    assert sorted(path.name for path in folder.iterdir()) == ["ends", "meta.json", "tokens"]
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
