"""MambaLRP: the same values, relevance that is conserved, and one layer written out as a loop."""

import pytest
import torch

from mixerlab.lm.attribution.mamba_lrp import _mix, mamba_lrp, other_mixers
from mixerlab.lm.attribution.relevance import gradient_times_input
from mixerlab.mixers import MIXERS
from mixerlab.mixers.mamba import Mamba, MambaConfig
from small_decoders import decoder_of

IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
TARGET = 7


def mamba_of(**options):
    return decoder_of(**{"mixer": {"name": "mamba", "d_state": 4, "bias": True}, "n_layers": 3, **options})


SHAPES = [
    {},
    {"norm": "rmsnorm"},
    {"block": "transformer", "mlp": "none"},
    {"block": "transformer", "mlp": "swiglu", "norm": "rmsnorm"},
    {"block": "transformer", "mlp": "gelu"},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_the_values_are_those_of_the_decoder_and_relevance_is_conserved(options):
    decoder = mamba_of(**options)
    with torch.no_grad():
        logits = decoder(IDS[None])[0, -1]
    found = mamba_lrp(decoder, IDS, TARGET)
    assert found.score == pytest.approx((logits[TARGET] - logits.mean()).item(), abs=1e-10)
    assert abs(found.gap) < 1e-10
    assert found.rest != 0, "the biases have a share"
    plain = gradient_times_input(decoder, IDS, TARGET)
    assert abs(plain.score - found.rest - plain.tokens.sum()) > 1e-3, "without the rules it is not conserved"


def test_relevance_is_conserved_in_float32_too():
    found = mamba_lrp(mamba_of().float(), IDS, TARGET)
    scale = float(found.tokens.abs().sum()) + abs(found.rest)
    assert abs(found.gap) < 1e-5 * scale


def test_one_mixer_has_the_relevance_of_the_rules_written_out():
    """Half of it through the scan and half through the gate; each term is a product of numbers that are held."""
    decoder = decoder_of({"name": "mamba", "d_state": 4, "conv_bias": True}, n_layers=1)
    mixer = decoder.layers[0].mixer
    generator = torch.Generator().manual_seed(2)
    x, v = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (6, 1))
    leaf = x[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_mix(decoder.layers[0], leaf)[0, -1] @ v[0], leaf)
    found = (gradient[0] * x).sum(-1)

    with torch.no_grad():
        t, inner = len(x) - 1, mixer.inner
        inputs, z = mixer.in_proj(x).chunk(2, dim=-1)  # (T, E) each
        taps, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias  # (E, W), (E,)
        width = taps.shape[1]
        kernel = mixer.mix_fixed(x[None], torch.eye(len(x), dtype=torch.float64)[None])[0]  # (E, T, T)
        weight = v[0] @ mixer.out_proj.weight  # (E,)
        gate = z[t] * z[t].sigmoid()
        expected = torch.zeros(len(x), dtype=torch.float64)
        scanned = torch.zeros(inner, dtype=torch.float64)
        for s in range(len(x)):
            parts = {  # what each input position brings to the convolution at s
                tau: taps[:, width - 1 - (s - tau)] * inputs[tau]
                for tau in range(max(0, s - width + 1), s + 1)
            }
            convolved = sum(parts.values()) + bias
            scanned += kernel[:, t, s] * convolved * convolved.sigmoid()
            for tau, part in parts.items():
                expected[tau] += (weight * gate * kernel[:, t, s] * convolved.sigmoid() * part).sum() / 2
        expected[t] += (weight * scanned * gate).sum() / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_mixers_that_are_not_mamba_are_named_as_in_the_recipe(monkeypatch):
    class Backwards(Mamba):
        def forward(self, x, segment_ids=None):
            return super().forward(x.flip(1), segment_ids).flip(1)

    monkeypatch.setitem(MIXERS._entries, "my_mamba", (MambaConfig, Backwards))
    assert other_mixers(mamba_of(), ["mamba"]) == []
    names = ["mamba", "gated_deltanet", "my_mamba"]
    assert other_mixers(decoder_of(names, n_layers=3), names) == ["gated_deltanet", "my_mamba"]
    assert other_mixers(decoder_of(names, n_layers=2), names) == ["gated_deltanet"], "of those in the layers"
