"""Published architectures as the `model` section of a recipe.

Read are the config.json of transformers (`LlamaForCausalLM`, `MambaForCausalLM` and so on) and of the original
`mamba_ssm` code. What this code cannot represent is refused.

Letters: D model width, V vocabulary.
"""

import math
from typing import Any

from mixerlab.lm.exchange.attention_layouts import attention_model, hybrid_model
from mixerlab.lm.exchange.names import ATTENTION, HYBRID, STATE_SPACE
from mixerlab.lm.exchange.published import Published


def read_model(config: Published) -> tuple[str, dict[str, Any], int]:
    """config.json -> (`model_type` of its names of parameters, the `model` section of a recipe, V)."""
    kind = config.values.get("model_type")
    config.only("quantization_config", None, "since quantised weights are not read")
    readers = dict.fromkeys(ATTENTION, attention_model) | dict.fromkeys(STATE_SPACE, _state_space_model)
    readers[HYBRID] = hybrid_model
    if isinstance(kind, str) and kind in readers:
        model, vocab_size = readers[kind](config), config.integer("vocab_size")
    elif kind is None and {"d_model", "n_layer"} <= config.values.keys():
        kind = "mamba"
        model, vocab_size = _original_model(config)
    else:
        raise config.problem("model_type", f"{', '.join(readers)} (or the d_model and n_layer of mamba_ssm)")
    return kind, {"block": "transformer", "norm": "rmsnorm", **model}, vocab_size


def _state_space_model(config: Published) -> dict[str, Any]:
    """Defaults are those of transformers' MambaConfig and Mamba2Config."""
    second = config.values["model_type"] == "mamba2"
    width, expand = config.integer("hidden_size"), config.integer("expand", 2)
    config.only("hidden_act", "silu")
    config.only("rms_norm", True)
    eps = config.number("layer_norm_epsilon", 1e-5)
    config.only("intermediate_size", expand * width, "expand * hidden_size")
    mixer: dict[str, Any] = {
        "name": "mamba2" if second else "mamba",
        "expand": expand,
        "d_state": config.integer("state_size", 128 if second else 16),
        "d_conv": config.integer("conv_kernel", 4),
        "conv_bias": config.flag("use_conv_bias", True),
        "bias": config.flag("use_bias", False),
    }
    if second:
        head_dim, heads = config.integer("head_dim", 64), config.integer("num_heads", 128)
        if heads * head_dim != expand * width:
            raise config.problem(
                "num_heads", f"expand * hidden_size / head_dim = {expand * width / head_dim:g}"
            )
        mixer["head_dim"] = head_dim
        mixer["n_groups"] = config.integer("n_groups", 8)
        mixer["dt_limit"] = config.step_limits("time_step_limit")
        mixer["norm_eps"] = eps
    elif config.values.get("time_step_rank", "auto") != "auto":
        mixer["dt_rank"] = config.integer("time_step_rank")
    return {
        "mlp": "none",
        "norm_eps": eps,
        "d_model": width,
        "n_layers": config.integer("num_hidden_layers"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_word_embeddings", not second),
    }


INITIAL = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path", "device", "dtype"),
}
"""Keys of `ssm_cfg` that decide initial values and speed, and nothing of a trained model."""


def _original_model(config: Published) -> tuple[dict[str, Any], int]:
    """Defaults are those of `mamba_ssm`: models/config_mamba.py, modules/mamba_simple.py and modules/mamba2.py."""
    config.only("rms_norm", True)
    config.only("attn_layer_idx", [])
    config.only("d_intermediate", 0)
    ssm = config.section("ssm_cfg")
    layer = ssm.values.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ssm.problem("layer", "Mamba1 or Mamba2")
    second = layer == "Mamba2"
    mixer: dict[str, Any] = {
        "name": "mamba2" if second else "mamba",
        "expand": ssm.integer("expand", 2),
        "d_state": ssm.integer("d_state", 128 if second else 16),
        "d_conv": ssm.integer("d_conv", 4),
        "conv_bias": ssm.flag("conv_bias", True),
        "bias": ssm.flag("bias", False),
    }
    read = {"layer", "expand", "d_state", "d_conv", "conv_bias", "bias"}
    if second:
        mixer["head_dim"] = ssm.integer("headdim", 64)
        mixer["n_groups"] = ssm.integer("ngroups", 1)
        mixer["dt_limit"] = ssm.step_limits("dt_limit")
        mixer["norm_eps"] = 1e-5
        for key, supported in {
            "d_ssm": None,
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
        }.items():
            ssm.only(key, supported)
            read.add(key)
        read |= {"headdim", "ngroups", "dt_limit"}
    else:
        if ssm.values.get("dt_rank", "auto") != "auto":
            mixer["dt_rank"] = ssm.integer("dt_rank")
        read.add("dt_rank")
    if unknown := sorted(ssm.values.keys() - read - INITIAL):
        raise ssm.problem(unknown[0], f"none, since {layer} here has no such option")
    model = {
        "mlp": "none",
        "d_model": config.integer("d_model"),
        "n_layers": config.integer("n_layer"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_embeddings", True),
    }
    multiple = config.integer("pad_vocab_size_multiple", 8)
    return model, math.ceil(config.integer("vocab_size") / multiple) * multiple
