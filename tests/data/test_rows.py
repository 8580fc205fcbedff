"""Rows, read from a file of tokens and a file of the places where documents end."""

import itertools
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mixerlab.data import DataError
from mixerlab.data.rows import NumberFile, TokenRows

IGNORE = -100
EOD = 9


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


@pytest.fixture
def rows(tmp_path) -> TokenRows:
    documents = [[1 + (i + k) % 7 for k in range(1 + i % 11)] for i in range(40)]
    return write_rows(tmp_path, documents, 8)


def test_a_pickled_dataset_is_small_and_reads_the_same(rows):
    before = rows[2]
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[2]["labels"], before["labels"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("is_open", [True, False])
def test_worker_processes_read_what_the_main_process_does(rows, context, is_open):
    labels = torch.stack([rows[i]["labels"] for i in range(len(rows))])
    copy = rows if is_open else pickle.loads(pickle.dumps(rows))
    batches = DataLoader(copy, batch_size=2, num_workers=2, multiprocessing_context=context)
    assert torch.equal(labels, torch.cat([batch["labels"] for batch in batches]))


def test_files_are_opened_once_and_closed_with_the_dataset(rows, monkeypatch):
    opened, closed = [], []
    real_open, real_close = os.open, os.close

    def counted_open(*args):
        opened.append(real_open(*args))
        return opened[-1]

    def counted_close(descriptor):
        closed.append(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", counted_open)
    monkeypatch.setattr(os, "close", counted_close)
    copy = pickle.loads(pickle.dumps(rows))
    for i in range(len(copy)):
        copy[i]
    assert len(opened) == 2
    del copy
    assert sorted(closed) == sorted(opened)


def test_where_documents_end_is_not_loaded(tmp_path):
    # A sparse file: a billion documents of two tokens.
    for suffix, size in (("tokens", 2 * 2 * 10**9), ("ends", 8 * 10**9)):
        with (tmp_path / f"train.{suffix}").open("wb") as file:
            file.truncate(size)
    rows = TokenRows(tmp_path / "train", 10, EOD, 8, pack=True)
    assert len(rows.ends) == 10**9
    assert len(pickle.dumps(rows)) < 1000


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["tokens", "ends"])
def test_a_file_that_gets_shorter_while_in_use_is_named(rows, workers, name):
    # A memory map of it would kill the process instead.
    assert rows[0]["input_ids"].shape == (8,)
    file = getattr(rows, name).path
    os.truncate(file, 9)
    with pytest.raises(DataError, match=rf"data\.cache_dir: .*train\.{name} is shorter"):
        list(DataLoader(rows, batch_size=4, num_workers=workers))


def test_a_file_that_vanishes_goes_on_to_be_read_where_it_is_open(rows):
    expected = [rows[i] for i in range(len(rows))]
    fresh = pickle.loads(pickle.dumps(rows))
    rows.tokens.path.unlink()
    assert all(torch.equal(rows[i]["labels"], row["labels"]) for i, row in enumerate(expected))
    with pytest.raises(DataError, match=r"data\.cache_dir: .*train\.tokens was there and cannot be read now"):
        fresh[0]


@given(start=st.integers(0, 12), count=st.integers(0, 12))
def test_numbers_are_read_by_their_place(tmp_path_factory, start, count):
    path = tmp_path_factory.mktemp("numbers") / "a"
    np.arange(10, dtype=np.int64).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as about a file that is not closed
        numbers = NumberFile(path, np.int64)
        assert len(numbers) == 10
        assert numbers.read(start, count).tolist() == list(range(10))[start : start + count]
        del numbers
