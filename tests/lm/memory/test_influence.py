"""The laws of the paper measured on our mixers, stacked solves, and norms of Jacobians."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from measure import peak_bytes
from mixerlab.kernels.feedback import feedback_attention
from mixerlab.lm.memory.curves import by_lag, lag_curve
from mixerlab.lm.memory.fits import fit, fit_points
from mixerlab.lm.memory.influence import fixed_influence, jacobian_norms, mixer_inputs
from mixerlab.lm.model.decoder import Decoder
from mixerlab.mixers import MIXERS, Mixer, build_mixer
from mixerlab.mixers.mamba2 import Mamba2, Mamba2Config
from mixerlab.mixers.testing import double, inputs

T = 4097


@cache
def log_gammas(shift):
    """log Gamma(n + shift) for n from 0 to T."""
    return np.array([math.lgamma(n + shift) if n + shift > 0 else 0.0 for n in range(T + 1)])


def closed_form(gain, tau, longest):
    """Response at lags 1 to `longest` to an impulse in f at tau, under uniform routing (docs/sessa.md)."""
    at = tau + np.arange(1, longest + 1)
    source = log_gammas(1)[tau] - log_gammas(1 + gain)[tau]
    return gain * np.exp(source + log_gammas(gain)[at] - log_gammas(1)[at])


def uniform_sessa(gain, d_model=8):
    """A Sessa mixer whose two branches route evenly, with one gain everywhere."""
    mixer = build_mixer({"name": "sessa", "n_heads": 1}, d_model).double()
    for projection in (mixer.q_proj, mixer.proj_fb, mixer.gamma_ctx):
        for parameter in projection.parameters():
            parameter.data.zero_()
    mixer.gamma_bias.data.fill_(math.atanh(gain / 0.999))
    return mixer


def influence_of(mixer, x, sources):
    influence = fixed_influence(mixer, x, sources)
    assert influence is not None
    return influence[0]


class Solve(Mixer):
    """The feedback solve alone, with uniform routing: s = (I - B)^-1 f, `depth` times."""

    def __init__(self, gain: float, depth: int = 1, compensated: bool = False):
        super().__init__()
        self.gain, self.depth, self.compensated = gain, depth, compensated

    def mix_fixed(self, x, values, segment_ids=None):
        zeros = x.new_zeros(x.shape[0], 1, x.shape[1], 1)
        gamma = torch.full(zeros.shape[:3], self.gain, dtype=x.dtype)
        weight = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None] ** self.gain
        for _ in range(self.depth):
            f = values[:, None] if values.ndim == 3 else values
            values = feedback_attention(zeros, zeros, f * weight if self.compensated else f, gamma)
        return values


@pytest.mark.parametrize("gain", [0.1, 0.5, 0.9])
def test_the_solve_under_uniform_routing_has_the_closed_form_and_its_exponent(gain):
    sources = [0, 1, 17, 1000]
    influence = influence_of(Solve(gain), inputs(1, T, 1), sources).numpy()
    for c, tau in enumerate(sources):
        np.testing.assert_allclose(influence[tau + 1 :, c], closed_form(gain, tau, T - 1 - tau), rtol=1e-6)
    curve = lag_curve("", "", np.arange(1.0, T), influence[None, 1:, 0])
    found = fit(curve)
    assert found.winner.name == "power law"
    assert found.winner.exponent == pytest.approx(1 - gain, abs=0.02)


@pytest.mark.parametrize("gain", [0.1, 0.5, 0.9])
def test_sessa_under_uniform_routing_has_the_closed_form_of_both_branches(gain):
    influence = influence_of(uniform_sessa(gain), inputs(1, T, 8), [0, 30]).numpy()
    # Attention gives f_j = 1 / (j + 1) from tau on; each of them is answered by the solve.
    for c, tau in enumerate([0, 30]):
        f = 1 / np.arange(tau + 1, T + 1)
        expected = f.copy()
        for j, value in enumerate(f[:-1]):
            expected[j + 1 :] += value * closed_form(gain, tau + j, T - 1 - tau - j)
        np.testing.assert_allclose(influence[tau:, c], expected, rtol=1e-6)
    found = fit(lag_curve("", "", np.arange(1.0, T), influence[None, 1:, 0]))
    assert found.winner.name == "power law"
    assert found.winner.exponent == pytest.approx(1 - gain, abs=0.02)


def test_attention_without_queries_falls_as_one_over_the_position():
    mixer = build_mixer({"name": "attention", "n_heads": 2}, 8).double()
    mixer.q_proj.weight.data.zero_()
    influence = influence_of(mixer, inputs(1, T, 8), [0, 100])
    expected = 1 / torch.arange(1, T + 1, dtype=torch.float64)
    torch.testing.assert_close(influence[:, 0], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(influence[100:, 1], expected[100:], rtol=1e-13, atol=0)
    found = fit(lag_curve("", "", np.arange(1.0, T), influence[None, 1:, 0].numpy()))
    assert found.winner.name == "power law"
    assert found.winner.exponent == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("step", [1e-3, 0.02])
def test_mamba2_with_constant_steps_has_its_exponential_rate(step):
    mixer = Mamba2(Mamba2Config(), 8).double()
    mixer.dt_bias.data.fill_(step + math.log(-math.expm1(-step)))
    mixer.in_proj.weight.data[-mixer.n_heads :].zero_()  # steps do not depend on the input
    mixer.A_log.data.fill_(math.log(3.0))
    x = inputs(1, 1, 8).expand(1, T, 8)  # nor do B and C on the position
    influence = fixed_influence(mixer, x, list(range(4, 8)))
    found = fit(lag_curve("", "", np.arange(1.0, T - 7), by_lag(influence, list(range(4, 8)))))
    assert found.winner.name == "exponential"
    assert -found.winner.slope == pytest.approx(3 * step, rel=0.01)


@pytest.mark.parametrize("depth", [2, 3])
def test_stacked_solves_have_the_product_of_the_matrices_and_decay_more_slowly(depth):
    gain, time = 0.5, 600
    one, stacked = (influence_of(Solve(gain, k), inputs(1, time, 1), list(range(time))) for k in (1, depth))
    torch.testing.assert_close(stacked, torch.linalg.matrix_power(one, depth), rtol=1e-6, atol=1e-12)
    tails = [
        fit_points(np.arange(64.0, time), x[64:, 0].numpy()).laws["power law"].exponent
        for x in (one, stacked)
    ]
    assert tails[1] < tails[0] - 0.02


@pytest.mark.parametrize(("depth", "gain"), [(1, 0.5), (2, 0.5), (2, 0.3), (3, 0.3)])
def test_with_the_source_weighting_compensated_the_tail_follows_the_papers_exponent(depth, gain):
    mixer = Solve(gain, depth, compensated=True)
    influence = influence_of(mixer, inputs(1, T, 1), [0])[1:, 0].numpy()
    found = fit(lag_curve("", "", np.arange(1.0, T), influence[None]))
    beta = 1 - gain
    assert found.laws["power law"].slope == pytest.approx(depth * (1 - beta) - 1, abs=0.05)


def jacobian_of(mixer, x, t):
    return torch.autograd.functional.jacobian(lambda y: mixer(y[None])[0, t], x)  # (D, T, D)


@pytest.mark.parametrize("name", MIXERS.registered())
def test_norms_with_as_many_projections_as_features_are_exact(name):
    mixer = double(lambda d: build_mixer(name, d), 8)
    x, t = inputs(1, 12, 8)[0], 9
    exact = jacobian_norms(mixer, x, t, 8, torch.Generator())
    expected = jacobian_of(mixer, x, t).square().sum((0, 2)).sqrt()[: t + 1]
    torch.testing.assert_close(exact.norms, expected, rtol=1e-9, atol=1e-12)
    assert (exact.error == 0).all()


@pytest.mark.parametrize("name", ["sessa", "mamba2", "attention"])
def test_projections_agree_with_exact_norms_within_their_error(name):
    mixer = double(lambda d: build_mixer(name, d), 16)
    x, t = inputs(1, 12, 16)[0], 9
    exact = jacobian_norms(mixer, x, t, 16, torch.Generator()).norms
    estimates = [jacobian_norms(mixer, x, t, 8, torch.Generator().manual_seed(seed)) for seed in range(100)]
    norms, errors = (torch.stack([getattr(e, name) for e in estimates]) for name in ("norms", "error"))
    within = ((norms - exact).abs() <= errors * norms).sum(0)
    assert (within >= 95).all(), within
    # Nor is it wider than the spread of the estimates asks for.
    spread = (norms / exact).log().std(0)
    assert (errors.median(0).values < 2.0 * 2.576 * spread).all(), errors.median(0).values / spread


def test_each_mixer_gets_what_the_blocks_before_it_made():
    decoder = Decoder(11, d_model=8, n_layers=2, mixer="identity", block="transformer").eval()
    ids = torch.arange(6)[None]
    first, second = mixer_inputs(decoder, ids)
    x = decoder.embedding(ids)
    torch.testing.assert_close(first, decoder.layers[0].norm(x))
    torch.testing.assert_close(second, decoder.layers[1].norm(decoder.layers[0](x)))
    assert not decoder.layers[0].mixer._forward_pre_hooks


@pytest.mark.parametrize("name", ["attention", "sessa", "mamba", "mamba2"])
def test_memory_of_norms_grows_with_the_length_and_not_its_square(name, tmp_path):
    mixer = build_mixer(name, 16)

    def peak(time, projections=2):
        x = inputs(1, time, 16)[0].float()
        return peak_bytes(
            lambda: jacobian_norms(mixer, x, time - 1, projections, torch.Generator()), tmp_path
        )

    assert peak(4096) < 3 * peak(2048)
    assert peak(4096, projections=8) < 2.5 * peak(4096), "all projections are in memory together"


@pytest.mark.parametrize("name", ["attention", "sessa", "deltaformer", "mamba", "mamba2", "gated_deltanet"])
def test_memory_of_columns_grows_with_the_length_and_not_its_square(name, tmp_path):
    mixer = build_mixer(name, 32)

    def peak(time):
        x = inputs(1, time, 32).float()
        return peak_bytes(lambda: fixed_influence(mixer, x, [1, 2, 3]), tmp_path)

    assert peak(4096) < 3 * peak(2048)
