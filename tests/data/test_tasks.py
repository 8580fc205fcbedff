"""What all synthetic tasks have in common: the contract, rows that are the same however they are read, messages."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixerlab.data import DataModule, build_data
from mixerlab.data import testing as contract
from mixerlab.data.tasks.task import Task
from mixerlab.options import ConfigError
from task_variants import VARIANTS, options

variants = pytest.mark.parametrize("variant", VARIANTS)


def built(variant, seed=0):
    task = build_data(options(variant), seed)
    assert isinstance(task, Task)
    return task


def names():
    """Every task that is registered."""
    from mixerlab.data import DATA

    return {name for name in DATA.registered() if issubclass(DATA.implementation(name), Task)}


def test_every_task_is_tried():
    assert {variant.partition(",")[0] for variant in VARIANTS} == names()


@pytest.mark.parametrize("name", sorted(names()))
def test_a_task_keeps_its_contract_with_its_defaults(name):
    data = build_data(name, 0)
    contract.check_sizes(lambda seed: data)
    assert (data.train_dataset()[0]["labels"] != -100).any()


@pytest.mark.parametrize(
    "check", [check for check in contract.CHECKS if check is not contract.check_another_process]
)
@variants
def test_the_contract(variant, check):
    check(lambda seed: built(variant, seed))


class All(DataModule):
    """The rows of all of them."""

    vocab_size, seq_len = 1, 1

    def train_dataset(self):
        return built("mqar").train_dataset()

    def val_datasets(self):
        return {
            f"{variant} {name}": rows
            for variant in VARIANTS
            for name, rows in {
                "train": built(variant).train_dataset(),
                **built(variant).val_datasets(),
            }.items()
        }


def test_the_contract_in_another_process():
    contract.check_another_process(lambda seed: All(None, seed))


@variants
def test_a_row_is_the_same_in_every_batch_and_order(variant):
    rows, again = built(variant).train_dataset(), built(variant).train_dataset()
    order = np.random.default_rng(0).permutation(600)
    batches = [order[:1], order[1:8], order[8:300], order[300:]]
    for batch in batches:
        for i, row in zip(batch, again.__getitems__(batch.tolist()), strict=True):
            assert contract.equal(row, rows[int(i)]), i


@variants
def test_rows_that_were_changed_by_their_reader_are_made_anew(variant):
    rows = built(variant).train_dataset()
    before = {name: tensor.clone() for name, tensor in rows[1].items()}
    rows[1]["input_ids"].zero_()
    assert contract.equal(rows[1], before)


@variants
def test_splits_and_seeds_have_other_rows(variant):
    data = built(variant)
    datasets = [data.train_dataset(), built(variant, seed=1).train_dataset(), *data.val_datasets().values()]
    first = [tuple(rows[i]["input_ids"].tolist()) for rows in datasets for i in range(20)]
    assert len(set(first)) == len(first)


@variants
def test_workers_read_the_same_batches(variant):
    rows = built(variant).train_dataset()
    batches = [[5, 3, 400], [1, 0, 2]]
    alone, shared = ([*DataLoader(rows, batch_sampler=batches, num_workers=n)] for n in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["labels"], other["labels"])


def test_an_index_outside_is_refused_in_batches_too():
    rows = built("mqar").train_dataset()
    for i in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"row {i} of 100000"):
            rows.__getitems__([0, i])


def test_few_very_long_rows_are_made_together():
    rows = build_data({"name": "induction_heads", "seq_len": 1 << 20}, 0).train_dataset()
    assert rows.block_size == 1
    assert rows[3]["input_ids"].shape == (1 << 20,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("symbol_soup min_tokens=700", "min_tokens = 700: at most max_tokens = 600 is needed"),
        (
            "symbol_soup n_train=30",
            "n_train = 30: a multiple of 20 is needed, as many rows of each of 20 classes",
        ),
        (
            "mqar seq_len=63",
            "seq_len = 63: an even number is needed, for pairs and for queries at even places",
        ),
        ("mqar vocab_size=9", "vocab_size = 9: an even number is needed, half of it values"),
        ("mqar n_pairs=17", "n_pairs = 17: 1 to 16 fit, a quarter of seq_len = 64"),
        ("mqar test_pairs=[4,0]", "test_pairs = [4, 0]: 1 to 16 fit, a quarter of seq_len = 64"),
        ("mqar vocab_size=8", "n_pairs = 4: at most 3 are needed, the keys that vocab_size = 8 has"),
        ("diffuse_mqar n_queries=17", "n_queries = 17: at most n_pairs = 16 is needed"),
        ("diffuse_mqar n_symbols=16", "n_pairs = 16: less than n_symbols = 16 is needed"),
        ("diffuse_mqar prefix_length=4", "prefix_length = 4: less than key_length = 4 is needed"),
        ("diffuse_mqar lags=[]", "lags = []: at least one is needed"),
        ("diffuse_mqar min_lag=7", "min_lag = 7: at least 8 is needed, the lag without noise"),
        (
            "diffuse_mqar lags=[512,600]",
            "lags = [512, 600]: at least 623 instead of 600 is needed, for some noise to fit",
        ),
        (
            "diffuse_mqar lags=[149]",
            "lags = [149]: at least 150 instead of 149 is needed, for some noise to fit",
        ),
        ("selective_copying length=15", "n_data = 16: at most length = 15 is needed"),
        ("induction_heads test_lengths=[64,2]", "test_lengths = [64, 2]: each must be at least 3"),
        ("mad_recall seq_len=31", "seq_len = 31: an even number is needed, for pairs"),
        (
            "mad_noisy_recall n_noise=30",
            "n_noise = 30: at most vocab_size - 4 = 28 is needed, for keys and values",
        ),
        (
            "mad_fuzzy_recall vocab_size=6",
            "vocab_size = 6: at least 7 is needed, since the tokens of a key or value differ",
        ),
        (
            "mad_fuzzy_recall seq_len=17",
            "seq_len = 17: at least 18 is needed, for three of the longest pairs",
        ),
        ("mad_selective_copying n_data=128", "n_data = 128: at most 127 is needed, for seq_len = 256"),
        ("mad_memorization seq_len=31", "seq_len = 31: an even number is needed, for pairs"),
        ("induction_heads seq_len=2", "seq_len = 2: expected at least 3"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(wrong, message):
    name, _, assignment = wrong.partition(" ")
    key, _, value = assignment.partition("=")
    with pytest.raises(ConfigError) as error:
        build_data({"name": name, key: eval(value)}, seed=0)
    assert str(error.value) == f"data.{message}"
