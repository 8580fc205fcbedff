"""The contract of a data module as checks that anyone can run on theirs.

    from mixerlab.data.testing import check_data
    check_data(lambda seed: build_data("mine", seed))

A script that calls it does so under `if __name__ == "__main__":`, because one check starts a process.

Letters: T input positions of a row, V vocabulary.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from mixerlab.data.module import IGNORE, DataModule, Rows
from mixerlab.data.tokenizers import load_tokenizer

Factory = Callable[[int], DataModule]
"""seed -> a data module of that seed, not yet prepared."""

Row = dict[str, Tensor]

TEXT = 'def f(x):\n    return "naïve café" + x  # 2 + 2 = 4\n'


def check_data(factory: Factory) -> None:
    """Runs every check below on the data module that `factory` builds; AssertionError names the first that fails."""
    for check in CHECKS:
        try:
            check(factory)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {check.__doc__}\n{error}") from error


def ready(factory: Factory, seed: int = 0) -> DataModule:
    """A data module whose rows can be read."""
    data = factory(seed)
    data.prepare()
    data.setup()
    return data


MAIN = ("train_dataset()", "val_datasets()['valid']")
"""Whose rows have T = seq_len positions."""


def splits(data: DataModule) -> dict[str, Rows]:
    """All datasets, each by how one gets it."""
    valid = {f"val_datasets()[{name!r}]": rows for name, rows in data.val_datasets().items()}
    return {"train_dataset()": data.train_dataset(), **valid}


def sample(rows: Rows) -> list[int]:
    """The first rows, and some up to the last: all would take too long."""
    spread = np.linspace(0, len(rows) - 1, 8).astype(int).tolist()
    return sorted({*range(min(8, len(rows))), *spread})


def read(data: DataModule) -> Iterator[tuple[str, Row]]:
    """Some rows of every dataset, each with its name."""
    for name, rows in splits(data).items():
        for i in sample(rows):
            yield f"{name}[{i}]", rows[i]


def equal(a: Row, b: Row) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same(rows: Iterator[tuple[str, Row]], others: Iterator[tuple[str, Row]], what: str) -> None:
    for (name, row), (other_name, other) in zip(rows, others, strict=True):
        assert name == other_name, f"{what}: {other_name} instead of {name}"
        assert equal(row, other), f"{what}: {name} differs"


def check_sizes(factory: Factory) -> None:
    """`vocab_size` and `seq_len` are known before there are data, and `vocab_size` is exact after `setup`."""
    for data in (factory(0), ready(factory)):
        for name in ("vocab_size", "seq_len"):
            value = getattr(data, name)
            assert isinstance(value, int), f"{name} is {value!r}, not an int"
            assert value > 0, f"{name} is {value}"
    if data.tokenizer is not None:
        tokens = data.tokenizer.vocab_size
        assert data.vocab_size == tokens, (
            f"vocab_size is {data.vocab_size}; the tokenizer has {tokens} tokens"
        )


def check_validation(factory: Factory) -> None:
    """There are datasets to validate on, first the main one, "valid", with names that metrics can have."""
    names = list(ready(factory).val_datasets())
    assert names[:1] == ["valid"], f"their names are {names}"
    for name in names:
        usable = name not in ("", "train") and not set("./") & set(name)
        assert usable, f"{name!r} cannot be part of a metric's name"


def check_rows(factory: Factory) -> None:
    """A row has input_ids, labels and perhaps segment_ids, int64 (T,); ids are in 0..V-1, as are labels, or -100."""
    data = ready(factory)
    V = data.vocab_size
    for name, rows in splits(data).items():
        assert len(rows) > 0, f"{name} is empty"
    for dataset, rows in splits(data).items():
        # Validation datasets beside "valid" may have rows of another length, the same for all rows of one.
        T = data.seq_len if dataset in MAIN else len(rows[0]["input_ids"])
        for i in sample(rows):
            name, row = f"{dataset}[{i}]", rows[i]
            keys = set(row) - {"segment_ids"}
            assert keys == {"input_ids", "labels"}, f"{name} has {', '.join(map(str, row))}"
            for key, value in row.items():
                assert isinstance(value, Tensor), f"{name}: {key} is a {type(value).__name__}"
                assert value.dtype == torch.int64, f"{name}: {key} is {value.dtype}"
                assert value.shape == (T,), f"{name}: {key} is {tuple(value.shape)}; T is {T}"
            labels = row["labels"][row["labels"] != IGNORE]
            for key, ids in (("input_ids", row["input_ids"]), ("labels", labels)):
                wrong = ids[(ids < 0) | (ids >= V)].tolist()
                assert not wrong, f"{name}: {key} has {wrong}; V is {V}"


def check_some_label(factory: Factory) -> None:
    """There is something to predict: each dataset has a label among its first rows."""
    for name, rows in splits(ready(factory)).items():
        assert any((rows[i]["labels"] != IGNORE).any() for i in sample(rows)), f"{name} has none"


def check_segments(factory: Factory) -> None:
    """segment_ids begin with 0 and do not decrease, and all rows of a dataset have them or none."""
    for name, rows in splits(ready(factory)).items():
        segments = [rows[i].get("segment_ids") for i in sample(rows)]
        missing = [i for i, ids in zip(sample(rows), segments, strict=True) if ids is None]
        assert len(missing) in (0, len(segments)), f"{name}: rows {missing} have no segment_ids, others have"
        for i, ids in zip(sample(rows), segments, strict=True):
            if ids is not None:
                right = ids[0] == 0 and (ids.diff() >= 0).all()
                assert right, f"{name}[{i}]: {ids.tolist()}"


def check_labels_stay_in_their_segment(factory: Factory) -> None:
    """Where labels are the next token, no segment's last label is the first token of the next segment."""
    for name, rows in splits(ready(factory)).items():
        next_token: list[bool] = []
        crossing: list[tuple[int, int]] = []  # (label at a segment's end, first token of the next segment)
        for i in sample(rows):
            row = rows[i]
            if "segment_ids" in row:
                ids, labels, is_end = row["input_ids"][1:], row["labels"][:-1], row["segment_ids"].diff() != 0
                labelled = labels != IGNORE
                next_token += (labels == ids)[labelled & ~is_end].tolist()
                ends = labelled & is_end
                crossing += zip(labels[ends].tolist(), ids[ends].tolist(), strict=True)
        # A class may happen to be the token that follows it, so labels must be the next token everywhere else. The
        # end of a document may be, where every document begins with the same token; or, rarely, by chance.
        leaked = [label for label, following in crossing if label == following]
        if next_token and all(next_token) and len(set(leaked)) > 1:
            assert 2 * len(leaked) <= len(crossing), (
                f"{name}: {len(leaked)} of {len(crossing)} labels at a segment's end are the next segment's first token"
            )


def check_repeated_rows(factory: Factory) -> None:
    """Row i is the same whenever it is asked for, in any order, and of any instance with the same seed."""
    data, other = ready(factory), ready(factory)
    for (name, rows), others in zip(splits(data).items(), splits(other).values(), strict=True):
        assert len(rows) == len(others), f"{name} has {len(rows)} rows, and {len(others)} in another instance"
        first = [(i, rows[i]) for i in sample(rows)]
        for i, row in reversed(first):
            assert equal(rows[i], row), f"{name}[{i}] is another when it is asked for again"
            assert equal(others[i], row), f"{name}[{i}] is another in a second instance with the same seed"


def check_another_process(factory: Factory) -> None:
    """Datasets can be pickled, and a process that starts with nothing else reads the same rows."""
    data = ready(factory)
    for name, rows in splits(data).items():
        try:
            pickle.dumps(rows)
        except Exception as error:  # whatever a class of the module's does
            raise AssertionError(f"{name} cannot be pickled: {error}") from error
    # A spawned process has another hash seed, too, and none of our globals.
    loader: DataLoader[Row] = DataLoader(
        ConcatDataset([Subset(rows, sample(rows)) for rows in splits(data).values()]),
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        generator=torch.Generator(),
    )
    for (name, row), theirs in zip(read(data), loader, strict=True):
        assert equal(row, theirs), f"{name} is another in another process"


def check_index(factory: Factory) -> None:
    """An index below 0, or beyond the last row, raises IndexError."""
    for name, rows in splits(ready(factory)).items():
        for i in (-1, len(rows)):
            try:
                rows[i]
            except IndexError:
                continue
            raise AssertionError(f"{name}[{i}] of {len(rows)} rows gives one")


def check_prepare_again(factory: Factory) -> None:
    """`prepare` may run again: the rows stay, and so does the fingerprint."""
    data = ready(factory)
    before, fingerprint = list(read(data)), data.fingerprint
    data.prepare()
    data.setup()
    assert_same(iter(before), read(data), "after another `prepare`")
    assert data.fingerprint == fingerprint, f"it was {fingerprint!r} and is {data.fingerprint!r}"


def check_setup_alone(factory: Factory) -> None:
    """After `prepare` in one process, others need `setup` alone, even if data of another seed were prepared since.

    That is so whether they are told the fingerprint (`prepared`) or not.
    """
    data = ready(factory)
    before = list(read(data))
    ready(factory, seed=1)
    for prepared in ("", data.fingerprint):
        other = factory(0)
        other.prepared = prepared
        other.setup()
        assert other.vocab_size == data.vocab_size, f"vocab_size is {other.vocab_size}, not {data.vocab_size}"
        assert_same(iter(before), read(other), "after `setup` alone")


def check_fingerprint(factory: Factory) -> None:
    """`fingerprint` is a str, known after `prepare` and after `setup`, and the same for the same rows."""
    first, second = factory(0), factory(0)
    first.prepare()
    second.setup()
    assert isinstance(first.fingerprint, str), f"it is {first.fingerprint!r}"
    assert first.fingerprint == second.fingerprint, f"{first.fingerprint!r} != {second.fingerprint!r}"


def check_report(factory: Factory) -> None:
    """What `prepare` reports is one line of text, and rows do not depend on whether anybody listens."""
    said: list[object] = []
    data = factory(0)
    data.report = said.append
    data.prepare()
    data.setup()
    wrong = [doing for doing in said if not isinstance(doing, str) or not doing or "\n" in doing]
    assert not wrong, f"it reports {wrong[0]!r}"
    assert_same(read(ready(factory)), read(data), "of a module that reports")


def check_token_bytes(factory: Factory) -> None:
    """`token_bytes`, where there are any, are (V,) int64, and none is negative."""
    data = ready(factory)
    if (count := data.token_bytes) is not None:
        assert count.dtype == torch.int64, f"they are {count.dtype}"
        assert count.shape == (data.vocab_size,), f"they are {tuple(count.shape)}; V is {data.vocab_size}"
        assert (count >= 0).all(), f"the smallest is {count.min()}"


def check_tokenizer(factory: Factory) -> None:
    """A tokenizer that was saved is loaded again from its folder alone, and gives the same ids."""
    data = ready(factory)
    if data.tokenizer is not None:
        with TemporaryDirectory() as folder:
            data.save_tokenizer(Path(folder))
            loaded = load_tokenizer(Path(folder))
        assert loaded is not None, "`load_tokenizer` finds none in the folder"
        assert loaded.vocab_size == data.vocab_size, (
            f"it has {loaded.vocab_size} tokens, not {data.vocab_size}"
        )
        ids, expected = loaded.encode(TEXT), data.tokenizer.encode(TEXT)
        assert ids == expected, f"{TEXT!r} gives {ids} instead of {expected}"


def check_global_generators(factory: Factory) -> None:
    """Reading rows leaves the global random generators of torch, numpy and Python as they were."""
    data = ready(factory)
    generators: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.get_rng_state().tolist(),
        "numpy": lambda: pickle.dumps(np.random.get_state()),  # noqa: NPY002
        "random": random.getstate,
    }
    before = {name: state() for name, state in generators.items()}
    for row, _ in read(data):
        for name, state in generators.items():
            assert state() == before[name], f"{row} changes the generator of {name}"


CHECKS = (
    check_sizes,
    check_validation,
    check_rows,
    check_some_label,
    check_segments,
    check_labels_stay_in_their_segment,
    check_repeated_rows,
    check_another_process,
    check_index,
    check_prepare_again,
    check_setup_alone,
    check_fingerprint,
    check_report,
    check_token_bytes,
    check_tokenizer,
    check_global_generators,
)
