"""config.json of transformers' Llama, Mistral, Qwen2, Qwen3 and Bamba as the `model` section of a recipe.

Defaults are those of transformers' configurations.
"""

from typing import Any

from mixerlab.lm.exchange.published import Published

MOST_LAYERS = 10_000
"""Beyond all models: a list of their mixers would take the memory that a wrong file asks for."""


def attention_model(config: Published) -> dict[str, Any]:
    """Of Llama, Mistral, Qwen2 and Qwen3."""
    kind = config.values["model_type"]
    eps = config.number("rms_norm_eps", 1e-6)
    mixer = _attention(config, kind)
    if kind == "qwen3":
        mixer |= {"qk_norm": True, "norm_eps": eps}
    if kind == "qwen2":
        mixer["bias"] = True
    windows = _windows(config, kind)
    mixers = [mixer if window is None else {**mixer, "window": window} for window in windows]
    alike = all(window == windows[0] for window in windows)
    return {**_sizes(config, eps), "mixer": mixers[0] if alike else mixers}


def hybrid_model(config: Published) -> dict[str, Any]:
    """Of Bamba: Mamba-2 in every layer but for some of attention."""
    eps = config.number("rms_norm_eps", 1e-5)
    sizes, attention = _sizes(config, eps), _attention(config, "bamba")
    expand, heads = config.integer("mamba_expand", 2), config.integer("mamba_n_heads", 128)
    inner = expand * sizes["d_model"]
    if inner % heads or config.values.get("mamba_d_head", "auto") not in ("auto", inner // heads):
        raise config.problem(
            "mamba_d_head", f"mamba_expand * hidden_size / mamba_n_heads = {inner / heads:g}"
        )
    state_space = {
        "name": "mamba2",
        "expand": expand,
        "head_dim": inner // heads,
        "n_groups": config.integer("mamba_n_groups", 1),
        "d_state": config.integer("mamba_d_state", 256),
        "d_conv": config.integer("mamba_d_conv", 4),
        "conv_bias": config.flag("mamba_conv_bias", True),
        "bias": config.flag("mamba_proj_bias", False),
        "dt_limit": config.step_limits("time_step_limit"),
        "norm_eps": eps,
    }
    layers = range(sizes["n_layers"])
    indices = config.values.get("attn_layer_indices") or []
    if not isinstance(indices, list) or not all(type(i) is int and i in layers for i in indices):
        raise config.problem("attn_layer_indices", f"a list of numbers of layers, 0 to {layers[-1]}")
    return {**sizes, "mixer": [attention if i in indices else state_space for i in layers]}


def _layers(config: Published) -> int:
    layers = config.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise config.problem("num_hidden_layers", f"at most {MOST_LAYERS}")
    return layers


def _sizes(config: Published, eps: float) -> dict[str, Any]:
    config.only("hidden_act", "silu")
    config.only("mlp_bias", False)
    return {
        "d_model": config.integer("hidden_size"),
        "n_layers": _layers(config),
        "mlp": "swiglu",
        "mlp_dim": config.integer("intermediate_size"),
        "norm_eps": eps,
        "tie_embeddings": config.flag("tie_word_embeddings", False),
    }


def _attention(config: Published, kind: str) -> dict[str, Any]:
    if kind != "llama":
        config.only("attention_bias", False)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    usual = width // heads if width % heads == 0 else None
    head_dim = config.values.get("head_dim")
    if head_dim is not None or kind == "qwen3":
        head_dim = config.integer("head_dim", 128)
    if kind in ("qwen2", "bamba") and head_dim not in (None, usual):
        raise config.problem("head_dim", f"hidden_size / num_attention_heads = {width / heads:g}")
    # Llama's default is none that are shared; the others must say, for theirs are numbers.
    unshared = config.values.get("num_key_value_heads", None if kind == "llama" else 0) is None
    return {
        "name": "attention",
        "n_heads": heads,
        "n_kv_heads": heads if unshared else config.integer("num_key_value_heads"),
        **_rotation(config, kind, head_dim or width // heads),
        **({} if head_dim in (None, usual) else {"head_dim": head_dim}),
        **({"bias": True} if kind == "llama" and config.flag("attention_bias", False) else {}),
    }


def _rotation(config: Published, kind: str, head_dim: int) -> dict[str, Any]:
    """The options of rotary positions, which must not be scaled."""
    why = "since positions are not scaled here"
    config.only("rope_scaling", None, why)
    rope = config.section("rope_parameters")
    for key in ("rope_type", "type"):
        rope.only(key, "default", why)
    if unknown := sorted(rope.values.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
        raise rope.problem(unknown[0], f"none, {why}")
    theta = {"rope_theta": rope.number("rope_theta", config.number("rope_theta", 10000.0))}
    if kind != "bamba":
        for section in (config, rope):
            section.only("partial_rotary_factor", 1, f"as {kind} has")
        return theta
    factor = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 0.5))
    rotated = int(head_dim * factor)
    if not 0 < factor <= 1 or rotated % 2 or not rotated:
        raise rope.problem("partial_rotary_factor", "a share of the head, at most 1, that is an even number")
    return theta if rotated == head_dim else {**theta, "rope_dim": rotated}


def _windows(config: Published, kind: str) -> list[int | None]:
    """Of each layer, the positions that its queries see; None: the whole past."""
    layers = _layers(config)
    window = config.values.get("sliding_window", 4096)
    used = kind == "mistral" or (kind != "llama" and config.flag("use_sliding_window", False))
    if not used or window is None:
        return [None] * layers
    window = config.integer("sliding_window", 4096)
    types = config.values.get("layer_types")
    if kind == "mistral" or types is None:
        first = 0 if kind == "mistral" else config.values.get("max_window_layers", 28)
        if type(first) is not int:
            raise config.problem("max_window_layers", "an integer")
        return [window if i >= first else None for i in range(layers)]
    names = {"full_attention": None, "sliding_attention": window}
    known = isinstance(types, list) and all(isinstance(name, str) and name in names for name in types)
    if not known or len(types) != layers:
        raise config.problem("layer_types", f"{layers} times full_attention or sliding_attention")
    return [names[name] for name in types]
