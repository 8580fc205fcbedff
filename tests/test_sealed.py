"""Sealed folders: whole or found out, and never half-replaced."""

import errno
import json
from pathlib import Path

import pytest

from mixerlab import sealed
from mixerlab.sealed import (
    META,
    NOTED,
    damage,
    noted_damage,
    publish,
    put_back,
    read_meta,
    read_noted,
    seal,
    write_file,
    write_meta,
    write_noted,
)


class Crash(BaseException):
    """The process is killed here."""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "a.bin").write_bytes(bytes(range(256)) * 9)
    (made / "b.txt").write_text("text")
    seal(made, "made", note=[1, 2])
    return made


def test_a_sealed_folder_is_whole_and_keeps_its_notes(folder):
    assert damage(folder) is None
    meta = read_meta(folder)
    assert meta["note"] == [1, 2]
    assert meta["name"] == "made"
    assert {name: size for name, (size, _) in meta["files"].items()} == {"a.bin": 2304, "b.txt": 4}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "said", "is_seen_without_checksums"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing", True),
        (lambda folder: (folder / "b.txt").write_text("tex"), "b.txt has 3 bytes instead of 4", True),
        (lambda folder: flip(folder / "a.bin"), "the checksum of a.bin is wrong", False),
        (lambda folder: (folder / META).unlink(), "meta.json cannot be read", True),
        (lambda folder: (folder / META).write_text("{"), "meta.json cannot be read", True),
        (lambda folder: (folder / META).write_text("[]"), "meta.json cannot be read", True),
        (lambda folder: (folder / META).write_text('{"files": {}}'), "meta.json names no files", True),
        (
            lambda folder: (folder / META).write_text('{"files": {"a.bin": 3}}'),
            "meta.json cannot be read",
            True,
        ),
    ],
)
def test_damage_is_named(folder, harm, said, is_seen_without_checksums):
    harm(folder)
    assert damage(folder).startswith(said)
    assert (damage(folder, checksums=False) is not None) == is_seen_without_checksums


def test_a_file_beside_the_sealed_ones_is_no_damage(folder):
    (folder / "c.txt").touch()
    assert damage(folder) is None


def test_a_note_that_was_changed_by_hand_is_damage(folder):
    path = folder / META
    path.write_text(path.read_text().replace("1,", "7,"))
    assert damage(folder) == "the checksum of meta.json is wrong"
    with pytest.raises(ValueError, match=r"the checksum of meta\.json is wrong"):
        read_meta(folder)


def test_a_folder_of_another_name_is_of_something_else(folder):
    assert (
        damage(folder.rename(folder.with_name("other")))
        == "it was made as made, of something else, and renamed"
    )


def test_a_folder_of_an_older_version_has_no_checksum_of_its_notes(folder):
    meta = json.loads((folder / META).read_text())
    del meta["checksum"], meta["name"]
    (folder / META).write_text(json.dumps(meta))
    assert damage(folder) is None
    assert damage(folder.rename(folder.with_name("other"))) is None


def test_notes_can_be_added(folder):
    write_meta(folder, {**read_meta(folder), "more": "x"})
    assert damage(folder) is None
    assert read_meta(folder)["more"] == "x"
    assert read_meta(folder)["note"] == [1, 2]


def test_sizes_that_are_known_are_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(sealed, "size_and_checksum", lambda path: pytest.fail("read"))
    sizes = {"a.bin": (2304, sealed.crc32(folder / "a.bin"))}
    seal(folder, "made", sizes)
    assert list(read_meta(folder)["files"]) == ["a.bin"]
    assert damage(folder) is None


def test_the_checksum_is_that_of_all_bytes(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * (2**21 + 3))
    first = sealed.crc32(path)
    with path.open("r+b") as file:
        file.seek(2**21 + 1)
        file.write(b"y")
    assert sealed.crc32(path) != first
    assert sealed.size_and_checksum(path) == (2**21 + 3, sealed.crc32(path))


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def crash(*args):
        raise Crash

    for place in ((sealed, "sync"), (Path, "replace")):
        with monkeypatch.context() as patched:
            patched.setattr(*place, crash)
            with pytest.raises(Crash):
                write_file(path, "new")
        assert path.read_text() == "old"
    write_file(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_is_as_it_should_be_is_not_touched(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "text ü")
    before = path.stat()
    write_file(path, "text ü")
    assert (before.st_ino, before.st_mtime_ns) == (path.stat().st_ino, path.stat().st_mtime_ns)


@pytest.fixture
def temporary(tmp_path):
    """What shall replace `made`."""
    new = tmp_path / "made.tmp"
    new.mkdir()
    (new / "a.bin").write_bytes(b"new")
    seal(new, "made")
    return new


def test_a_folder_appears_under_its_name_when_it_is_whole(tmp_path, temporary):
    assert damage(temporary) is not None, "it has not its name yet"
    publish(temporary, tmp_path / "made")
    assert damage(tmp_path / "made") is None
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_folder_is_replaced(folder, temporary):
    publish(temporary, folder)
    assert (folder / "a.bin").read_bytes() == b"new"
    assert damage(folder) is None
    assert [p.name for p in folder.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_while_a_folder_is_replaced_loses_neither(folder, temporary, monkeypatch, renames):
    rename = Path.rename
    done: list[Path] = []

    def crash(path, target):
        if len(done) == renames:
            raise Crash
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", crash)
        if renames < 2:
            with pytest.raises(Crash):
                publish(temporary, folder)
        else:
            publish(temporary, folder)
    put_back(folder)
    assert damage(folder) is None
    assert (folder / "a.bin").read_bytes() == (b"new" if renames == 2 else bytes(range(256)) * 9)
    if renames < 2:
        publish(temporary, folder)
        assert (folder / "a.bin").read_bytes() == b"new"


def test_putting_back_changes_nothing_where_nothing_was_interrupted(folder):
    (folder.parent / "made.old").mkdir()
    put_back(folder)
    assert damage(folder) is None
    put_back(folder.with_name("nowhere"))
    assert not folder.with_name("nowhere").exists()


def test_a_noted_file_is_as_it_was_written(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("one ü", "two", "two", ""):
        write_noted(path, text)
        assert read_noted(path) == text
    write_noted(tmp_path / "b.txt", "b")
    assert noted_damage(tmp_path) == []
    path.write_text("x")
    with pytest.raises(
        ValueError, match=r"a\.txt is not what was written there: it is damaged, or was changed by hand"
    ):
        read_noted(path)
    assert len(noted_damage(tmp_path)) == 1
    write_noted(path, "mended")
    assert noted_damage(tmp_path) == []
    path.unlink()
    assert noted_damage(tmp_path) == [], "a file may have gone"


def test_a_file_of_which_nothing_is_noted_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    assert read_noted(tmp_path / "a.txt") == "old"
    write_noted(tmp_path / "b.txt", "b")
    assert read_noted(tmp_path / "a.txt") == "old"


def test_notes_that_are_damaged_are_refused_until_they_are_deleted(tmp_path):
    path = tmp_path / "a.txt"
    write_noted(path, "text")
    for content in (
        "",
        "{",
        '{"files": {"a.txt": 3}}',
        (tmp_path / NOTED).read_text().replace("a.txt", "b.txt"),
    ):
        (tmp_path / NOTED).write_text(content)
        for use in (lambda: read_noted(path), lambda: write_noted(path, "other")):
            with pytest.raises(
                ValueError, match=r"checksums\.json.*; delete that file to have the others taken"
            ):
                use()
        assert path.read_text() == "text"
    (tmp_path / NOTED).unlink()
    assert read_noted(path) == "text"


def test_a_crash_while_a_noted_file_is_replaced_leaves_one_that_is_known(tmp_path, monkeypatch):
    path, replace = tmp_path / "a.txt", Path.replace
    write_noted(path, "0")
    for n in range(1, 20):  # one crash upon another, at either instant
        last = read_noted(path)
        count: list[Path] = []

        def crash(old, new, count=count, instant=n % 3):
            if len(count) == instant:
                raise Crash
            count.append(old)
            return replace(old, new)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", crash)
            try:
                write_noted(path, str(n))
            except Crash:
                assert read_noted(path) == last
            else:
                assert read_noted(path) == str(n)


def test_a_full_disk_leaves_no_half_and_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def full(self, text, **options):
        with self.open("w") as file:
            file.write("h")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_file(path, "new")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_file_knows_its_checksum_when_it_is_written_and_is_found_out_by_it(tmp_path):
    folder, content = tmp_path / "made", bytes(range(256)) * 9000
    signs: list[int] = []
    folder.mkdir()
    with sealed.Summed(folder / "large", lambda: signs.append(1)) as file:
        for start in range(0, len(content), 1_500_000):
            assert file.write(memoryview(content)[start : start + 1_500_000]) > 0
        known = file.size_and_checksum()
    assert (folder / "large").read_bytes() == content
    assert known == (len(content), sealed.xxh3(folder / "large"))
    assert len(signs) == 3, "one for each MiB that is written, or less"
    seal(folder, "made", {"large": known})
    assert damage(folder) is None
    flip(folder / "large")
    assert damage(folder) == "the checksum of large is wrong"


def test_of_several_files_some_can_be_verified(folder):
    flip(folder / "b.txt")
    assert damage(folder, checksums=["a.bin"]) is None
    assert damage(folder, checksums=["b.txt"]) == "the checksum of b.txt is wrong"
    assert damage(folder, checksums=[]) is None


def test_a_folder_that_another_process_puts_back_while_it_is_replaced_is_replaced_all_the_same(
    folder, temporary, monkeypatch
):
    rename = Path.rename
    done: list[Path] = []

    def put_back_once(path, target):
        if path == temporary and not done:
            done.append(path)
            put_back(folder)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", put_back_once)
    publish(temporary, folder)
    assert done
    assert (folder / "a.bin").read_bytes() == b"new"
    assert [p.name for p in folder.parent.iterdir()] == ["made"]
