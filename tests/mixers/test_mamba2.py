"""The Mamba-2 mixer against the published implementation and against what the paper says of it."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from mixerlab.lm.model.decoder import spared_parameters
from mixerlab.mixers import build_mixer
from mixerlab.mixers.mamba2 import Mamba2

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba2_mixer.safetensors"


def golden_cases():
    with safe_open(GOLDEN, "pt") as file:
        return {name: json.loads(text) for name, text in file.metadata().items()}


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", sorted(golden_cases()))
def test_equals_the_published_mixer_with_all_gradients(case, backend):
    hyper = golden_cases()[case]
    with safe_open(GOLDEN, "pt") as file:
        golden = {
            key.removeprefix(case + "/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118  (a safetensors file is no mapping)
            if key.startswith(case + "/")
        }
    options = {
        "expand": hyper["expand"],
        "d_state": hyper["state_size"],
        "head_dim": hyper["head_dim"],
        "n_groups": hyper["n_groups"],
        "d_conv": hyper["conv_kernel"],
        "norm_eps": hyper["layer_norm_epsilon"],
        "conv_bias": hyper["use_conv_bias"],
        "bias": hyper["use_bias"],
    }
    mixer = build_mixer({"name": "mamba2", **options, "backend": backend}, hyper["hidden_size"]).double()
    assert mixer.n_heads == hyper["num_heads"]
    mixer.load_state_dict(
        {k.removeprefix("weight/"): v for k, v in golden.items() if k.startswith("weight/")}
    )

    x = golden["x"].clone().requires_grad_()
    y = mixer(x)
    (y * golden["grad_y"]).sum().backward()
    compared = {"y": (y.detach(), golden["y"]), "x": (x.grad, golden["grad/x"])}
    for name, parameter in mixer.named_parameters():
        compared[name] = (parameter.grad, golden[f"grad/{name}"])
    for name, (ours, published) in compared.items():
        error = (ours - published).norm() / published.norm()
        assert error <= 2e-6, f"{name}: {error:.3g}"


def test_starts_as_the_original():
    torch.manual_seed(0)
    mixer = build_mixer({"name": "mamba2", "head_dim": 1}, 512)  # 1024 heads
    steps = F.softplus(mixer.dt_bias.detach().double())
    assert 0.99e-3 < steps.min() < 1.1e-3
    assert 0.09 < steps.max() < 0.1001
    # Log-uniform: as much between 0.001 and 0.01 as between 0.01 and 0.1.
    assert abs((steps < 0.01).double().mean() - 0.5) < 0.06
    rates = mixer.A_log.detach().double().exp()
    assert 1 <= rates.min() < 1.1
    assert 15.9 < rates.max() < 16.001
    assert abs(rates.mean() - 8.5) < 0.4  # uniform
    assert (mixer.D == 1).all()
    for spared in ("no_decay", "keep_float32"):
        expected = {"dt_bias", "A_log", "D", "norm.weight", "conv1d.bias"}
        assert spared_parameters(mixer, spared) == expected


def test_reset_draws_anew_and_the_seed_decides():
    mixer = build_mixer("mamba2", 64)
    assert isinstance(mixer, Mamba2)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        mixer.reset_parameters()
        drawn.append(torch.cat((mixer.dt_bias, mixer.A_log)).clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("d_model", "width"), [(8, 16), (32, 64), (64, 64), (96, 64), (36, 8), (9, 2)])
def test_a_head_is_as_wide_as_a_power_of_two_up_to_64_can_be(d_model, width):
    mixer = build_mixer("mamba2", d_model)
    assert mixer.head_dim == width
    assert mixer.n_heads * width == 2 * d_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 24}, r"head_dim = 24: it must divide expand \* model.d_model = 64"),
        ({"head_dim": 16, "n_groups": 3}, r"n_groups = 3: it must divide .* 64 / 16 = 4"),
        ({"dt_limit": (0.1, 0.01)}, r"dt_limit = \(0.1, 0.01\): it must be two numbers"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({"name": "mamba2", **options}, 32)


def test_steps_are_clamped_to_their_limits():
    """With both limits (nearly) the same, the projected step and its bias make no difference."""
    mixer = build_mixer({"name": "mamba2", "dt_limit": (0.05, math.nextafter(0.05, 1))}, 32).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    before = mixer(x)
    with torch.no_grad():
        mixer.dt_bias.add_(1)
    torch.testing.assert_close(mixer(x), before)


def test_the_norm_is_per_group_and_gated():
    mixer = build_mixer({"name": "mamba2", "n_groups": 2, "head_dim": 8}, 32).double()
    y, z = torch.randn(2, 3, 5, 64, dtype=torch.float64)
    normed = mixer.norm(y, z).unflatten(-1, (2, 32))
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3, 5, 2).double(), atol=1e-3, rtol=0)
    scaled = torch.cat((y[..., :32] * 7, y[..., 32:]), dim=-1)
    torch.testing.assert_close(mixer.norm(scaled, z)[..., 32:], mixer.norm(y, z)[..., 32:])
    assert (mixer.norm(y, torch.zeros_like(z)) == 0).all()


def test_the_ssm_state_stays_in_float32_under_bf16():
    mixer = build_mixer("mamba2", 32)
    state = mixer.init_state(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(3):
            _, state = mixer.extend(torch.randn(2, 2, 32, dtype=torch.bfloat16), state)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_works_under_vmap_and_per_sample_gradients():
    mixer = build_mixer({"name": "mamba2", "d_state": 4}, 8).double()
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    x = torch.randn(3, 70, 8, dtype=torch.float64)

    def loss(parameters, row):
        return torch.func.functional_call(mixer, parameters, (row[None],)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    mixer(x).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(rows[name].sum(0), parameter.grad)
