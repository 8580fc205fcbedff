"""Every data module keeps the contract, and modules that break it are told so."""

import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixerlab.data import DataModule, Rows, build_data
from mixerlab.data import testing as contract
from mixerlab.data.tokenizers import ByteTokenizer

VARIANTS = {
    "bytes, packed": {"tokenizer": "bytes", "pack": True},
    "bytes, plain": {"tokenizer": "bytes", "pack": False},
    "bpe, packed": {"tokenizer": "bpe", "vocab_size": 300, "pack": True},
    "bpe, plain": {"tokenizer": "bpe", "vocab_size": 300, "pack": False},
}


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_text(tmp_path, name, check):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"Document {i} says {'ha ' * (i % 7)}€.\n", encoding="utf-8")
    options = {
        "name": "text",
        "source": "files",
        "files": f"{tmp_path}/*.txt",
        "valid_fraction": 0.3,
        "seq_len": 48,
        "cache_dir": str(tmp_path / "cache"),
        **VARIANTS[name],
    }
    check(lambda seed: build_data(options, seed))


# Modules that break the contract

T, V = 8, 10


class ToyRows(Rows):
    """Two documents of four tokens in each row."""

    def __init__(self, seed=0, split=0):
        self.seed, self.split = seed, split

    def __len__(self):
        return 20

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self.row(
            i, np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.split, i])))
        )

    def row(self, i, generator):
        ids = torch.from_numpy(generator.integers(1, V, size=T))
        labels = ids.roll(-1)
        labels[[3, 7]] = -100
        return {"input_ids": ids, "labels": labels, "segment_ids": torch.arange(T) // 4}


class Toy(DataModule):
    seq_len, vocab_size = T, V

    def __init__(self, seed, rows=ToyRows):
        super().__init__(None, seed)
        self.rows = rows

    def train_dataset(self):
        return self.rows(self.seed, 0)

    def val_datasets(self):
        return {"valid": self.rows(self.seed, 1), "few": self.rows(self.seed, 2)}


@pytest.fixture
def importable(monkeypatch):
    """Another process can import this file by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@pytest.mark.usefixtures("importable")
def test_a_module_of_a_few_lines():
    contract.check_data(Toy)


def rows_with(change):
    """A factory of modules whose rows `change(row, i)` has altered."""

    class Changed(ToyRows):
        def row(self, i, generator):
            row = super().row(i, generator)
            return change(row, i) or row

    return partial(Toy, rows=Changed)


def set_items(name, where, value):
    def change(row, i):
        row[name][where] = value

    return rows_with(change)


def replace(**tensors):
    return rows_with(lambda row, i: row | tensors)


def drop_segments_of_row_3(row, i):
    if i == 3:
        del row["segment_ids"]


@pytest.mark.parametrize(
    ("check", "factory", "message"),
    [
        (
            contract.check_rows,
            set_items("input_ids", 2, V),
            r"train_dataset\(\)\[0\]: input_ids has \[10\]; V is 10",
        ),
        (contract.check_rows, set_items("input_ids", 2, -100), r"input_ids has \[-100\]"),
        (contract.check_rows, set_items("labels", 2, -1), r"labels has \[-1\]"),
        (contract.check_rows, replace(labels=torch.zeros(T)), r"labels is torch.float32"),
        (contract.check_rows, replace(labels=torch.zeros(T + 1).long()), r"labels is \(9,\); T is 8"),
        (contract.check_rows, replace(labels=[0] * T), r"labels is a list"),
        (
            contract.check_rows,
            replace(segments=torch.zeros(T).long()),
            r"has input_ids, labels, segment_ids, segments",
        ),
        (contract.check_some_label, set_items("labels", slice(None), -100), r"train_dataset\(\) has none"),
        (
            contract.check_segments,
            replace(segment_ids=torch.arange(T) // 4 + 1),
            r"\[1, 1, 1, 1, 2, 2, 2, 2\]",
        ),
        (contract.check_segments, replace(segment_ids=-torch.arange(T)), r"\[0, -1, -2"),
        (contract.check_segments, rows_with(drop_segments_of_row_3), r"rows \[3\] have no segment_ids"),
    ],
)
def test_a_wrong_row_is_told(check, factory, message):
    with pytest.raises(AssertionError, match=message):
        check(factory)


def test_a_failing_check_is_named():
    with pytest.raises(AssertionError, match=r"^check_rows: A row has .*\n.*input_ids has \[10\]"):
        contract.check_data(set_items("input_ids", 2, V))


def every_token_predicts_the_next(row, i):
    row["labels"] = row["input_ids"].roll(-1)
    row["labels"][-1] = -100


def test_labels_that_cross_into_the_next_document_are_told():
    with pytest.raises(
        AssertionError, match=r"(\d+) of \1 labels at a segment's end are the next segment's first"
    ):
        contract.check_labels_stay_in_their_segment(rows_with(every_token_predicts_the_next))


def documents_have_a_class(row, i):
    row["labels"] = torch.full((T,), -100)
    row["labels"][[3, 7]] = row["input_ids"][[0, 4]] % 2


def documents_have_a_class_at_each_token(row, i):
    row["labels"] = row["input_ids"] % 2


def documents_begin_and_end_with_the_same_token(row, i):
    row["input_ids"][[0, 4]] = 0
    every_token_predicts_the_next(row, i)


def documents_are_cut_from_longer_ones(row, i):
    row["labels"][[3, 7]] = torch.tensor([i % V, (i + 1) % V])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "change",
    [
        documents_have_a_class,
        documents_have_a_class_at_each_token,
        documents_begin_and_end_with_the_same_token,
        documents_are_cut_from_longer_ones,
    ],
)
def test_labels_that_only_look_like_the_next_document_are_not(change, seed):
    contract.check_labels_stay_in_their_segment(lambda _: rows_with(change)(seed))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"their names are \[\]"),
        (["test"], "their names are"),
        (["few", "valid"], "their names are"),
        (["valid", "length/4"], "'length/4' cannot be part"),
        (["valid", "train"], "'train' cannot be part"),
    ],
)
def test_validation_without_the_right_names_is_told(names, message):
    class Named(Toy):
        def val_datasets(self):
            return {name: ToyRows() for name in names}

    with pytest.raises(AssertionError, match=message):
        contract.check_validation(Named)


class Counting(ToyRows):
    """Rows that depend on how many were read before."""

    read = 0

    def row(self, i, generator):
        self.read += 1
        return super().row(self.read, np.random.default_rng(self.read))


class Drawing(ToyRows):
    """Rows that depend on what else is drawn."""

    def row(self, i, generator):
        return super().row(i, np.random.default_rng(random.getrandbits(32)))


def test_rows_that_differ_from_reading_to_reading_are_told():
    for rows in (Counting, Drawing):
        with pytest.raises(
            AssertionError, match=r"train_dataset\(\)\[19\] is another when it is asked for again"
        ):
            contract.check_repeated_rows(partial(Toy, rows=rows))


def test_rows_that_differ_from_instance_to_instance_are_told():
    number = iter(range(99))
    with pytest.raises(AssertionError, match=r"\[19\] is another in a second instance with the same seed"):
        contract.check_repeated_rows(lambda seed: Toy(next(number)))


class OfThisProcess(ToyRows):
    def row(self, i, generator):
        return super().row(i, np.random.default_rng(os.getpid()))


@pytest.mark.usefixtures("importable")
def test_rows_that_differ_from_process_to_process_are_told():
    with pytest.raises(AssertionError, match=r"train_dataset\(\)\[0\] is another in another process"):
        contract.check_another_process(partial(Toy, rows=OfThisProcess))


def test_rows_that_cannot_go_to_another_process_are_told():
    with pytest.raises(AssertionError, match=r"train_dataset\(\) cannot be pickled: .*local object"):
        contract.check_another_process(rows_with(lambda row, i: None))


@pytest.mark.parametrize(
    ("generator", "seed"),
    [("torch", torch.manual_seed), ("numpy", np.random.seed), ("random", random.seed)],
)
def test_rows_that_seed_a_global_generator_are_told(generator, seed):
    with pytest.raises(AssertionError, match=rf"train_dataset\(\)\[0\] changes the generator of {generator}"):
        contract.check_global_generators(rows_with(lambda row, i: seed(i) and None))


class Wrapping(ToyRows):
    def __getitem__(self, i):
        return super().__getitem__(i % len(self))


def test_an_index_that_counts_from_the_end_or_beyond_it_is_told():
    with pytest.raises(AssertionError, match=r"train_dataset\(\)\[-1\] of 20 rows gives one"):
        contract.check_index(partial(Toy, rows=Wrapping))


def test_sizes_that_are_not_known_in_time_are_told():
    class Late(Toy):
        vocab_size: Any = None

        def setup(self):
            self.vocab_size = V

    with pytest.raises(AssertionError, match="vocab_size is None, not an int"):
        contract.check_sizes(Late)


def test_a_cache_that_another_seed_overwrites_is_told():
    cache = {}

    class Cached(Toy):
        def prepare(self):
            cache["seed"] = self.seed

        def setup(self):
            self.seed = cache["seed"]

    with pytest.raises(AssertionError, match=r"after `setup` alone: train_dataset\(\)\[0\] differs"):
        contract.check_setup_alone(Cached)


def test_preparing_anew_each_time_is_told():
    class Restless(Toy):
        def prepare(self):
            self.seed += 1

    with pytest.raises(AssertionError, match=r"after another `prepare`: train_dataset\(\)\[0\] differs"):
        contract.check_prepare_again(Restless)


def test_rows_that_only_prepare_makes_are_told():
    class Forgetful(Toy):
        def prepare(self):
            self.seed = 99

    with pytest.raises(AssertionError, match=r"after `setup` alone: train_dataset\(\)\[0\] differs"):
        contract.check_setup_alone(Forgetful)


def test_what_is_prepared_only_for_those_that_are_not_told_the_fingerprint_is_told():
    class Told(Toy):
        fingerprint = "abc"

        def setup(self):
            self.seed += len(self.prepared)

    with pytest.raises(AssertionError, match=r"after `setup` alone: train_dataset\(\)\[0\] differs"):
        contract.check_setup_alone(Told)


@pytest.mark.parametrize("report", [3, "", "two\nlines"])
def test_a_report_that_is_no_line_is_told(report):
    class Reporting(Toy):
        def prepare(self):
            self.report(report)

    with pytest.raises(AssertionError, match="it reports"):
        contract.check_report(Reporting)


@pytest.mark.parametrize("fingerprints", [[3, 3], ["a", "b"]])
def test_a_fingerprint_that_is_not_one_is_told(fingerprints):
    remaining = iter(fingerprints)

    class Printed(Toy):
        def prepare(self):
            self.fingerprint = next(remaining)

        setup = prepare
        fingerprint = ""

    with pytest.raises(AssertionError, match="it is 3" if 3 in fingerprints else "'a' != 'b'"):
        contract.check_fingerprint(Printed)


@pytest.mark.parametrize(
    ("token_bytes", "message"),
    [
        (torch.ones(V), "they are torch.float32"),
        (torch.ones(V - 1).long(), r"they are \(9,\); V is 10"),
        (-torch.ones(V).long(), "the smallest is -1"),
    ],
)
def test_wrong_token_bytes_are_told(token_bytes, message):
    class Counted(Toy):
        pass

    Counted.token_bytes = token_bytes
    with pytest.raises(AssertionError, match=message):
        contract.check_token_bytes(Counted)


class UnsavedTokenizer(ByteTokenizer):
    def save(self, folder):
        pass


class ShiftedTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        return [ids + 1 for ids in super().encode_batch(texts)]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [(UnsavedTokenizer, "`load_tokenizer` finds none"), (ShiftedTokenizer, "gives .* instead of")],
)
def test_a_tokenizer_that_does_not_come_back_is_told(tokenizer, message):
    class Text(Toy):
        vocab_size = 257

    Text.tokenizer = tokenizer()
    contract.check_sizes(Text)
    with pytest.raises(AssertionError, match=message):
        contract.check_tokenizer(Text)


def test_a_vocabulary_that_is_not_the_tokenizers_is_told():
    class Text(Toy):
        tokenizer = ByteTokenizer()

    with pytest.raises(AssertionError, match="vocab_size is 10; the tokenizer has 257 tokens"):
        contract.check_sizes(Text)
