"""Names of parameters in transformers' files, and the order of rotated rows there."""

import pytest
import torch

from mixerlab.lm.exchange.names import is_rotated, published_name, published_names, to_halves, to_pairs
from mixerlab.mixers.rotary import rotate


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("mamba", "embedding.weight", "backbone.embeddings.weight"),
        ("mamba2", "blocks.11.mixer.A_log", "backbone.layers.11.mixer.A_log"),
        ("mamba2", "norm.weight", "backbone.norm_f.weight"),
        ("mamba", "head.weight", "lm_head.weight"),
        ("llama", "embedding.weight", "model.embed_tokens.weight"),
        ("llama", "norm.weight", "model.norm.weight"),
        ("llama", "blocks.3.norm.weight", "model.layers.3.input_layernorm.weight"),
        ("mistral", "blocks.3.mlp_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
        ("qwen2", "blocks.10.mixer.q_proj.bias", "model.layers.10.self_attn.q_proj.bias"),
        ("qwen3", "blocks.3.mixer.k_norm.weight", "model.layers.3.self_attn.k_norm.weight"),
        ("llama", "blocks.3.mixer.out_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("llama", "blocks.3.mlp.gate.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("bamba", "norm.weight", "model.final_layernorm.weight"),
        ("bamba", "blocks.0.mlp_norm.weight", "model.layers.0.pre_ff_layernorm.weight"),
        ("bamba", "blocks.0.mlp.down.weight", "model.layers.0.feed_forward.down_proj.weight"),
        ("bamba", "head.weight", "lm_head.weight"),
    ],
)
def test_every_parameter_has_its_published_name(kind, ours, theirs):
    assert published_name(kind, ours) == theirs


def test_layers_of_a_hybrid_are_told_apart_by_what_is_in_them():
    ours = [
        "blocks.0.mixer.norm.weight",
        "blocks.0.mixer.out_proj.weight",
        "blocks.0.mixer.dt_bias",
        "blocks.1.mixer.q_proj.weight",
        "blocks.1.mixer.out_proj.weight",
    ]
    assert list(published_names("bamba", ours).values()) == [
        "model.layers.0.mamba.norm.weight",
        "model.layers.0.mamba.out_proj.weight",
        "model.layers.0.mamba.dt_bias",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ]


def test_which_rows_are_rotated():
    assert is_rotated("blocks.0.mixer.q_proj.bias")
    assert is_rotated("blocks.0.mixer.k_norm.weight")
    assert not is_rotated("blocks.0.mixer.v_proj.weight")
    assert not is_rotated("norm.weight")


def rotate_halves(x, positions, theta):
    """The rotation of transformers, written out: pair i is (i, i + K/2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].double() / theta ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


@pytest.mark.parametrize(("heads", "head_dim", "rope_dim"), [(1, 2, 2), (3, 8, 8), (2, 6, 6), (2, 8, 4)])
def test_scores_of_rows_in_the_other_order_are_the_same(heads, head_dim, rope_dim):
    x = torch.randn(1, 5, 7, dtype=torch.float64)
    positions = torch.arange(5)[None]
    weights = [torch.randn(heads * head_dim, 7, dtype=torch.float64) for _ in range(2)]

    def scores(weights, rotate):
        both = []
        for weight in weights:
            y = (x @ weight.T).unflatten(-1, (heads, head_dim)).transpose(1, 2)
            y[..., :rope_dim] = rotate(y[..., :rope_dim].clone(), positions, 100.0)
            both.append(y)
        q, k = both
        return q @ k.mT

    theirs = scores([to_halves(weight, head_dim, rope_dim) for weight in weights], rotate_halves)
    torch.testing.assert_close(theirs, scores(weights, rotate), rtol=1e-5, atol=1e-5)
    for weight in (*weights, weights[0][:, 0]):
        assert torch.equal(to_pairs(to_halves(weight, head_dim, rope_dim), head_dim, rope_dim), weight)
