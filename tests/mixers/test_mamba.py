"""The Mamba mixer against the published implementation, and its initialisation against the paper's."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from mixerlab.lm.model.decoder import Decoder, spared_parameters
from mixerlab.mixers import build_mixer

GOLDEN = Path(__file__).parents[1] / "golden" / "mamba_mixer.safetensors"


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_equals_the_published_mixer_with_all_gradients(backend):
    with safe_open(GOLDEN, "pt") as file:
        hyper = json.loads(file.metadata()["basic"])
        golden = {key.removeprefix("basic/"): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    options = {
        "d_state": hyper["state_size"],
        "expand": hyper["expand"],
        "d_conv": hyper["conv_kernel"],
        "dt_rank": hyper["time_step_rank"],
        "conv_bias": hyper["use_conv_bias"],
        "bias": hyper["use_bias"],
    }
    mixer = build_mixer({"name": "mamba", **options, "backend": backend}, hyper["hidden_size"]).double()
    mixer.load_state_dict(
        {k.removeprefix("weight/"): v for k, v in golden.items() if k.startswith("weight/")}
    )

    x = golden["x"].requires_grad_()
    y = mixer(x)
    (y * golden["grad_y"]).sum().backward()
    compared = {"y": (y.detach(), golden["y"]), "grad/x": (x.grad, golden["grad/x"])}
    compared |= {f"grad/{name}": (p.grad, golden[f"grad/{name}"]) for name, p in mixer.named_parameters()}
    assert {k for k in golden if k.startswith("grad/")} == set(compared) - {"y"}
    for name, (ours, published) in compared.items():
        difference = (ours - published).norm() / published.norm()
        assert difference <= 2e-6, f"{name}: {difference:.3g}"


def test_initialisation_is_that_of_the_paper():
    torch.manual_seed(0)
    mixer = build_mixer({"name": "mamba", "d_state": 8}, 200)
    assert mixer.dt_rank == math.ceil(200 / 16)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 9.0).expand(400, 8))
    assert (mixer.D == 1).all()
    bound = mixer.dt_rank**-0.5
    assert mixer.dt_proj.weight.abs().max() <= bound
    torch.testing.assert_close(mixer.dt_proj.weight.std(), torch.tensor(bound / 3**0.5), rtol=0.05, atol=0)
    log_dt = F.softplus(mixer.dt_proj.bias.detach()).log10()  # uniform in [-3, -1]
    assert log_dt.min() > -3.001
    assert log_dt.max() < -0.999
    torch.testing.assert_close(log_dt.mean(), torch.tensor(-2.0), rtol=0, atol=0.1)
    torch.testing.assert_close(log_dt.std(), torch.tensor(2 / 12**0.5), rtol=0.1, atol=0)


def test_a_decoder_leaves_steps_to_the_mixer():
    """It draws linear maps anew, the step projection among them, and zeroes their biases."""
    decoder = Decoder(11, d_model=32, n_layers=1, mixer="mamba")
    decoder.initialize(0)
    mixer = decoder.layers[0].mixer
    steps = F.softplus(mixer.dt_proj.bias.detach())
    assert 0.00099 < steps.min() < steps.max() < 0.101
    assert mixer.dt_proj.weight.std() > 0.3  # uniform within 2 ** -0.5; init_std would be 0.02


@pytest.mark.parametrize("spared", ["no_decay", "keep_float32"])
def test_weight_decay_and_low_precision_spare_rates_steps_and_skips(spared):
    mixer = build_mixer("mamba", 32)
    assert spared_parameters(mixer, spared) == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}


def test_the_ssm_state_is_float32_even_in_a_bf16_model():
    mixer = build_mixer("mamba", 32)
    x = torch.randn(2, 30, 32)
    with torch.no_grad():
        expected = mixer(x)
        state = mixer.init_state(2, 30, dtype=torch.bfloat16)
        outputs = []
        with torch.autocast("cpu", torch.bfloat16):
            for piece in x.split([1, 20, 9], dim=1):
                y, state = mixer.extend(piece, state)
                outputs.append(y)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    error = (torch.cat(outputs, dim=1).float() - expected).norm() / expected.norm()
    assert error < 0.02, f"relative error {error:.3g}"


def test_the_state_does_not_grow_with_the_sequence():
    mixer = build_mixer("mamba", 32)
    assert (
        mixer.state_bytes(10, torch.float32) == mixer.state_bytes(10**6, torch.float32) == 64 * (3 + 16) * 4
    )


def test_a_kernel_of_one_position_has_no_tail():
    mixer = build_mixer({"name": "mamba", "d_conv": 1}, 16).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        first, state = mixer.extend(x[:, :4], mixer.init_state(1, 6, dtype=torch.float64))
        second, _ = mixer.extend(x[:, 4:], state)
        torch.testing.assert_close(torch.cat((first, second), dim=1), mixer(x))
