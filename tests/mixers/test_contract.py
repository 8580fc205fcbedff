"""Every registered mixer, with its defaults and with options that change what it does, keeps the contract."""

import pytest

from mixers import build_mixer, mixer_names
from mixers.identity import Identity, IdentityConfig
from mixers.testing import CHECKS, check_flops, check_mixer

VARIANTS: dict[str, dict] = {
    **{name: {"name": name} for name in mixer_names()},
    "attention, grouped, normed": {"name": "attention", "n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
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
        "head_width": 4,
        "n_groups": 2,
        "dt_limit": (0.01, 0.9),
        "bias": True,
    },
    "sessa, no feedback": {"name": "sessa", "feedback": False},
}


CASES = [
    pytest.param(options, check, id=f"{name}-{check.__name__}")
    for name, options in VARIANTS.items()
    for check in CHECKS
    # The counter sees the whole T x T of a windowed mask; test_attention counts its pairs.
    if not (check is check_flops and options.get("window"))
]


@pytest.mark.parametrize(("options", "check"), CASES)
def test_contract(options, check):
    check(lambda d_model: build_mixer(options, d_model))


def test_a_failing_check_is_named():
    class Leaky(Identity):
        def forward(self, x, segment_ids=None):
            return x + x.mean(dim=1, keepdim=True)

    def factory(d_model):
        return Leaky(IdentityConfig(), d_model)

    with pytest.raises(AssertionError, match="check_causality"):
        check_mixer(factory)
