"""What transformers' files call the decoder's parameters, and the order of rows that they have them in.

Letters: H heads, K head dim, R how much of a head is rotated.
"""

from collections.abc import Iterable

from torch import Tensor

STATE_SPACE = ("mamba", "mamba2")
ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
HYBRID = "bamba"
"""Values of `model_type` in config.json."""

ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")
"""Of attention: what makes the queries and keys that are rotated by position."""

_INNER = {
    "norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "mixer": "self_attn",
    "out_proj": "o_proj",
}
_BAMBA_INNER = {**_INNER, "mlp_norm": "pre_ff_layernorm", "mlp": "feed_forward"}


def stem(kind: str) -> str:
    """The name of the model below its head."""
    return "backbone" if kind in STATE_SPACE else "model"


def published_name(kind: str, name: str, attention: bool = True) -> str:
    """A parameter of the decoder -> its name in the files of a `model_type`.

    `attention` tells, in a hybrid, whether the parameter's layer is one of attention.
    """
    module, _, parameter = name.rpartition(".")
    if module == "head":
        return f"lm_head.{parameter}"
    if module == "embedding":
        return f"{stem(kind)}.{'embeddings' if kind in STATE_SPACE else 'embed_tokens'}.{parameter}"
    if module == "norm":
        last = "norm_f" if kind in STATE_SPACE else "final_layernorm" if kind == HYBRID else "norm"
        return f"{stem(kind)}.{last}.{parameter}"
    _, layer, *inner = module.split(".")
    if kind not in STATE_SPACE:
        words = _BAMBA_INNER if kind == HYBRID else _INNER
        # Mamba-2 has names of its own inside, which are those here.
        state_space = inner[0] == "mixer" and not attention
        inner = ["mamba", *inner[1:]] if state_space else [words.get(word, word) for word in inner]
    return ".".join([stem(kind), "layers", layer, *inner, parameter])


def published_names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """The decoder's parameters -> their names in the files of a `model_type`."""
    names = list(names)
    attention = {name.split(".")[1] for name in names if name.endswith(".mixer.q_proj.weight")}
    return {
        name: published_name(kind, name, name.startswith("blocks.") and name.split(".")[1] in attention)
        for name in names
    }


def is_rotated(name: str) -> bool:
    """Whether a parameter of the decoder has rows in the order of the rotation's pairs."""
    return name.startswith("blocks.") and name.split(".")[-2] in ROTATED


def to_halves(rows: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """Rows (H K, ...) of heads whose first R are rotated: pairs (2i, 2i + 1), as here, -> (i, i + R/2), as there."""
    return _reordered(rows, head_dim, rope_dim, (rope_dim // 2, 2))


def to_pairs(rows: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    return _reordered(rows, head_dim, rope_dim, (2, rope_dim // 2))


def _reordered(rows: Tensor, head_dim: int, rope_dim: int, shape: tuple[int, int]) -> Tensor:
    heads = rows.unflatten(0, (-1, head_dim)).clone()  # (H, K, ...)
    heads[:, :rope_dim] = heads[:, :rope_dim].unflatten(1, shape).transpose(1, 2).flatten(1, 2)
    return heads.flatten(0, 1)
