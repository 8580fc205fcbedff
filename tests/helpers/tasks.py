"""Rows of synthetic tasks, and whether counts are those of a distribution."""

from typing import Any

import numpy as np

from mixerlab.data import build_data


def rows(name, split="train", n=20_000, **options):
    """input_ids and labels of the first rows of a dataset, (n, T) each."""
    data: Any = build_data({"name": name, **options}, 0)
    datasets = {"train": data.train_dataset(), **data.val_datasets()}
    input_ids, labels = datasets[split].batch(range(n))
    return input_ids.numpy(), labels.numpy()


def within_sampling_error(counts, expected, sigmas=5.0):
    """Whether counts (..., cells) are those of a multinomial with these expectations, each cell within 5 sigma."""
    counts, expected = np.broadcast_arrays(np.asarray(counts, float), expected)
    total = expected.sum(axis=-1, keepdims=True)
    assert np.allclose(counts.sum(axis=-1, keepdims=True), total), "they do not have the same sum"
    sigma = np.sqrt(expected * (1 - expected / total))
    return bool((abs(counts - expected) <= sigmas * sigma + 1e-9).all())
