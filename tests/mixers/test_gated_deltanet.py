"""The Gated DeltaNet mixer against the layer that transformers has for Qwen3-Next, and what it says of itself."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mixerlab.lm.model.decoder import spared_parameters
from mixerlab.mixers import build_mixer
from mixerlab.mixers.gated_deltanet import GatedDeltaNet

WIDTH, HEADS, KEY, VALUE = 24, 3, 6, 12


def by_heads(theirs):
    """Its projections, whose rows lie head by head, in our order: q, k, v, z, b, dt."""
    heads = theirs.in_proj_qkvz.weight.unflatten(0, (HEADS, -1))
    wide = [part.flatten(0, 1) for part in heads.split((KEY, KEY, VALUE, VALUE), dim=1)]
    return torch.cat([*wide, *theirs.in_proj_ba.weight.unflatten(0, (HEADS, 2)).unbind(1)])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_the_layer_of_qwen3_next_with_all_gradients(backend, monkeypatch):
    # Where fla is installed, transformers would take its kernels on a CPU too, and fla the name of its Mamba.
    monkeypatch.setitem(sys.modules, "fla", None)
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    # Its queries are divided by the root of K. The norm takes that out of the output, and out of its epsilon.
    options = {"n_heads": HEADS, "head_dim": KEY, "norm_eps": KEY * 1e-5, "backend": backend}
    ours = build_mixer({"name": "gated_deltanet", **options}, WIDTH)
    with torch.no_grad():
        theirs.dt_bias.normal_()
        theirs.norm.weight.normal_()
        ours.in_proj.weight.copy_(by_heads(theirs))
        for name in ("conv1d.weight", "dt_bias", "A_log", "norm.weight", "out_proj.weight"):
            ours.get_parameter(name).copy_(theirs.get_parameter(name))

    x, cotangent = torch.randn(2, 2, 150, WIDTH)
    x.requires_grad_()
    shared = [name for name, _ in ours.named_parameters() if name != "in_proj.weight"]
    results = []
    for layer in (ours, theirs):
        y = layer(x)
        wanted = [x, *(layer.get_parameter(name) for name in shared)]
        results.append([y, *torch.autograd.grad(y, wanted, cotangent)])
    for name, mine, published in zip(["y", "x", *shared], *results, strict=True):
        error = (mine - published).norm() / published.norm()
        # Its running sums of log decays are float32; the gradients of steps and rates feel that.
        assert error <= (1e-4 if name in ("dt_bias", "A_log") else 5e-6), f"{name}: {error:.3g}"


def test_starts_as_mamba2_does():
    torch.manual_seed(0)
    mixer = build_mixer({"name": "gated_deltanet", "head_dim": 1, "n_heads": 1024}, 64)
    steps = F.softplus(mixer.dt_bias.detach().double())
    assert 0.99e-3 < steps.min() < 1.1e-3
    assert 0.09 < steps.max() < 0.1001
    assert abs((steps < 0.01).double().mean() - 0.5) < 0.06  # log-uniform
    rates = mixer.A_log.detach().double().exp()
    assert 1 <= rates.min() < 1.1
    assert 15.9 < rates.max() < 16.001
    assert abs(rates.mean() - 8.5) < 0.4  # uniform
    for spared in ("no_decay", "keep_float32"):
        assert spared_parameters(mixer, spared) == {"dt_bias", "A_log", "norm.weight"}


@pytest.mark.parametrize(
    ("options", "d_model", "heads", "width"),
    [
        ({}, 1024, 6, 128),
        ({}, 768, 9, 64),
        ({}, 32, 3, 8),
        ({}, 10, 7, 1),
        ({}, 1, 1, 1),
        ({"head_dim": 16}, 100, 4, 16),
        ({"head_dim": 64}, 32, 1, 64),
        ({"n_heads": 2}, 32, 2, 8),
        ({"n_heads": 5, "head_dim": 7}, 32, 5, 7),
    ],
)
def test_keys_take_three_quarters_of_the_width_where_nothing_else_is_said(options, d_model, heads, width):
    mixer = build_mixer({"name": "gated_deltanet", **options}, d_model)
    assert isinstance(mixer, GatedDeltaNet)
    assert (mixer.n_heads, mixer.head_dim, mixer.value_dim) == (heads, width, 2 * width)


def test_the_memory_stays_in_float32_under_bf16():
    mixer = build_mixer("gated_deltanet", 32)
    state = mixer.init_state(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(3):
            _, state = mixer.extend(torch.randn(2, 2, 32, dtype=torch.bfloat16), state)
    assert (state.conv.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)


def test_works_under_vmap_and_per_sample_gradients():
    mixer = build_mixer({"name": "gated_deltanet", "n_heads": 2, "head_dim": 3}, 8).double()
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    x = torch.randn(3, 70, 8, dtype=torch.float64)

    def loss(parameters, row):
        return torch.func.functional_call(mixer, parameters, (row[None],)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    mixer(x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(rows[name].sum(0), parameter.grad)
