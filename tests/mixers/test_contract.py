"""Every mixer of ours, with its defaults and with options that change what it does, keeps the contract.

Those that are imported when they are named, as fla's layers, have tests of their own.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixerlab.mixers import MIXERS, build_mixer
from mixerlab.mixers.identity import Identity, IdentityConfig
from mixerlab.mixers.mixer import Contract
from mixerlab.mixers.testing import (
    CHECKS,
    check_compile,
    check_fixed_routing,
    check_flops,
    check_gradients,
    check_mixer,
    check_named_parameters,
    double,
    inputs,
)

VARIANTS: dict[str, dict] = {
    **{name: {"name": name} for name in MIXERS.registered()},
    "attention, grouped, normed": {"name": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "attention, wide heads": {"name": "attention", "n_heads": 3, "n_kv_heads": 1, "head_dim": 6},
    "attention, window": {"name": "attention", "n_heads": 2, "window": 4, "bias": True},
    "attention, no positions": {"name": "attention", "n_heads": 4, "n_kv_heads": 1, "rope": False},
    "mamba, options": {
        "name": "mamba",
        "d_state": 5,
        "expand": 3,
        "d_conv": 2,
        "conv_bias": False,
        "bias": True,
    },
    "sessa, many heads": {"name": "sessa", "n_heads": 4, "n_kv_heads": 2, "n_feedback_heads": 2},
    "sessa, reference": {"name": "sessa", "backend": "reference"},
    "mamba2, grouped": {
        "name": "mamba2",
        "head_dim": 4,
        "n_groups": 2,
        "dt_limit": (0.01, 0.9),
        "bias": True,
    },
    "gated deltanet, options": {
        "name": "gated_deltanet",
        "n_heads": 2,
        "head_dim": 3,
        "expand_v": 1,
        "d_conv": 2,
        "backend": "reference",
    },
    "deltaformer, grouped, normed": {
        "name": "deltaformer",
        "n_heads": 4,
        "n_kv_heads": 2,
        "qk_norm": True,
    },
    "deltaformer, no positions": {"name": "deltaformer", "rope": False, "backend": "reference"},
    "sessa, no feedback": {"name": "sessa", "feedback": False},
    "parallel, others": {"name": "parallel", "mixers": ["sessa", {"name": "mamba", "d_state": 5}]},
    "parallel, nested": {
        "name": "parallel",
        "mixers": [{"name": "parallel", "mixers": ["attention", "attention"]}, "identity"],
    },
    "selective attention, window": {"name": "selective_attention", "n_heads": 2, "window": 4},
    "selective attention, others": {
        "name": "selective_attention",
        "below": {"name": "attention", "n_heads": 4, "n_kv_heads": 1},
    },
    "selective attention, nested": {
        "name": "selective_attention",
        "below": {"name": "parallel", "mixers": ["identity", "sessa"]},
    },
}


CASES = [
    pytest.param(
        options,
        check,
        id=f"{name}-{check.__name__}",
        # Compiling takes long; each mixer with its defaults is enough for most days.
        marks=[pytest.mark.slow] if check is check_compile and "," in name else [],
    )
    for name, options in VARIANTS.items()
    for check in CHECKS
    # The counter sees the whole T x T of a windowed mask; test_attention counts its pairs.
    if not (check is check_flops and options.get("window"))
]


@pytest.mark.parametrize(("options", "check"), CASES)
def test_contract(options, check):
    check(lambda d_model: build_mixer(options, d_model))


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_brings_no_number_to_the_host(name):
    """As `int(length.max())` does, for which the host would wait for the device."""
    aten = torch.ops.aten

    class NoNumbers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (aten._local_scalar_dense.default, aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    mixer = build_mixer(VARIANTS[name], 16)
    state = mixer.init_state(2, 12)
    with torch.no_grad(), NoNumbers():
        for new in (5, 1, 3, 1):
            _, state = mixer.extend(torch.zeros(2, new, 16), state)
    assert state.length.tolist() == [state.longest] * 2 == [10, 10]


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v["name"] == "selective_attention"])
def test_the_inputs_of_the_contract_make_some_positions_attend_and_some_not(name):
    mixer = double(lambda d_model: build_mixer(VARIANTS[name], d_model))
    assert 0.15 < mixer.diagnostics(inputs())["attending"].mean() < 0.85
    small = double(lambda d_model: build_mixer(VARIANTS[name], d_model), d_model=8)  # that of check_gradients
    assert 0 < small.diagnostics(inputs(batch=1, time=5, d_model=8))["attending"].mean() < 1


def test_a_failing_check_is_named():
    class Leaky(Identity):
        def forward(self, x, segment_ids=None):
            return x + x.mean(dim=1, keepdim=True)

    def factory(d_model):
        return Leaky(IdentityConfig(), d_model)

    with pytest.raises(AssertionError, match="check_causality"):
        check_mixer(factory)


@pytest.mark.parametrize(
    "mix_fixed",
    [
        lambda x, values: values,
        lambda x, values: values[:, None] + 1,
        lambda x, values: values[:, None].square(),
        lambda x, values: values[:, None] * x.mean((1, 2))[:, None, None, None],
        lambda x, values: values[:, None].cumsum(2),
    ],
    ids=["without heads", "with a constant", "not linear", "routed by the future", "from other positions"],
)
def test_what_mix_fixed_must_not_do_is_found(mix_fixed):
    mixer = Identity(IdentityConfig(), 8)
    mixer.mix_fixed = lambda x, values, segment_ids=None: mix_fixed(x, values)
    with pytest.raises(AssertionError):
        check_fixed_routing(lambda d_model: mixer)


class Rounding(Identity):
    """Its input times rounded factors, whose gradient is that of the factors unrounded."""

    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.factors = torch.nn.Parameter(torch.arange(d_model) / 2 + 0.1)

    def reset_parameters(self):
        torch.nn.init.uniform_(self.factors)

    def forward(self, x, segment_ids=None):
        return x * (self.factors + (self.factors.round() - self.factors).detach())

    def extend(self, x, state):
        y, state = super().extend(x, state)
        return self(y), state


class DeclaredRounding(Rounding):
    surrogate = ("factors",)


class Around(Identity):
    """Another mixer inside a submodule."""

    def __init__(self, config, d_model, inner):
        super().__init__(config, d_model)
        self.inner = inner(config, d_model)

    def forward(self, x, segment_ids=None):
        return self.inner(x, segment_ids)

    def extend(self, x, state):
        return self.inner.extend(x, state)


class DeclaringAround(Around):
    surrogate = ("inner.factors",)


class MistakenAround(Around):
    surrogate = ("inner.factor",)


def test_a_surrogate_gradient_must_be_declared():
    config = IdentityConfig()
    for undeclared in (lambda d: Rounding(config, d), lambda d: Around(config, d, Rounding)):
        with pytest.raises(Exception, match="Jacobian mismatch"):
            check_gradients(undeclared)
    check_mixer(lambda d: DeclaredRounding(config, d))
    check_mixer(lambda d: Around(config, d, DeclaredRounding))
    check_mixer(lambda d: DeclaringAround(config, d, Rounding))
    with pytest.raises(AssertionError, match=r"names no parameter: \{'inner.factor'\}"):
        check_gradients(lambda d: MistakenAround(config, d, Rounding))


@pytest.mark.parametrize("attribute", ["no_decay", "keep_float32"])
def test_what_is_spared_must_be_a_parameter_of_the_mixers_own(attribute):
    config = IdentityConfig()
    right = type("Right", (Rounding,), {attribute: ("factors",)})
    wrong = type("Wrong", (Rounding,), {attribute: ("factor",)})
    nested = type("Nested", (Around,), {attribute: ("inner.factors",)})
    check_named_parameters(lambda d: right(config, d))
    for factory, name in (
        (lambda d: wrong(config, d), "factor"),
        (lambda d: Around(config, d, wrong), "factor"),
        (lambda d: nested(config, d, Rounding), "inner.factors"),
    ):
        with pytest.raises(AssertionError, match=rf"{attribute} of \w+ names no parameter: \{{'{name}'\}}"):
            check_named_parameters(factory)


def narrow(base, **promises):
    return type("Narrow", (base,), {"contract": Contract(dtype=torch.float32, tolerance=1e-5, **promises)})


def test_a_wrong_gradient_is_found_in_float32_too():
    config = IdentityConfig()
    with pytest.raises(AssertionError, match="relative error"):
        check_gradients(lambda d: narrow(Rounding)(config, d))
    check_mixer(lambda d: narrow(DeclaredRounding)(config, d))


def test_a_mixer_promises_no_more_than_it_declares():
    class Broken(Identity):
        def forward(self, x, segment_ids=None):
            torch._dynamo.graph_break()
            return super().forward(x, segment_ids)

        def flops(self, seq_len):
            return 1

    for check, promise in ((check_compile, "one_graph"), (check_flops, "counted_flops")):
        with pytest.raises(Exception, match=r"graph_break|1 != 0"):
            check(lambda d: Broken(IdentityConfig(), d))
        check(lambda d: narrow(Broken, **{promise: False})(IdentityConfig(), d))  # noqa: B023
