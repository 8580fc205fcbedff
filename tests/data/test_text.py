import itertools
import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from mixerlab.data import DataError, build_data, load_tokenizer
from mixerlab.data.text import TextConfig, TextData, TokenRows, expand
from mixerlab.data.tokenizers import train_bpe

IGNORE = -100
EOD = 9


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
    starts = [0, *rows.ends[:-1]]
    tokens = [rows.read(a, b - 1 - a) for a, b in zip(starts, rows.ends, strict=True)]
    return [bytes(t.astype(np.uint8)).decode() for t in tokens]


# Rows


@st.composite
def token_documents(draw) -> list[list[int]]:
    # The end-of-document token may also stand inside a document: boundaries are not found by looking for it.
    return draw(st.lists(st.lists(st.integers(0, EOD), min_size=1, max_size=9), min_size=1, max_size=9))


def write_rows(folder: Path, documents: list[list[int]], seq_len: int, pack: bool = True) -> TokenRows:
    stream = [[*document, EOD] for document in documents]
    np.concatenate(stream).astype(np.uint16).tofile(folder / "train.tokens")
    np.cumsum([len(document) for document in stream]).astype(np.int64).tofile(folder / "train.ends")
    return TokenRows(folder / "train", 10, EOD, seq_len, pack)


@settings(deadline=None)
@given(documents=token_documents(), seq_len=st.integers(1, 12))
def test_rows_predict_every_token_of_a_document_but_the_first_exactly_once(
    tmp_path_factory, documents, seq_len
):
    rows = write_rows(tmp_path_factory.mktemp("rows"), documents, seq_len)
    pairs: list[tuple[int, int]] = []  # (what is seen, what is to be predicted), in order
    for i in range(len(rows)):
        labelled = rows[i]["labels"] != IGNORE
        pairs += zip(
            rows[i]["input_ids"][labelled].tolist(), rows[i]["labels"][labelled].tolist(), strict=True
        )
    assert pairs == [pair for document in documents for pair in itertools.pairwise([*document, EOD])]


@settings(deadline=None)
@given(documents=token_documents(), seq_len=st.integers(1, 12))
def test_segments_are_the_documents_of_a_row(tmp_path_factory, documents, seq_len):
    rows = write_rows(tmp_path_factory.mktemp("rows"), documents, seq_len)
    of_position = [n for n, document in enumerate(documents) for _ in [*document, EOD]]
    padded = of_position + [len(documents)] * (len(rows) * seq_len)
    for i in range(len(rows)):
        row, expected = rows[i], np.array(padded[i * seq_len : (i + 1) * seq_len])
        assert row["segment_ids"].tolist() == (expected - expected[0]).tolist()
        assert (row["labels"][expected == len(documents)] == IGNORE).all()
        for tensor in row.values():
            assert tensor.dtype == torch.int64
            assert tensor.shape == (seq_len,)


def test_rows_cut_plainly_differ_only_in_having_no_segments(tmp_path):
    packed = write_rows(tmp_path, [[1, 2], [3, 4, 5]], 4)
    plain = write_rows(tmp_path, [[1, 2], [3, 4, 5]], 4, pack=False)
    for i in range(len(packed)):
        row = packed[i]
        del row["segment_ids"]
        assert row.keys() == plain[i].keys()
        assert all(torch.equal(row[name], plain[i][name]) for name in row)


def test_two_documents_in_rows_of_four(tmp_path):
    rows = write_rows(tmp_path, [[1, 2], [3, 4, 5]], 4)
    assert len(rows) == 2
    first = {name: tensor.tolist() for name, tensor in rows[0].items()}
    assert first == {"input_ids": [1, 2, 9, 3], "labels": [2, 9, -100, 4], "segment_ids": [0, 0, 0, 1]}
    second = {name: tensor.tolist() for name, tensor in rows[1].items()}
    assert second == {"input_ids": [4, 5, 9, 9], "labels": [5, 9, -100, -100], "segment_ids": [0, 0, 0, 1]}


def test_rows_end_where_the_dataset_says(tmp_path):
    rows = write_rows(tmp_path, [[1, 2], [3, 4, 5]], 4)
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"row {i} of 2"):
            rows[i]


def test_a_pickled_dataset_is_small_and_reads_the_same(corpus, tmp_path):
    rows = prepared(config(tmp_path, files=[f"{corpus}/*.txt"])).train_dataset()
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[2]["labels"], rows[2]["labels"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_what_the_main_process_does(corpus, tmp_path, context):
    rows = prepared(
        config(tmp_path, files=[f"{corpus}/*.txt"], tokenizer="bpe", vocab_size=300)
    ).train_dataset()
    batches = DataLoader(rows, batch_size=4, num_workers=1, multiprocessing_context=context)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert torch.equal(labels, torch.stack([rows[i]["labels"] for i in range(len(rows))]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("loss", ["gone", "shorter"])
def test_tokens_that_are_lost_while_in_use_are_named(corpus, tmp_path, workers, loss):
    # A memory map of a file that got shorter would kill the process instead.
    rows = prepared(config(tmp_path, files=[f"{corpus}/*.txt"])).train_dataset()
    assert rows.read(0, 1).dtype == np.uint16
    file = rows.path.with_suffix(".tokens")
    file.unlink() if loss == "gone" else file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(DataError, match=r"data\.cache_dir: .*train\.tokens (was there|is shorter)"):
        list(DataLoader(rows, batch_size=4, num_workers=workers))


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
    monkeypatch.setattr("mixerlab.data.text.PIECE", 50)
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
    assert rows.read(0, rows.n_tokens - 1).tolist() == data.tokenizer.encode(text)


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
        firsts = rows.read(0, rows.n_tokens)[[0, *rows.ends[:-1]]].astype(np.int64)
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
    assert [path.stem for path in expand(patterns)] == ["07", *(f"{i:02}" for i in range(10) if i != 7)]


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
    assert [p for p in (tmp_path / "cache" / "text").iterdir() if p.suffix != ".lock"] == []


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
