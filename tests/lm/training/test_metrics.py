"""Rates over labelled positions, against a plain loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerlab.lm.training.metrics import TokenMetrics, rates, token_sums

N_TOKENS = 11
TOKEN_BYTES = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 0])


def batch(seed, rows, time, share=0.7):
    """nll, correct and labels as a decoder gives them: nothing where there is no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(N_TOKENS, (rows, time), generator=generator)
    labels[torch.rand(rows, time, generator=generator) > share] = -100
    nll = torch.rand(rows, time, generator=generator) * 9
    correct = torch.rand(rows, time, generator=generator) > 0.5
    return nll.where(labels >= 0, 0), correct & (labels >= 0), labels


def plain_loop(batches):
    nll = n = hits = size = 0.0
    for nlls, corrects, labels in batches:
        for row in range(len(labels)):
            for t in range(labels.shape[1]):
                if (label := int(labels[row, t])) != -100:
                    nll += float(nlls[row, t])
                    n += 1
                    hits += bool(corrects[row, t])
                    size += int(TOKEN_BYTES[label])
    loss = nll / n
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "accuracy": hits / n,
        "bits_per_byte": nll / math.log(2) / size,
    }


@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_the_rates_are_those_of_a_plain_loop(shapes, seed):
    batches = [batch(seed + i, rows, time) for i, (rows, time) in enumerate(shapes)]
    batches.append(batch(seed, 2, 50))  # with some label
    metrics = TokenMetrics(TOKEN_BYTES)
    for part in batches:
        metrics.update(*part)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        plain_loop(batches)
    )


def test_without_text_there_are_no_bits_per_byte():
    metrics = TokenMetrics()
    metrics.update(*batch(0, 2, 9))
    assert list(metrics.compute()) == ["loss", "perplexity", "accuracy"]


def test_many_small_losses_are_summed_exactly():
    metrics = TokenMetrics()
    for _ in range(3):
        metrics.update(
            torch.full((1, 2**22), 1e-3),
            torch.zeros(1, 2**22, dtype=torch.bool),
            torch.zeros(1, 2**22).long(),
        )
    assert float(metrics.compute()["loss"]) == pytest.approx(float(torch.tensor(1e-3)), rel=1e-9)


def test_the_sums_of_parts_are_the_sums_of_all():
    parts = [batch(seed, 3, 9) for seed in range(3)]
    sums = torch.stack([token_sums(nll, hit, y, TOKEN_BYTES) for nll, hit, y in parts]).sum(0)
    assert sums.dtype == torch.float64
    found = {name: float(value) for name, value in rates(sums, has_bytes=True).items()}
    assert found == pytest.approx(plain_loop(parts))


def test_the_sums_hold_no_graph():
    nll, correct, labels = batch(0, 3, 9)
    assert not token_sums(nll.requires_grad_(), correct, labels, None).requires_grad


def test_a_reset_starts_anew():
    metrics, part = TokenMetrics(TOKEN_BYTES), batch(0, 3, 9)
    metrics.update(*batch(1, 3, 9))
    metrics.reset()
    metrics.update(*part)
    assert {name: float(value) for name, value in metrics.compute().items()} == pytest.approx(
        plain_loop([part])
    )
