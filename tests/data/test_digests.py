"""Digests of files, and that they are computed once."""

import json
import os
import threading
import time

import pytest

from mixerlab.data import DataError, digests
from mixerlab.data.digests import Digests, digest


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many files were read, each time that some were."""
    calls: list[int] = []
    read = Digests._read_files

    def counted(self, files):
        calls.append(len(files))
        return read(self, files)

    monkeypatch.setattr(Digests, "_read_files", counted)
    return calls


@pytest.fixture
def memory(tmp_path):
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def files(tmp_path) -> list[str]:
    names = []
    for i in range(3):
        path = tmp_path / f"{i}.txt"
        path.write_text(f"document {i}")
        age(path)
        names.append(str(path))
    return names


def age(path, seconds=60):
    """As if the file had been written before."""
    then = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(then, then))


def test_files_are_read_once(files, memory, reads):
    first = Digests(memory).of(["a"], files)
    assert Digests(memory).of(["a"], files) == first
    assert reads == [3]
    assert [path.name for path in memory.parent.iterdir()] == ["digests.json"]


def test_the_heading_and_the_order_are_part_of_it(files, memory, reads):
    found = {Digests(memory).of(heading, names) for heading in ("a", "b") for names in (files, files[::-1])}
    assert len(found) == 4
    assert reads == [3] * 4


def test_the_digest_is_that_of_the_contents(files, memory, tmp_path):
    first = Digests(memory).of(["a"], files)
    moved = []
    for name in files:
        (tmp_path / "else").mkdir(exist_ok=True)
        moved.append(name.replace(str(tmp_path), str(tmp_path / "else")))
        os.rename(name, moved[-1])
    assert Digests(memory).of(["a"], moved) == first


def test_digests_stay_what_they_were():
    # Caches are named after them: otherwise all would be made anew, and no run would go on.
    assert digest(["a", "b"]) == "c95b5b0a5d45c522dc032df817b0abc7"


def write_longer(path):
    with open(path, "a") as file:
        file.write("!")


def write_otherwise(path):
    """As long and with the same time as before."""
    before = os.stat(path).st_mtime_ns
    with open(path, "r+") as file:
        file.write("D")
    os.utime(path, ns=(before, before))


def replace(path):
    before = os.stat(path).st_mtime_ns
    with open(f"{path}.new", "w") as file:
        file.write("Document 0")
    os.utime(f"{path}.new", ns=(before, before))
    os.replace(f"{path}.new", path)


@pytest.mark.parametrize("change", [write_longer, write_otherwise, replace])
def test_a_changed_file_is_read_again(files, memory, reads, change):
    first = Digests(memory).of(["a"], files)
    time.sleep(0.02)  # longer than the tick of the file system's clock
    change(files[0])
    assert Digests(memory).of(["a"], files) != first
    assert reads == [3, 3]


def test_a_file_that_is_as_new_as_its_digest_is_read_again(files, memory, reads):
    # It may change once more and have the same time.
    os.utime(files[1])
    first = Digests(memory).of(["a"], files)
    assert Digests(memory).of(["a"], files) == first
    assert reads == [3, 3]
    age(files[1], seconds=3)
    for _ in range(2):
        assert Digests(memory).of(["a"], files) == first
    assert reads == [3, 3, 3]


def test_a_file_that_changes_while_it_is_read_is_read_again(files, memory, reads, monkeypatch):
    read = Digests._read_files

    def read_and_change(self, names):
        found = read(self, names)
        write_longer(files[0])
        age(files[0], seconds=50)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Digests, "_read_files", read_and_change)
        first = Digests(memory).of(["a"], files)
    assert Digests(memory).of(["a"], files) != first


@pytest.mark.parametrize("damage", [b"", b"x", b"00000000\n{}", b"\xff\xfe", None])
def test_a_damaged_memory_is_forgotten(files, memory, reads, damage):
    first = Digests(memory).of(["a"], files)
    content = bytearray(memory.read_bytes())
    content[-5] ^= 1
    memory.write_bytes(content if damage is None else damage)
    for _ in range(2):
        assert Digests(memory).of(["a"], files) == first
    assert reads == [3, 3]


def test_a_memory_that_cannot_be_written_is_no_error(files, tmp_path):
    (tmp_path / "file").write_text("")
    assert Digests(tmp_path / "file" / "digests.json").of(["a"], files)


def test_a_full_disk_leaves_the_memory_as_it_was(files, memory, monkeypatch):
    Digests(memory).of(["a"], files)
    before = memory.read_bytes()

    def full(self, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full)
        Digests(memory).of(["b"], files)
    assert memory.read_bytes() == before
    assert [path.name for path in memory.parent.iterdir()] == ["digests.json"]


def test_only_the_latest_are_remembered(files, memory, monkeypatch):
    monkeypatch.setattr(digests, "REMEMBERED", 2)
    for heading in "abc":
        Digests(memory).of([heading], files)
    assert len(json.loads(memory.read_bytes().split(b"\n", 1)[1])) == 2


def test_writers_at_the_same_time_leave_a_whole_memory(files, memory, reads):
    threads = [
        threading.Thread(target=lambda k=k: [Digests(memory).of([f"{k} {n}"], files) for n in range(10)])
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 40
    _, content = memory.read_bytes().split(b"\n", 1)
    assert json.loads(content)
    assert [path.name for path in memory.parent.iterdir()] == ["digests.json"]


def test_a_file_that_is_missing_is_named(files, memory):
    os.unlink(files[1])
    with pytest.raises(DataError, match=r"data\.files: .*1\.txt cannot be read: No such file"):
        Digests(memory).of(["a"], files)


def test_relative_names_mean_other_files_in_another_folder(tmp_path, memory, monkeypatch):
    found = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
        os.utime(tmp_path / name / "a.txt", ns=(10**18, 10**18))
        monkeypatch.chdir(tmp_path / name)
        found.append(Digests(memory).of([], ["a.txt"]))
    assert found[0] != found[1]


def test_names_that_are_not_utf8_are_names(tmp_path, memory):
    name = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(name, "w") as file:
        file.write("a")
    assert Digests(memory).of(["a"], [os.fsdecode(name)])


def test_it_says_what_it_does(files, memory):
    said: list[str] = []
    Digests(memory, said.append).of(["a"], files)
    assert set(said) >= {"looking for the documents"}
