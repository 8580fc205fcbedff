"""The Sessa mixer against the published layer and against what the mathematics says of it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mixerlab.lm.model.blocks import GatedBlock
from mixerlab.mixers import build_mixer

GOLDEN = Path(__file__).parents[1] / "golden" / "sessa_layer.safetensors"
NAMES = {"ln": "norm", "W_in": "in_proj", "W_out": "out_proj"}


def golden_cases():
    with safe_open(GOLDEN, "pt") as file:
        return {name: json.loads(text) for name, text in sorted(file.metadata().items())}


def ours(name):
    first, _, rest = name.partition(".")
    return f"{NAMES.get(first, first)}.{rest}"


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", golden_cases())
def test_layer_equals_the_published_one_with_all_gradients(case, backend):
    hyper = golden_cases()[case]
    with safe_open(GOLDEN, "pt") as file:
        golden = {
            key.removeprefix(case + "/"): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118  (a safetensors file is no mapping)
            if key.startswith(case + "/")
        }
    options = {key: hyper[key] for key in ("n_heads", "n_kv_heads", "rope", "gamma_max")}
    mixer = build_mixer({"name": "sessa", **options, "backend": backend}, hyper["d_model"])
    block = GatedBlock(mixer, hyper["d_model"], "layernorm", dropout=0.0).double()
    published = {ours(k.removeprefix("weight/")): v for k, v in golden.items() if k.startswith("weight/")}
    assert published["mixer.gamma_bias"].shape == ()  # as published; the load hook gives it a dimension
    block.load_state_dict(published)

    x = golden["x"].clone().requires_grad_()
    y = block(x)
    (y * golden["grad_y"]).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    compared = {"y": (y.detach(), golden["y"]), "x": (x.grad, golden["grad/x"])}
    for key, value in golden.items():
        if key.startswith("grad/") and key != "grad/x":
            name = ours(key.removeprefix("grad/"))
            compared[name] = (gradients.pop(name).reshape(value.shape), value)
    assert not gradients, "every parameter has a published gradient"
    for name, (mine, reference) in compared.items():
        difference = (mine - reference).norm()
        assert difference <= 1e-6 * reference.norm() + 1e-12, f"{name}: {difference / reference.norm():.3g}"


def test_gains_stay_below_their_bound_in_bf16():
    mixer = build_mixer({"name": "sessa"}, 32)
    with torch.no_grad():
        mixer.gamma_bias.fill_(20)  # tanh rounds to 1, and bf16 would round 0.999 to 1 too
    with torch.autocast("cpu", torch.bfloat16):
        gamma = mixer.diagnostics(torch.randn(1, 9, 32))["gamma"]
    assert gamma.dtype == torch.float32
    assert gamma.max() <= 0.999


def test_without_feedback_it_is_the_forward_branch_alone():
    with_feedback = build_mixer({"name": "sessa", "n_heads": 2}, 32)
    without = build_mixer({"name": "sessa", "n_heads": 2, "feedback": False}, 32)
    without.load_state_dict(with_feedback.state_dict(), strict=False)
    with torch.no_grad():
        with_feedback.gamma_ctx.weight.zero_()
        with_feedback.gamma_bias.zero_()  # a gain of 0: s = f
    x = torch.randn(2, 10, 32)
    torch.testing.assert_close(with_feedback(x), without(x))


def test_diagnostics_watch_gain_and_entropy():
    mixer = build_mixer({"name": "sessa", "n_feedback_heads": 2}, 32)
    values = mixer.diagnostics(torch.randn(3, 10, 32))
    assert set(values) == {"gamma", "feedback_entropy"}
    assert values["gamma"].shape == values["feedback_entropy"].shape == (3, 2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads = 5: it must divide model.d_model = 32; nearest: 4"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3: it must divide n_heads = 4; valid: 1, 2, 4"),
        ({"n_feedback_heads": 3}, "n_feedback_heads = 3"),
        ({"n_head": 4}, "did you mean 'n_heads'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_mixer({"name": "sessa", **options}, 32)
