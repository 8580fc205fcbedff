import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset

from mixerlab.data import DataError, build_data, cache, load_tokenizer
from mixerlab.data.rows import TokenRows, Writer
from mixerlab.data.text import TextConfig, TextData, expand
from mixerlab.data.tokenizers import train_bpe

IGNORE = -100


def config(tmp_path, **options: Any) -> TextConfig:
    defaults: dict[str, Any] = {"source": "files", "tokenizer": "bytes", "seq_len": 8, "valid_fraction": 0.3}
    return TextConfig(cache_dir=str(tmp_path / "cache"), **defaults | options)


def prepared(config: TextConfig) -> TextData:
    data = TextData(config, seed=0)
    data.prepare()
    return data


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"Document {i} says {'ha ' * (i % 7)}€.\n", encoding="utf-8")
    return folder


def documents(rows: Dataset) -> list[str]:
    """What the cache holds, document by document."""
    assert isinstance(rows, TokenRows)
    ends = rows.ends.read(0, len(rows.ends))
    tokens = [rows.tokens.read(a, b - 1 - a) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return [bytes(t.astype(np.uint8)).decode() for t in tokens]


# Splits


def test_splits_are_disjoint_complete_and_stable(corpus, tmp_path):
    def split() -> tuple[list[str], list[str]]:
        data = prepared(config(tmp_path, files=[f"{corpus}/*.txt"]))
        return documents(data.train_dataset()), documents(data.val_datasets()["valid"])

    train, valid = split()
    assert sorted(train + valid) == sorted(path.read_text(encoding="utf-8") for path in corpus.iterdir())
    assert not set(train) & set(valid)
    assert 4 <= len(valid) <= 20
    (corpus / "03.txt").unlink()
    (corpus / "99.txt").write_text("A new document.\n")
    new_train, new_valid = split()
    assert set(train) ^ set(new_train) | set(valid) ^ set(new_valid) == {
        "Document 3 says ha ha ha €.\n",
        "A new document.\n",
    }


def test_the_seed_does_not_move_documents(corpus, tmp_path):
    for seed in (0, 1):
        data = TextData(config(tmp_path, files=[f"{corpus}/*.txt"]), seed)
        data.prepare()
    assert len(list((tmp_path / "cache" / "text").glob("*/meta.json"))) == 1


def test_validation_files_are_what_is_validated_on(corpus, tmp_path):
    data = prepared(config(tmp_path, files=[f"{corpus}/0*.txt"], valid_files=[f"{corpus}/1[01].txt"]))
    assert documents(data.train_dataset()) == [f"Document {i} says {'ha ' * (i % 7)}€.\n" for i in range(10)]
    assert [text[:11] for text in documents(data.val_datasets()["valid"])] == ["Document 10", "Document 11"]


def test_the_end_of_a_single_document_is_validated_on(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    data = prepared(config(tmp_path, files=[str(tmp_path / "a.txt")], valid_fraction=0.1))
    [train], [valid] = documents(data.train_dataset()), documents(data.val_datasets()["valid"])
    assert train + valid == (tmp_path / "a.txt").read_text()
    assert train.endswith("\n")
    assert 8 <= valid.count("\n") <= 10


def test_rows_of_tables_are_documents(tmp_path):
    lines = [json.dumps({"body": f"row {i}"}) for i in range(30)] + ['{"body": ""}', '{"body": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = prepared(config(tmp_path, files=[str(tmp_path / "a.jsonl")], column="body"))
    found = documents(data.train_dataset()) + documents(data.val_datasets()["valid"])
    assert sorted(found) == sorted(f"row {i}" for i in range(30))


def test_only_the_first_documents_are_used(corpus, tmp_path):
    data = prepared(
        config(tmp_path, files=[f"{corpus}/*.txt"], valid_files=[f"{corpus}/2*"], max_documents=3)
    )
    assert [text[:10] for text in documents(data.train_dataset())] == [
        "Document 0",
        "Document 1",
        "Document 2",
    ]
    assert len(documents(data.val_datasets()["valid"])) == 3


def test_a_hub_dataset_with_both_splits(tmp_path, monkeypatch):
    import datasets

    splits = {"train": ["one two three"] * 3, "test": ["four"]}

    def load_dataset(name, config, split, num_proc):
        assert (name, config) == ("owner/name", "small")
        return datasets.Dataset.from_dict({"text": splits[split]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = prepared(
        config(
            tmp_path,
            source="hf",
            dataset="owner/name",
            dataset_config="small",
            valid_split="test",
            column="text",
        )
    )
    assert documents(data.train_dataset()) == splits["train"]
    assert documents(data.val_datasets()["valid"]) == splits["test"]


def test_a_long_document_is_tokenised_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("mixerlab.data.pieces.PIECE", 50)
    monkeypatch.setattr("mixerlab.data.text.BATCH", 200)
    text = "".join(f"def f{i}(x):\n    return x + {i}  # and  so on\n\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[:500])
    options = {
        "files": [str(tmp_path / "a.txt")],
        "valid_files": [str(tmp_path / "b.txt")],
        "vocab_size": 400,
    }
    data = prepared(config(tmp_path, tokenizer="bpe", **options))
    assert data.tokenizer is not None
    rows = data.train_dataset()
    assert len(rows.ends) == 1
    assert rows.tokens.read(0, rows.n_tokens - 1).tolist() == data.tokenizer.encode(text)


# Tokenizers


def test_a_trained_tokenizer_knows_only_the_training_documents(tmp_path):
    (tmp_path / "a.txt").write_text("abab " * 50)
    (tmp_path / "b.txt").write_text("xyxy " * 50)
    files = {"files": [str(tmp_path / "a.txt")], "valid_files": [str(tmp_path / "b.txt")]}
    data = TextData(config(tmp_path, tokenizer="bpe", vocab_size=300, **files), seed=0)
    assert data.vocab_size == 300  # before there is data
    data.prepare()
    assert data.tokenizer is not None
    assert 257 < data.vocab_size == data.tokenizer.vocab_size < 300
    assert len(data.tokenizer.encode("abab")) == 1
    assert len(data.tokenizer.encode("xyxy")) == 4


def test_a_run_folder_holds_the_tokenizer(corpus, tmp_path):
    data = TextData(config(tmp_path, files=[f"{corpus}/*"], tokenizer="bpe", vocab_size=280), seed=0)
    (tmp_path / "run").mkdir()
    data.prepare()
    data.save_tokenizer(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer is not None
    assert data.tokenizer is not None
    assert tokenizer.pieces == data.tokenizer.pieces


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "file"])
def test_labels_stand_for_the_bytes_of_the_text(corpus, tmp_path, tokenizer):
    options = {}
    if tokenizer == "file":
        train_bpe(["Document says ha"] * 9, 270).save(tmp_path)
        options["tokenizer_file"] = str(tmp_path / "tokenizer.json")
    data = prepared(config(tmp_path, files=[f"{corpus}/*"], tokenizer=tokenizer, vocab_size=280, **options))
    assert data.token_bytes is not None
    assert len(data.token_bytes) == data.vocab_size
    total = 0
    for rows in (data.train_dataset(), data.val_datasets()["valid"]):
        assert isinstance(rows, TokenRows)
        labels = torch.cat([rows[i]["labels"] for i in range(len(rows))])
        ends = rows.ends.read(0, len(rows.ends))
        firsts = rows.tokens.read(0, rows.n_tokens)[[0, *ends[:-1]]].astype(np.int64)
        total += int(data.token_bytes[labels[labels != IGNORE]].sum() + data.token_bytes[firsts].sum())
    assert total == sum(len(path.read_bytes()) for path in corpus.iterdir())


def test_the_vocabulary_of_a_file_is_known_before_there_is_data(tmp_path):
    tokenizer = train_bpe(["a b c"] * 9, 270)
    tokenizer.save(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    data = TextData(config(tmp_path, files=["missing"], tokenizer="file", tokenizer_file=path), seed=0)
    assert data.vocab_size == tokenizer.vocab_size


# Cache


@pytest.fixture
def fills(monkeypatch) -> list[str]:
    """One entry for each time that documents were tokenised."""
    calls: list[str] = []
    fill = TextData._fill

    def counted_fill(self, folder):
        calls.append(folder.name)
        fill(self, folder)

    monkeypatch.setattr(TextData, "_fill", counted_fill)
    return calls


def test_a_second_run_does_not_tokenise_again(corpus, tmp_path, fills):
    settings = config(tmp_path, files=[f"{corpus}/*.txt"], tokenizer="bpe", vocab_size=280)
    first = prepared(settings)
    second = prepared(settings)
    other_process = TextData(settings, seed=0)
    other_process.setup()
    assert len(fills) == 1
    for data in (second, other_process):
        assert data.vocab_size == first.vocab_size
        assert torch.equal(data.train_dataset()[3]["labels"], first.train_dataset()[3]["labels"])


def test_what_does_not_change_tokens_does_not_tokenise_again(corpus, tmp_path, fills):
    changes: list[dict[str, Any]] = [
        {},
        {"seq_len": 16},
        {"pack": False},
        {"vocab_size": 999},
        {"num_proc": 2},
    ]
    for options in changes:
        prepared(config(tmp_path, files=[f"{corpus}/*.txt"], **options))
    assert len(fills) == 1


def test_changed_documents_are_tokenised_again(corpus, tmp_path, fills):
    prepared(config(tmp_path, files=[f"{corpus}/*.txt"]))
    (corpus / "00.txt").write_text("Something else entirely.")
    data = prepared(config(tmp_path, files=[f"{corpus}/*.txt"]))
    assert len(fills) == 2
    found = documents(data.train_dataset()) + documents(data.val_datasets()["valid"])
    assert "Something else entirely." in found


def test_changed_settings_tokenise_again(corpus, tmp_path, fills):
    changes: list[dict[str, Any]] = [
        {},
        {"valid_fraction": 0.4},
        {"max_documents": 30},
        {"tokenizer": "bpe", "vocab_size": 280},
        {"tokenizer": "bpe", "vocab_size": 270},
        {"valid_files": [f"{corpus}/00.txt"]},
    ]
    for options in changes:
        prepared(config(tmp_path, files=[f"{corpus}/*.txt"], **options))
    assert len(set(fills)) == len(changes)


def test_another_tokenizer_file_tokenises_again(corpus, tmp_path, fills):
    for n in (260, 270):
        train_bpe(["Document says ha"] * 9, n).save(tmp_path)
        path = str(tmp_path / "tokenizer.json")
        prepared(config(tmp_path, files=[f"{corpus}/*.txt"], tokenizer="file", tokenizer_file=path))
    assert len(set(fills)) == 2


@pytest.mark.parametrize(
    "name", ["train.tokens", "train.ends", "valid.tokens", "tokenizer_config.json", "meta.json"]
)
def test_a_damaged_cache_is_rebuilt_and_never_read(corpus, tmp_path, fills, name):
    settings = config(tmp_path, files=[f"{corpus}/*.txt"])
    rows = prepared(settings).train_dataset()
    expected = documents(rows)
    [path] = (tmp_path / "cache").glob(f"text/*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert documents(prepared(settings).train_dataset()) == expected
    assert len(fills) == 2


def test_setup_before_prepare_says_so(corpus, tmp_path):
    data = TextData(config(tmp_path, files=[f"{corpus}/*.txt"]), seed=0)
    with pytest.raises(RuntimeError, match=r"prepare\(\) must run first"):
        data.setup()
    with pytest.raises(RuntimeError, match=r"setup\(\) must run"):
        data.train_dataset()


def test_modules_that_prepare_at_once_agree(corpus, tmp_path, fills):
    modules = [TextData(config(tmp_path, files=[f"{corpus}/*.txt"]), seed=0) for _ in range(3)]
    threads = [threading.Thread(target=module.prepare) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fills) == 1
    assert len({tuple(documents(module.train_dataset())) for module in modules}) == 1


def test_the_standard_library_prepares_without_a_download(tmp_path):
    options = {"tokenizer": "bytes", "max_documents": 60, "cache_dir": str(tmp_path), "valid_fraction": 0.1}
    data = build_data({"name": "text", **options}, seed=0)
    data.prepare()
    assert isinstance(data, TextData)
    train, valid = documents(data.train_dataset()), documents(data.val_datasets()["valid"])
    assert len(train) + len(valid) == 60
    assert not set(train) & set(valid)


# Messages


def problems(**options) -> dict[str, str]:
    return dict(TextConfig(**options).problems())


def test_the_defaults_have_no_problems():
    assert problems() == {}


def test_a_good_config_of_every_source_has_no_problems(corpus, tmp_path):
    (corpus / "a.jsonl").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert problems(source="files", files=[str(corpus / "*.txt"), str(corpus / "**" / "0*")]) == {}
    assert problems(source="files", files=[str(corpus / "a.jsonl")], column="text") == {}
    assert problems(source="hf", dataset="owner/name", column="text") == {}
    assert problems(tokenizer="file", tokenizer_file=str(tmp_path / "tokenizer.json")) == {}


def test_problems_name_the_option_and_what_would_be_right(corpus, tmp_path):
    def one(name: str, **options) -> str:
        found = problems(**options)
        assert list(found) == [name]
        return found[name]

    def files(*patterns: str, **options) -> str:
        return one("files", source="files", files=list(patterns), **options)

    assert "needs at least one path" in files()
    assert f"did you mean {corpus / '00.txt'}?" in files(str(corpus / "00.text"))
    assert f"nor does the folder {tmp_path / 'korpus'}" in files(str(tmp_path / "korpus" / "a.txt"))
    assert "matches no file" in files(str(corpus / "*.md"))
    assert "is a folder; for the files in it:" in files(str(corpus))
    (corpus / "a.csv").write_text("")
    assert "a.csv is not one of .txt, .md, .py, .jsonl, .parquet" in files(str(corpus / "*"))
    assert "source = python_stdlib" in one("files", files=[str(corpus / "*.txt")])
    valid = one("valid_files", source="files", files=[str(corpus / "*.txt")], valid_files=["missing.txt"])
    assert "missing.txt does not exist" in valid
    (corpus / "a.jsonl").write_text("{}")
    assert "column" in one("column", source="files", files=[str(corpus / "a.jsonl")])
    assert "column" in one("column", source="hf", dataset="owner/name")
    assert "name of a dataset" in one("dataset", source="hf", column="text")
    assert "source = hf" in one("dataset", dataset="owner/name")
    assert "more than 257" in one("vocab_size", vocab_size=257)
    assert "needs the path" in one("tokenizer_file", tokenizer="file")
    assert "does not exist" in one(
        "tokenizer_file", tokenizer="file", tokenizer_file=str(tmp_path / "t.json")
    )
    assert "tokenizer = bpe" in one("tokenizer_file", tokenizer_file="t.json")


def test_globs_are_sorted_and_name_each_file_once(corpus):
    patterns = [str(corpus / "07.txt"), str(corpus / "**" / "0*.txt"), str(corpus / "00.txt")]
    assert [Path(name).stem for name in expand(patterns)] == ["07", *(f"{i:02}" for i in range(10) if i != 7)]


def data_error(config: TextConfig) -> str:
    with pytest.raises(DataError) as error:
        prepared(config).train_dataset()
    return str(error.value)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_bad_documents_are_errors_that_leave_no_cache(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\nnonsense\n')
    settings = config(tmp_path, files=[str(path)], column="text", tokenizer=tokenizer)
    assert f"data.files: {path}, line 2 is not JSON" in data_error(settings)
    assert [p for p in (tmp_path / "cache" / "text").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_an_empty_corpus_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("")
    settings = config(tmp_path, files=[str(path)], tokenizer=tokenizer)
    assert "data.source = 'files': it has no document with text" in data_error(settings)


def test_no_document_to_validate_on_is_an_error(corpus, tmp_path):
    settings = config(tmp_path, files=[f"{corpus}/*"], valid_fraction=1e-9)
    assert "data.valid_fraction = 1e-09: no document of 40 came out to validate on" in data_error(settings)


def test_less_text_than_one_row_is_an_error(corpus, tmp_path):
    settings = config(tmp_path, files=[f"{corpus}/*"], seq_len=10**6)
    assert "data.seq_len = 1000000: the training documents have" in data_error(settings)


def test_the_bpe_is_trained_on_the_first_documents_alone(tmp_path):
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} {i}"}) + "\n" for word in ("aaaa", "zqzq") for i in range(40))
    )
    pieces = {}
    for limit in (20, None):
        config = TextConfig(
            source="files",
            files=[str(tmp_path / "documents.jsonl")],
            column="text",
            vocab_size=264,
            bpe_documents=limit,
            seq_len=4,
            valid_fraction=0.2,
            cache_dir=str(tmp_path / "cache"),
        )
        data = TextData(config, seed=0)
        data.prepare()
        assert data.tokenizer is not None
        pieces[limit] = set(data.tokenizer.pieces)
    assert b"zq" not in pieces[20]
    assert b"zq" in pieces[None]


def test_a_cache_of_another_tokenizer_under_this_ones_name_is_named_and_rebuilt(
    corpus, tmp_path, fills, caplog
):
    settings = config(tmp_path, files=[f"{corpus}/*.txt"])
    expected = documents(prepared(settings).train_dataset())
    (mine,) = (tmp_path / "cache").glob("text/*/meta.json")
    prepared(config(tmp_path, files=[f"{corpus}/*.txt"], tokenizer="bpe", vocab_size=300))
    (other,) = set((tmp_path / "cache").glob("text/*/meta.json")) - {mine}
    shutil.rmtree(mine.parent)
    shutil.copytree(other.parent, mine.parent)
    assert documents(prepared(settings).train_dataset()) == expected
    assert f"it was made as {other.parent.name}, of something else" in caplog.text


# Starting again


def test_a_second_run_does_not_read_the_documents(corpus, tmp_path, monkeypatch):
    for path in corpus.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    settings = config(tmp_path, files=[f"{corpus}/*.txt"])
    first = prepared(settings)
    monkeypatch.setattr("mixerlab.data.digests.Digests._read_files", lambda *a: pytest.fail("read again"))
    assert prepared(settings).fingerprint == first.fingerprint


def test_other_processes_that_know_the_fingerprint_do_not_look_for_the_documents(corpus, tmp_path, fills):
    settings = config(tmp_path, files=[f"{corpus}/*.txt"])
    first = prepared(settings)
    shutil.rmtree(corpus)
    for calls in (("setup",), ("prepare", "setup")):
        other = TextData(settings, seed=0)
        other.prepared = first.fingerprint
        for call in calls:
            getattr(other, call)()
        assert other.fingerprint == first.fingerprint
        assert torch.equal(other.train_dataset()[3]["labels"], first.train_dataset()[3]["labels"])


def test_a_machine_without_the_cache_makes_it_of_its_own_documents(corpus, tmp_path, fills):
    first = prepared(config(tmp_path, files=[f"{corpus}/*.txt"]))
    other = TextData(config(tmp_path / "other", files=[f"{corpus}/*.txt"]), seed=0)
    other.prepared = first.fingerprint
    other.prepare()
    assert other.fingerprint == first.fingerprint
    assert len(fills) == 2


def test_the_whole_cache_is_verified_when_it_is_asked_for(corpus, tmp_path, fills, monkeypatch):
    settings = config(tmp_path, files=[f"{corpus}/*.txt"])
    rows = prepared(settings).train_dataset()
    expected = documents(rows)
    looks = cache._looks(rows.tokens.path.parent)
    content = bytearray(rows.tokens.path.read_bytes())
    content[9] ^= 1
    rows.tokens.path.write_bytes(content)
    monkeypatch.setattr(
        cache, "_looks", lambda folder: looks
    )  # a disk that turns a bit does not change the times
    prepared(settings)
    assert len(fills) == 1
    settings.verify_cache = True
    assert documents(prepared(settings).train_dataset()) == expected
    assert len(fills) == 2


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_it_says_what_it_does(corpus, tmp_path, tokenizer):
    said: list[str] = []
    data = TextData(config(tmp_path, files=[f"{corpus}/*"], tokenizer=tokenizer, vocab_size=280), seed=0)
    data.report = said.append
    data.prepare()
    assert said[0] == "looking for the documents"
    assert said[-1] == "tokenising"


def test_a_signal_while_the_tokenizer_is_trained_is_heard_at_once(corpus, tmp_path, monkeypatch):
    class Asked(BaseException):
        pass

    def handler(signum, frame):
        raise Asked

    ended = threading.Event()
    monkeypatch.setattr("mixerlab.data.text.train_bpe", lambda *a: ended.wait(60))  # it looks at no signals
    data = TextData(config(tmp_path, files=[f"{corpus}/*"], tokenizer="bpe", vocab_size=280), seed=0)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Asked):
            data.prepare()
    finally:
        ended.set()
        signal.signal(signal.SIGALRM, before)
    assert [p for p in (tmp_path / "cache" / "text").iterdir() if p.is_dir()] == []


# Text without spaces


def test_one_endless_word_is_tokenised(tmp_path):
    word = "".join(random.Random(0).choices("ACGT", k=200_000))
    (tmp_path / "a.txt").write_text(word)
    data = prepared(config(tmp_path, files=[str(tmp_path / "a.txt")], tokenizer="bpe", vocab_size=300))
    assert data.vocab_size == 300
    assert data.tokenizer is not None
    rows = data.train_dataset()
    assert data.tokenizer.decode(rows.tokens.read(0, rows.n_tokens)) == word[:140_000]


# Tokenizers and names that cannot be used


def test_text_that_a_tokenizer_would_leave_out_is_refused(corpus, tmp_path):
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("\n Documentsayh.0123456789")}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    options = {"files": [f"{corpus}/*"], "tokenizer": "file", "tokenizer_file": path}
    message = data_error(config(tmp_path, **options))
    assert message.startswith(f"data.tokenizer_file = '{path}': the tokenizer has no token for ")
    assert "\n" not in message
    assert [p for p in (tmp_path / "cache" / "text").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("path", ["a\0b.txt", "x" * 5000, "~no_such_user_of_this_machine/a.txt"])
def test_a_name_that_nothing_can_have_is_a_problem(path, corpus):
    good = {"source": "files", "files": [f"{corpus}/*.txt"]}
    for name, value in (("files", [path]), ("valid_files", [path]), ("cache_dir", path)):
        found = problems(**good | {name: value})
        assert "names nothing" in found[name]
        assert "\n" not in found[name]
        assert len(found) == 1
    assert "names nothing" in problems(tokenizer="file", tokenizer_file=path)["tokenizer_file"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_disk_that_fills_while_text_is_written_leaves_no_cache(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_text("some text\n" * 10_000)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"t": "text {i}"}}\n' for i in range(9_000)))
    settings = config(tmp_path, files=[str(tmp_path / name)], column="t")

    class Full(Writer):
        def append(self, ids, ends_document):
            super().append(ids, ends_document)
            if self.n_tokens > 2000:
                raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("mixerlab.data.text.Writer", Full)
        message = data_error(settings)
    assert message.startswith("data.cache_dir: the disk of ")
    assert "\n" not in message
    assert [p for p in (tmp_path / "cache" / "text").iterdir() if p.is_dir()] == []
    prepared(settings)
