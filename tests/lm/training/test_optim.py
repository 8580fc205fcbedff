"""The optimiser: what is decayed; learning-rate schedules at their corners."""

import pytest
import torch

from mixerlab.lm.model.decoder import Decoder, spared_parameters
from mixerlab.lm.recipe.schema import OptimConfig
from mixerlab.lm.training.optim import build_optimizer, lr_factor


def factors(**options):
    config = OptimConfig(warmup_steps=10, **options)
    return [lr_factor(step, 100, config) for step in range(101)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    rates = factors(schedule=schedule)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1)


def test_cosine_falls_to_the_final_ratio_half_way_at_the_mean():
    rates = factors(schedule="cosine", final_lr_ratio=0.2)
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_wsd_is_flat_then_falls_linearly():
    rates = factors(schedule="wsd", decay_fraction=0.4, final_lr_ratio=0.0)
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0


def test_constant_stays():
    assert factors(schedule="constant")[10:] == [1.0] * 91


def test_norms_biases_and_gains_are_not_decayed():
    mixers = ["sessa", {"name": "attention", "qk_norm": True}]
    decoder = Decoder(50, d_model=16, n_layers=3, mixer=mixers, block="transformer", mlp_dim=24)
    decoder.initialize(0)
    optimizer = build_optimizer(decoder, OptimConfig(weight_decay=0.5, lr=0.1))
    names = {id(p): name for name, p in decoder.named_parameters()}
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # with no gradient, weight decay alone moves anything
    decayed = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    not_decayed = set(names.values()) - decayed
    zero = {name for name in not_decayed if not before[name].any()}  # decaying zeros shows nothing
    assert "blocks.0.mixer.gamma_bias" in not_decayed
    assert "blocks.1.mixer.q_norm.weight" in not_decayed
    assert "blocks.0.norm.weight" in not_decayed
    assert "norm.weight" in not_decayed
    assert all(before[name].ndim == 2 for name in decayed)
    assert all(before[name].ndim == 1 for name in not_decayed)
    assert zero <= spared_parameters(decoder, "no_decay"), (
        "biases start at zero, and are in the group without decay"
    )
    groups = {
        names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name for name, decay in groups.items() if decay == 0} == spared_parameters(decoder, "no_decay")
    assert set(groups) == set(before), "every parameter is in one group"


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_warm_up_the_peak_comes_first(schedule):
    config = OptimConfig(warmup_steps=0, schedule=schedule)
    assert lr_factor(0, 100, config) == 1
    assert lr_factor(0, 1, config) > 0
