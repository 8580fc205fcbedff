"""Gradient times input and integrated gradients, against finite differences, naive sums and what must add up."""

import pytest
import torch

from mixerlab.lm.attribution.relevance import gradient_times_input, integrated_gradients, score
from small_decoders import decoder_of

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2])
TARGET, BASELINE = 6, 10


@torch.no_grad()
def centred_logit(decoder, ids, target=TARGET):
    logits = decoder(ids[None])[0, -1]
    return (logits[target] - logits.mean()).item()


@pytest.mark.parametrize("tied", [True, False])
def test_the_score_is_the_logit_less_the_mean_of_all(tied):
    decoder = decoder_of("attention", tie_embeddings=tied)
    found = gradient_times_input(decoder, IDS, TARGET)
    assert found.score == pytest.approx(centred_logit(decoder, IDS), abs=1e-12)


@pytest.mark.parametrize("mixer", ["attention", "sessa", "mamba", "mamba2", "gated_deltanet"])
def test_gradient_times_input_is_how_the_score_changes_with_the_size_of_an_embedding(mixer):
    decoder = decoder_of(mixer)
    x, step = decoder.embedding(IDS).detach(), 1e-5
    expected = []
    for position in range(len(IDS)):
        size = torch.zeros(len(IDS), 1, dtype=torch.float64)
        size[position] = step
        both = torch.stack([x * (1 + size), x * (1 - size)])
        with torch.no_grad():
            up, down = score(decoder, both, TARGET)
        expected.append((up - down) / (2 * step))
    found = gradient_times_input(decoder, IDS, TARGET)
    torch.testing.assert_close(found.tokens, torch.stack(expected), rtol=1e-6, atol=1e-8)
    assert found.rest == 0


@pytest.mark.parametrize(
    ("mixer", "steps"),
    [("attention", 128), ("sessa", 128), ("mamba", 128), ("mamba2", 128), ("gated_deltanet", 2048)],
)
def test_integrated_gradients_add_up_to_the_difference_from_the_baseline(mixer, steps):
    """Gated DeltaNet gives its keys unit length, which turn quickly where the way passes near 0."""
    decoder = decoder_of(mixer)
    found = integrated_gradients(decoder, IDS, TARGET, BASELINE, steps)
    assert found.rest == pytest.approx(centred_logit(decoder, torch.full_like(IDS, BASELINE)), abs=1e-12)
    assert found.score == pytest.approx(centred_logit(decoder, IDS), abs=1e-12)
    assert abs(found.gap) < 1e-6
    assert abs(integrated_gradients(decoder, IDS, TARGET, BASELINE, steps=2).gap) > 1e-4, "too few steps"


def test_integrated_gradients_are_the_mean_of_gradients_along_the_way():
    decoder = decoder_of("sessa")
    x = decoder.embedding(IDS).detach()
    way = x - decoder.embedding.weight[BASELINE].detach()
    steps, total = 1000, torch.zeros_like(x)
    for i in range(steps):
        point = (x - (1 - (i + 0.5) / steps) * way).requires_grad_()
        total += torch.autograd.grad(score(decoder, point[None], TARGET)[0], point)[0] / steps
    found = integrated_gradients(decoder, IDS, TARGET, BASELINE, steps=128)
    torch.testing.assert_close(found.tokens, (total * way).sum(-1), rtol=1e-3, atol=1e-5)


def test_a_token_that_is_the_baselines_counts_for_nothing():
    decoder = decoder_of("attention")
    found = integrated_gradients(decoder, IDS, TARGET, baseline=9)
    assert found.tokens[5] == 0
    assert (found.tokens[[0, 1, 2, 3, 4, 6]] != 0).all()
