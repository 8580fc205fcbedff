"""Published architectures of mamba_ssm and transformers' Mamba as a recipe's model section."""

import json
import math

import pytest

from mixerlab.lm.exchange.layouts import read_model
from mixerlab.lm.exchange.published import Published
from mixerlab.options import ConfigError


@pytest.fixture
def read(tmp_path):
    """(model, V) of what config.json says, with these values."""

    def make(**values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return read_model(Published.read(path))[1:]

    return make


def test_what_is_not_said_has_the_defaults_of_transformers(read):
    model, vocab_size = read(model_type="mamba", hidden_size=24, num_hidden_layers=2, vocab_size=283)
    assert vocab_size == 283
    assert model == {
        "block": "transformer",
        "mlp": "none",
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "d_model": 24,
        "n_layers": 2,
        "tie_embeddings": True,
        "mixer": {"name": "mamba", "expand": 2, "d_state": 16, "d_conv": 4, "conv_bias": True, "bias": False},
    }
    second, _ = read(model_type="mamba2", hidden_size=4096, num_hidden_layers=2, vocab_size=283)
    assert second["tie_embeddings"] is False
    assert second["mixer"] == {
        **model["mixer"],
        "name": "mamba2",
        "d_state": 128,
        "head_dim": 64,
        "n_groups": 8,
        "dt_limit": [0.0, math.inf],
        "norm_eps": 1e-5,
    }


def test_what_is_not_said_has_the_defaults_of_mamba_ssm(read):
    model, vocab_size = read(d_model=24, n_layer=2, vocab_size=283, ssm_cfg={"layer": "Mamba2"})
    assert vocab_size == 288, "padded to a multiple of 8"
    assert model["tie_embeddings"] is True
    assert (model["mixer"]["head_dim"], model["mixer"]["n_groups"]) == (64, 1)
    first, _ = read(d_model=24, n_layer=2, vocab_size=283, pad_vocab_size_multiple=1)
    assert first["mixer"]["name"] == "mamba"


def test_infinity_has_two_spellings(read):
    options = {"model_type": "mamba2", "hidden_size": 24, "num_hidden_layers": 1, "vocab_size": 9}
    sizes = {"head_dim": 8, "num_heads": 6, "n_groups": 1}
    for limits in ([0.001, math.inf], [0.001, {"__float__": "Infinity"}]):
        model, _ = read(**options, **sizes, time_step_limit=limits)
        assert model["mixer"]["dt_limit"] == [0.001, math.inf]


def test_messages_name_the_key_in_its_section(tmp_path):
    section = Published(tmp_path / "config.json", {"ssm_cfg": {"d_state": 0}}).section("ssm_cfg")
    with pytest.raises(
        ConfigError, match=r"config\.json: ssm_cfg\.d_state = 0; expected an integer of at least 1"
    ):
        section.integer("d_state")
    with pytest.raises(ConfigError, match=r"ssm_cfg\.d_conv is missing; expected an integer"):
        section.integer("d_conv")
