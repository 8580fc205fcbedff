import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mixerlab.data import DataError
from mixerlab.data.digests import Digests
from mixerlab.data.sources import Document, FilesSource, HubSource, StdlibSource


@pytest.fixture
def digests(tmp_path) -> Digests:
    return Digests(tmp_path / "memory" / "digests.json")


def texts(source) -> list[str]:
    return [document.text for document in source.documents()]


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("one €", encoding="utf-8")
    (tmp_path / "b.md").write_text("# two")
    (tmp_path / "c.py").write_text("three = 3")
    rows = [{"text": "four", "id": 4}, {"text": "fi\nve"}, {"text": None}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    write_parquet(tmp_path / "e.parquet", id=[6, 7, 8], text=["six", None, "seven"])
    return sorted(map(str, tmp_path.iterdir()))


def test_files_of_all_kinds_are_read_in_order(files):
    source = FilesSource(files, "text")
    assert list(filter(None, texts(source))) == [
        "one €",
        "# two",
        "three = 3",
        "four",
        "fi\nve",
        "six",
        "seven",
    ]


def test_weights_of_documents_add_up_to_the_total(files):
    source = FilesSource(files, "text")
    assert sum(document.weight for document in source.documents()) == pytest.approx(source.total, abs=2)
    stdlib = StdlibSource()
    assert 0.9 * stdlib.total < sum(document.weight for document in stdlib.documents()) <= stdlib.total


def test_a_fingerprint_follows_the_contents_the_order_and_the_column(files, digests):
    fingerprint = FilesSource(files, "text").fingerprint(digests)
    assert FilesSource(files, "text").fingerprint(digests) == fingerprint
    assert FilesSource(files[::-1], "text").fingerprint(digests) != fingerprint
    assert FilesSource(files, "id").fingerprint(digests) != fingerprint
    Path(files[0]).write_text("One €", encoding="utf-8")
    assert FilesSource(files, "text").fingerprint(digests) != fingerprint


def problem(path, column="text") -> str:
    with pytest.raises(DataError) as error:
        list(FilesSource([str(path)], column).documents())
    assert str(path) in str(error.value)
    return str(error.value)


def test_text_that_is_not_utf8_is_an_error_with_the_offset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("€".encode() + b"abc\xff")
    assert "is not UTF-8 text: byte 0xff at offset 6" in problem(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{'text': 1}", "line 3 is not JSON"),
        (b'"text"', "line 3 is str, not an object"),
        (b'{"body": "a", "id": 1}', "data.column = 'text': .*line 3 has no such key; it has body, id"),
        (b'{"text": 5}', "data.column = 'text': .*line 3 holds 5, not text"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 3 nests too many objects"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 3 is not JSON"),
        (b'{"text": "\\ud800"}', r"line 3 holds '\\ud800', not text"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=expected):
        list(FilesSource([str(path)], "text").documents())


def test_a_corrupt_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["some text"] * 1000)
    content = bytearray(path.read_bytes())
    for start in (0, len(content) - 8):
        broken = content.copy()
        broken[start : start + 8] = b"\0" * 8
        path.write_bytes(broken)
        if start:
            assert "is not a readable Parquet file" in problem(path)
    path.write_bytes(content[: len(content) // 2])
    assert "is not a readable Parquet file" in problem(path)


def test_a_column_that_a_parquet_file_lacks_is_answered_with_those_it_has(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])
    assert "data.column = 'text'" in problem(path)
    assert "it has body, id" in problem(path)
    assert "holds 1, not text" in problem(path, "id")


def test_bytes_in_a_parquet_file_that_are_no_text_are_named(tmp_path):
    binary = pyarrow.array([b"fine", b"\xff\xfe", b"fine"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())  # not looked at by anybody
    path = write_parquet(tmp_path / "a.parquet", text=text, binary=binary)
    assert "a.parquet, rows 1 to 3: the column holds what is not UTF-8 text" in problem(path)
    assert "rows 1 to 3 holds b'fine', not text" in problem(path, "binary")


def test_a_value_that_is_no_text_is_shortened(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": list(range(10**5))}))
    assert len(problem(path)) < 300


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_that_vanishes_before_it_is_read_is_named(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    assert "data.files" in problem(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, digests):
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = FilesSource([str(path)], None)
    path.unlink()
    with pytest.raises(DataError, match=r"a.txt cannot be read: No such file"):
        source.fingerprint(digests)


def test_the_standard_library_is_read_without_its_tests_and_installed_packages(digests):
    source = StdlibSource()
    assert {"argparse.py", "json/decoder.py"} <= set(source.names)
    assert source.names == sorted(source.names)
    parts = {part for name in source.names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    documents = {document.key: document.text for document in source.documents()}
    assert "class ArgumentParser" in documents["argparse.py"]
    assert source.fingerprint(digests) == StdlibSource().fingerprint(digests)


def test_files_of_the_standard_library_that_are_not_utf8_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("a = 1")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list(StdlibSource().documents()) == [Document("a = 1", "good.py", 5)]


def hub(name="owner/name", column="text", limit=None) -> HubSource:
    return HubSource(name, None, "train", column, 1, limit)


@pytest.fixture
def loaded(monkeypatch):
    columns = {"id": [0, 1, 2], "text": ["zero", None, "two"]}
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: datasets.Dataset.from_dict(columns))


@pytest.mark.usefixtures("loaded")
def test_a_column_of_a_hub_dataset_is_read(digests):
    assert texts(hub()) == ["zero", "", "two"]
    assert hub().total == 3
    assert texts(hub(limit=1)) == ["zero"]
    assert hub().fingerprint(digests) == hub().fingerprint(digests) != hub(limit=1).fingerprint(digests)


@pytest.mark.usefixtures("loaded")
def test_a_column_that_a_hub_dataset_lacks_is_answered_with_those_it_has(digests):
    with pytest.raises(
        DataError, match=r"data.column = 'body': .*owner/name has no such column; it has id, text"
    ):
        hub(column="body").fingerprint(digests)
    with pytest.raises(DataError, match=r"data.column = 'id': owner/name holds 0, not text"):
        texts(hub(column="id"))


def test_a_hub_dataset_that_cannot_be_loaded_is_an_error_that_says_what_to_do(monkeypatch, digests):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"(?s)data.dataset = 'owner/name'.*no route to host.*data.source=files"
    ):
        hub().fingerprint(digests)


def test_a_local_folder_is_a_hub_dataset_whose_fingerprint_follows_its_content(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    code = (
        "import sys; from mixerlab.data.digests import Digests; from mixerlab.data.sources import HubSource\n"
        "s = HubSource(sys.argv[1], None, 'train', 'text', 1, None)\n"
        "print(s.fingerprint(Digests(None)), *(d.text for d in s.documents()))"
    )

    def read() -> tuple[str, list[str]]:  # in a process of its own, as a second run is
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            capture_output=True,
            text=True,
            check=True,
            env={"HF_DATASETS_CACHE": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        )
        assert done.stderr == ""
        fingerprint, *documents = done.stdout.split()
        return fingerprint, documents

    write_parquet(folder / "train.parquet", text=["one", "two"])
    first = read()
    assert first[1] == ["one", "two"]
    assert read() == first
    write_parquet(folder / "train.parquet", text=["one", "three"])
    changed = read()
    assert changed[1] == ["one", "three"]
    assert changed[0] != first[0]
