"""Rows of tasks that are made ahead."""

import pickle

import numpy as np
import pytest
import torch

from mixerlab.data import DataError, build_data
from mixerlab.data import testing as contract
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.task import Task
from task_variants import VARIANTS, options


def small(variant, cache_dir=None, seed=0):
    """A task of few rows."""
    chosen = options(variant) | {"n_train": 600, "n_valid": 40, "cache_dir": cache_dir}
    if variant == "diffuse_mqar":
        chosen["n_test"] = 40
    return build_data(chosen, seed)


def ready(*args, **kwargs):
    task = small(*args, **kwargs)
    task.prepare()
    task.setup()
    return task


def datasets(task):
    return {"train": task.train_dataset(), **task.val_datasets()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_made_ahead_are_those_made_on_the_fly(variant, tmp_path):
    ahead, fly = datasets(ready(variant, str(tmp_path))), datasets(small(variant))
    assert ahead.keys() == fly.keys()
    for name, rows in ahead.items():
        for a, b in zip(rows.batch(range(len(rows))), fly[name].batch(range(len(rows))), strict=True):
            assert a.dtype == torch.int64
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_second_start_makes_no_row(tmp_path, monkeypatch):
    rows = ready("mqar", str(tmp_path)).train_dataset()
    monkeypatch.setattr(Draws, "bits", None)
    again = ready("mqar", str(tmp_path)).train_dataset()
    assert (again[7]["input_ids"] == rows[7]["input_ids"]).all()
    with pytest.raises(TypeError):
        small("mqar").train_dataset()[7]


@pytest.mark.parametrize("change", [{"seed": 1}, {"variant": "mqar, random"}], ids=str)
def test_other_rows_lie_elsewhere(tmp_path, change):
    ready("mqar", str(tmp_path))
    folders = set((tmp_path / "tasks").iterdir())
    ready(**{"variant": "mqar", "cache_dir": str(tmp_path), **change})
    assert len({f for f in (tmp_path / "tasks").iterdir() if f.is_dir()} - folders) == 2 + 2 * (
        "variant" in change
    )


def test_workers_get_the_folder_not_the_rows(tmp_path):
    rows = ready("mqar", str(tmp_path)).train_dataset()
    first = rows[0]["input_ids"]
    sent = pickle.dumps(rows)
    assert len(sent) < 10_000
    assert (pickle.loads(sent)[0]["input_ids"] == first).all()


def test_damaged_rows_are_made_again(tmp_path, caplog):
    rows = ready("mqar", str(tmp_path)).train_dataset()
    expected = rows[3]["input_ids"].clone()
    assert rows.cache is not None
    (rows.cache / "input_ids.npy").write_bytes(b"nothing")
    assert (ready("mqar", str(tmp_path)).train_dataset()[3]["input_ids"] == expected).all()
    assert "building it anew" in caplog.text


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir: .*file"):
        small("mqar", str(tmp_path / "file")).prepare()


def test_numbers_beyond_16_bits_are_kept(tmp_path):
    def made(**more):
        task = build_data({"name": "mqar", "vocab_size": 100_000, "n_train": 300, "n_valid": 2, **more}, 0)
        assert isinstance(task, Task)
        task.prepare()
        task.setup()
        return task.train_dataset()[5]["input_ids"].numpy()

    np.testing.assert_array_equal(made(cache_dir=str(tmp_path)), made())


def test_the_contract_holds(tmp_path):
    contract.check_data(lambda seed: small("mqar", str(tmp_path), seed))
