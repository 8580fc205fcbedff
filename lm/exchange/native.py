"""A recipe's decoder as an architecture of transformers: its config.json and its weights, or why there is none.

Letters: K head dim.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mixerlab.lm.exchange.names import HYBRID, is_rotated, published_names, to_halves
from mixerlab.lm.model.blocks import default_mlp_dim
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.recipe.check import mixers_of
from mixerlab.lm.recipe.schema import ModelConfig, Recipe
from mixerlab.mixers.attention import Attention, AttentionConfig, default_n_heads
from mixerlab.mixers.mamba import MambaConfig
from mixerlab.mixers.mamba2 import Mamba2Config
from mixerlab.options import Choice, ConfigError, show

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
}
CHUNK = 256
"""Positions that transformers takes at a time through Mamba-2."""

Layers = list[tuple[str, Choice]]
"""Of each layer in order, its mixer's key in the recipe, and the mixer."""


class NotNative(ConfigError):
    """transformers has no architecture that computes what the recipe's decoder does."""

    def __init__(self, why: str):
        super().__init__(f"{why}; --format remote takes any recipe")


def _unfit(key: str, value: Any, expected: str) -> NotNative:
    return NotNative(f"{key} = {show(value)}: a native export needs {expected}")


def native_configs(recipe: Recipe, vocab_size: int, seq_len: int) -> list[dict[str, Any]]:
    """What config.json may say of the recipe's decoder, but for tokens; the first is the one to try first.

    Raises NotNative, naming the option.
    """
    config = _config(recipe, vocab_size, seq_len)
    if config["model_type"] != "qwen2" or config["use_sliding_window"]:
        return [config]
    # Of Qwen2 transformers replaces some tokenizers. Llama has the same biases, and one of the output, which is 0 then.
    llama = {key: value for key, value in config.items() if "sliding_window" not in key}
    width = llama["hidden_size"] // llama["num_attention_heads"]
    return [config, llama | {**_llama(width), "attention_bias": True}]


def _config(recipe: Recipe, vocab_size: int, seq_len: int) -> dict[str, Any]:
    model = recipe.model
    _need("model.block", model.block, "transformer")
    _need("model.norm", model.norm, "rmsnorm")
    layers = _layers(recipe)
    names = {mixer.name for _, mixer in layers}
    if names == {"attention"}:
        kind, values = _attention(model, layers)
    elif names == {"mamba"}:
        kind, values = "mamba", _mamba(model, layers)
    elif names == {"mamba2"}:
        kind, values = "mamba2", _mamba2(model, layers)
    elif names == {"mamba2", "attention"}:
        kind, values = HYBRID, _bamba(model, layers)
    else:
        raise _unfit(
            "model.mixer",
            " ".join(sorted(names)),
            "attention, mamba or mamba2 alone, or mamba2 and attention",
        )
    positions = {} if kind in ("mamba", "mamba2") else {"max_position_embeddings": seq_len}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        **positions,
        **values,
    }


def native_weights(config: dict[str, Any], decoder: Decoder) -> dict[str, Tensor]:
    """The decoder's parameters in float32, as the files that go with a config.json name and order them."""
    kind = config["model_type"]
    weights = {name: parameter.detach().float() for name, parameter in decoder.named_parameters()}
    for i, block in enumerate(decoder.layers):
        if not isinstance(block.mixer, Attention):
            continue
        prefix, options = f"blocks.{i}.mixer.", block.mixer.config
        for name in [n for n in weights if n.startswith(prefix) and is_rotated(n)]:
            if options.qk_norm and not name.endswith("norm.weight"):
                # One epsilon serves all norms there: norm(s q, s^2 eps) = norm(q, eps).
                weights[name] = weights[name] * math.sqrt(_eps(block.norm) / options.norm_eps)
            weights[name] = to_halves(weights[name], block.mixer.head_dim, block.mixer.rope_dim)
    names = published_names(kind, weights)
    named = {names[name]: weight.contiguous() for name, weight in weights.items()}
    if kind == "llama" and config["attention_bias"]:
        layers, width = config["num_hidden_layers"], config["hidden_size"]
        named |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(width) for i in range(layers)}
    return named


def _eps(norm: Any) -> float:
    return norm.eps


def _layers(recipe: Recipe) -> Layers:
    mixers = mixers_of(recipe)
    keys = ["model.mixer"]
    if isinstance(recipe.model.mixer, list):
        keys = [f"model.mixer[{i}]" for i in range(len(mixers))]
    pairs = list(zip(keys, mixers, strict=True))
    return [pairs[i % len(pairs)] for i in range(recipe.model.n_layers)]


def _need(key: str, value: Any, expected: Any, why: str = "") -> None:
    if value != expected:
        raise _unfit(key, value, show(expected) + why)


def _alike(layers: Layers, *free: str) -> Any:
    """The options that all these layers have, but for those named and the backend."""
    key, first = layers[0]
    for other, mixer in layers[1:]:
        for field in fields(mixer.options):
            value, expected = getattr(mixer.options, field.name), getattr(first.options, field.name)
            if field.name not in (*free, "backend") and value != expected:
                raise _unfit(f"{other}.{field.name}", value, f"{show(expected)}, as {key} has")
    return first.options


def _attention(model: ModelConfig, layers: Layers) -> tuple[str, dict[str, Any]]:
    """Llama, or with a window Mistral, with biases Qwen2, with QK norm Qwen3."""
    key = layers[0][0]
    options: AttentionConfig = _alike(layers, "window")
    values = _heads(model, key, options) | _feed_forward(model)
    width = options.head_dim or model.d_model // values["num_attention_heads"]
    if options.rope_dim not in (None, width):
        raise _unfit(f"{key}.rope_dim", options.rope_dim, "null, or layers of mamba2 too")
    head_dim = {"head_dim": width}
    windows = [mixer.options.window for _, mixer in layers]
    if options.qk_norm or options.bias:
        # In transformers biases are on the output projection too, but for Qwen2, which has no QK norm.
        _need(f"{key}.bias", options.bias and options.qk_norm, False, " with qk_norm")
        if options.qk_norm:
            return "qwen3", values | head_dim | {"attention_bias": False} | _windows(layers)
        _need(f"{key}.head_dim", options.head_dim, None, " with bias")
        return "qwen2", values | _windows(layers)
    if set(windows) == {None}:
        return "llama", values | _llama(width)
    for other, window in zip((other for other, _ in layers), windows, strict=True):
        _need(f"{other}.window", window, windows[0], " in every layer, or qk_norm")
    return "mistral", values | head_dim | {"sliding_window": windows[0]}


def _llama(head_dim: int) -> dict[str, Any]:
    return {
        "architectures": [CLASSES["llama"]],
        "model_type": "llama",
        "head_dim": head_dim,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _windows(layers: Layers) -> dict[str, Any]:
    """The window of Qwen2 and Qwen3, which some layers may be without."""
    windows = [mixer.options.window for _, mixer in layers]
    widest = max((window for window in windows if window is not None), default=None)
    if widest is None:
        return {"use_sliding_window": False, "sliding_window": None}
    for (key, _), window in zip(layers, windows, strict=True):
        if window is not None:
            _need(f"{key}.window", window, widest, " or null in every layer")
    return {
        "use_sliding_window": True,
        "sliding_window": widest,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _heads(model: ModelConfig, key: str, options: AttentionConfig) -> dict[str, Any]:
    """Of attention with rotary positions over the whole head."""
    _need(f"{key}.rope", options.rope, True)
    heads = options.n_heads or default_n_heads(model.d_model)
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": options.n_kv_heads or heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
    }


def _feed_forward(model: ModelConfig) -> dict[str, Any]:
    _need("model.mlp", model.mlp, "swiglu")
    width = model.mlp_dim or default_mlp_dim(model.d_model, model.mlp)
    return {"intermediate_size": width, "rms_norm_eps": model.norm_eps}


def _mamba(model: ModelConfig, layers: Layers) -> dict[str, Any]:
    _need("model.mlp", model.mlp, "none")
    options: MambaConfig = _alike(layers)
    return {
        "state_size": options.d_state,
        "conv_kernel": options.d_conv,
        "expand": options.expand,
        "intermediate_size": options.expand * model.d_model,
        "time_step_rank": options.dt_rank or math.ceil(model.d_model / 16),
        "use_bias": options.bias,
        "use_conv_bias": options.conv_bias,
        "layer_norm_epsilon": model.norm_eps,
    }


def _mamba2(model: ModelConfig, layers: Layers) -> dict[str, Any]:
    # transformers generates nothing from a Bamba without attention.
    _need("model.mlp", model.mlp, "none", ", or layers of attention too")
    options = _ssd(model, layers)
    head_dim = options.head_dim_in(model.d_model)
    return {
        "num_heads": options.expand * model.d_model // head_dim,
        "head_dim": head_dim,
        "n_groups": options.n_groups,
        "state_size": options.d_state,
        "conv_kernel": options.d_conv,
        "expand": options.expand,
        "use_bias": options.bias,
        "use_conv_bias": options.conv_bias,
        "layer_norm_epsilon": model.norm_eps,
        "chunk_size": CHUNK,
    }


def _ssd(model: ModelConfig, layers: Layers) -> Mamba2Config:
    """The options of layers of Mamba-2."""
    options: Mamba2Config = _alike(layers)
    key = layers[0][0]
    _need(f"{key}.norm_eps", options.norm_eps, model.norm_eps, ", model.norm_eps")
    # transformers clamps the steps of a prompt, and not those of new tokens.
    _need(f"{key}.dt_limit", list(options.dt_limit), [0.0, math.inf])
    return options


def _bamba(model: ModelConfig, layers: Layers) -> dict[str, Any]:
    attention = [layer for layer in layers if layer[1].name == "attention"]
    key = attention[0][0]
    options: AttentionConfig = _alike(attention)
    for name in ("window", "qk_norm", "bias", "head_dim"):
        _need(f"{key}.{name}", getattr(options, name), getattr(AttentionConfig(), name), " beside mamba2")
    values = _heads(model, key, options) | _feed_forward(model)
    head_dim = model.d_model // values["num_attention_heads"]
    values["rope_parameters"]["partial_rotary_factor"] = (options.rope_dim or head_dim) / head_dim
    state_space = _ssd(model, [layer for layer in layers if layer[1].name == "mamba2"])
    width = state_space.head_dim_in(model.d_model)
    return values | {
        "attn_layer_indices": [i for i, (_, mixer) in enumerate(layers) if mixer.name == "attention"],
        "mamba_n_heads": state_space.expand * model.d_model // width,
        "mamba_d_head": width,
        "mamba_n_groups": state_space.n_groups,
        "mamba_d_state": state_space.d_state,
        "mamba_d_conv": state_space.d_conv,
        "mamba_expand": state_space.expand,
        "mamba_conv_bias": state_space.conv_bias,
        "mamba_proj_bias": state_space.bias,
        "mamba_chunk_size": CHUNK,
        "attention_bias": False,
        "mlp_bias": False,
    }
