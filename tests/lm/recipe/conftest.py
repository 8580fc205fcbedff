"""A folder with a small recipe and data of every kind of trouble."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with good.yaml and a corpus, as the working directory."""
    (tmp_path / "good.yaml").write_text(
        "data: {name: text, source: files, files: [corpus.txt]}\ntrainer: {steps: 3}\n"
    )
    (tmp_path / "corpus.txt").write_text("hello\n" * 100)
    (tmp_path / "short.txt").write_text("hello\nyou\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("déjà vu".encode("latin-1") * 50)
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache lies
    monkeypatch.chdir(tmp_path)
    return tmp_path
