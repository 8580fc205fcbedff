"""Published architectures as the `model` section of a recipe, and the names that their files give to parameters.

Read are the config.json of transformers (`MambaForCausalLM`, `Mamba2ForCausalLM`) and of the original `mamba_ssm`
code. What this code cannot represent is refused.

Letters: D model width, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import Any, Self

from mixerlab.options import ConfigError

BLOCK_EPS = 1e-5
"""Of the decoder's norms."""


class Published:
    """A mapping from a JSON file, whose values are asked for by name. What is wrong raises ConfigError."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    @classmethod
    def read(cls, path: Path) -> Self:
        """The mapping in a file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:  # not JSON, not UTF-8, or not readable
            raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {type(values).__name__} in JSON; expected a mapping")
        return cls(path, values)

    def problem(self, key: str, expected: str) -> ConfigError:
        found = f"= {self.values[key]!r}" if key in self.values else "is missing"
        return ConfigError(f"{self.path}: {self.prefix}{key} {found}; expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.problem(key, "an integer of at least 1 and below 2^31")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.problem(key, "true or false")
        return value

    def only(self, key: str, supported: Any, why: str = "") -> None:
        """Refuses a value, where there is one, other than the one that this code has."""
        if key in self.values and self.values[key] != supported:
            raise self.problem(key, f"{json.dumps(supported)}{why and ', ' + why}")

    def section(self, key: str) -> Self:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.problem(key, "a mapping")
        return type(self)(self.path, value, f"{self.prefix}{key}.")

    def step_limits(self, key: str) -> list[float]:
        """Bounds of the step size. Infinity is a tagged mapping in newer files of transformers."""
        value = self.values.get(key, [0.0, math.inf])
        try:
            low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise self.problem(key, "two numbers") from None
        if not 0 <= low < high:
            raise self.problem(key, "two numbers, 0 <= the first < the second")
        return [low, high]


def read_model(config: Published) -> tuple[dict[str, Any], int]:
    """config.json -> (the `model` section of a recipe, V)."""
    kind = config.values.get("model_type")
    config.only("quantization_config", None, "since quantised weights are not read")
    if kind in ("mamba", "mamba2"):
        model, vocab_size = _transformers_model(config)
    elif kind is None and {"d_model", "n_layer"} <= config.values.keys():
        model, vocab_size = _original_model(config)
    else:
        raise config.problem("model_type", "mamba or mamba2 (or the d_model and n_layer of mamba_ssm)")
    return {"block": "transformer", "mlp": "none", "norm": "rmsnorm", **model}, vocab_size


def _transformers_model(config: Published) -> tuple[dict[str, Any], int]:
    """Defaults are those of transformers' MambaConfig and Mamba2Config."""
    second = config.values["model_type"] == "mamba2"
    width, expand = config.integer("hidden_size"), config.integer("expand", 2)
    config.only("hidden_act", "silu")
    config.only("rms_norm", True)
    config.only("layer_norm_epsilon", BLOCK_EPS, "the epsilon of the decoder's norms")
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
        mixer["norm_eps"] = BLOCK_EPS
    elif config.values.get("time_step_rank", "auto") != "auto":
        mixer["dt_rank"] = config.integer("time_step_rank")
    model = {
        "d_model": width,
        "n_layers": config.integer("num_hidden_layers"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_word_embeddings", not second),
    }
    return model, config.integer("vocab_size")


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
        "d_model": config.integer("d_model"),
        "n_layers": config.integer("n_layer"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_embeddings", True),
    }
    multiple = config.integer("pad_vocab_size_multiple", 8)
    return model, math.ceil(config.integer("vocab_size") / multiple) * multiple


def published_name(name: str) -> str:
    """A parameter of the decoder -> its name in the files."""
    if name.startswith("blocks."):
        return "backbone.layers." + name.removeprefix("blocks.")
    names = {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    module, _, parameter = name.rpartition(".")
    return f"{names[module]}.{parameter}"
