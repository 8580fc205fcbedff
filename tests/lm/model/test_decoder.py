"""The decoder: packed rows, decoding, initialisation, sizes."""

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerlab.data import build_data
from mixerlab.lm.model.decoder import Decoder, build_decoder, count_parameters, spared_parameters
from mixerlab.lm.model.match import sized
from mixerlab.lm.recipe.files import SHIPPED
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.mixers import MIXERS

LAYOUTS = {
    "gated": {"block": "gated"},
    "transformer": {"block": "transformer"},
    "no MLP": {"block": "transformer", "mlp": "none", "norm": "rmsnorm"},
    "hybrid": {"mixer": ["attention", {"name": "sessa", "n_heads": 2}, "identity"], "mlp": "gelu"},
    "tied": {"tie_embeddings": True},
}

# Every registered mixer and some hybrids, in every kind of block.
HYBRIDS = [
    ["mamba2", "attention"],
    ["mamba2", "sessa"],
    ["gated_deltanet", "attention"],
    ["mamba", "parallel"],
    ["mamba2", "selective_attention"],
    [{"name": "selective_attention", "below": "sessa", "window": 3}, "identity", "attention"],
]
BLOCKS = [{"block": "gated"}, {"block": "transformer"}, {"block": "transformer", "mlp": "none"}]


def cases(mixers):
    return [
        pytest.param(
            {"mixer": mixer, **block, "norm": "rmsnorm"},
            id="+".join(m if isinstance(m, str) else m["name"] for m in mixer)
            + "-"
            + "-".join(block.values()),
        )
        for mixer in mixers
        for block in BLOCKS
    ]


everywhere = pytest.mark.parametrize("layout", cases([*([name] for name in MIXERS.registered()), *HYBRIDS]))


def build(**options):
    decoder = Decoder(50, **{"d_model": 16, "n_layers": 3, "mlp_dim": 24, **options}).eval()
    decoder.initialize(0)
    return decoder


def contract_decoder(layout):
    """In float64, with parameters far from special values, so that gates are open for some tokens only."""
    decoder = build(**layout).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return decoder


def token_ids(batch, time, seed=0):
    return torch.randint(50, (batch, time), generator=torch.Generator().manual_seed(seed))


@everywhere
def test_extend_equals_forward_however_the_row_is_cut(layout):
    decoder = contract_decoder(layout)
    ids = token_ids(2, 13)
    expected = decoder(ids)
    cuts = random.Random(0)
    with torch.no_grad():
        for n_cuts in (0, 1, 3, 12):
            places = [0, *sorted(cuts.sample(range(1, 13), n_cuts)), 13]
            states, pieces = decoder.init_state(2, 13), []
            for start, stop in pairwise(places):
                logits, states = decoder.extend(ids[:, start:stop], states)
                pieces.append(logits)
            torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-10, atol=1e-10)


@everywhere
def test_later_tokens_change_nothing_before_them(layout):
    decoder = contract_decoder(layout)
    ids = token_ids(2, 11)
    embedded: list[torch.Tensor] = []

    def keep(module, args, output):
        embedded.append(output)

    with torch.no_grad():
        changed = ids.clone()
        changed[:, 6:] = token_ids(2, 5, seed=1)
        torch.testing.assert_close(decoder(changed)[:, :6], decoder(ids)[:, :6], rtol=1e-12, atol=1e-12)
    decoder.embedding.register_forward_hook(keep)
    logits = decoder(ids)
    (gradient,) = torch.autograd.grad(logits[:, :6].square().sum(), embedded)
    assert (gradient[:, 6:] == 0).all()
    assert (gradient[:, :6] != 0).any(-1).all()


@everywhere
def test_packed_documents_are_as_if_alone_in_every_decoder(layout):
    decoder = contract_decoder(layout)
    mixer = decoder.blocks[0].mixer
    if not all(block.mixer.supports_segments for block in decoder.blocks):
        pytest.skip(f"{type(mixer).__name__} refuses packed documents")
    check_packing(decoder, [5, 1, 7])


@everywhere
def test_a_state_dict_loads_into_a_fresh_decoder(layout):
    decoder = contract_decoder(layout)
    fresh = build(**layout).double()
    fresh.load_state_dict(decoder.state_dict())
    ids = token_ids(2, 7)
    assert torch.equal(fresh(ids), decoder(ids))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"mixer": mixer, **BLOCKS[1]} for mixer in HYBRIDS])
def test_hybrids_compile_in_one_graph(layout):
    torch._dynamo.reset()
    decoder, compiled = contract_decoder(layout).train(), contract_decoder(layout).train()
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    check_compiled(decoder, compiled)


@pytest.mark.slow
def test_a_hybrid_compiles_in_full():
    torch._dynamo.reset()
    layout = {"mixer": ["mamba2", "selective_attention", "parallel"], "block": "transformer"}
    decoder, compiled = (
        contract_decoder(layout),
        contract_decoder(layout),
    )  # noise would be another: evaluation
    for block in compiled.blocks:
        block.compile(fullgraph=True)
    check_compiled(decoder, compiled)


def check_compiled(decoder, compiled):
    """The same losses and gradients, for a packed row too."""
    ids = token_ids(2, 16)
    for segment_ids in (None, (torch.arange(16) // 6).expand(2, -1)):
        results = []
        for model in (decoder, compiled):
            torch.manual_seed(0)  # of gates that draw in training
            nll, _ = model(ids, ids, segment_ids)
            gradients = torch.autograd.grad(nll.sum(), list(model.parameters()), allow_unused=True)
            results.append([nll, *(g for g in gradients if g is not None)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_extend_equals_forward(layout):
    decoder = build(**layout).double()
    ids = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))
    states = decoder.init_state(2, 11)
    pieces = []
    for piece in ids.split([4, 1, 6], dim=1):
        logits, states = decoder.extend(piece, states)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), decoder(ids), rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    mixer=st.sampled_from(["sessa", "attention", "identity"]),
    block=st.sampled_from(["gated", "transformer"]),
)
def test_packed_documents_are_as_if_alone(lengths, mixer, block):
    check_packing(build(mixer=mixer, block=block).double(), lengths)


def check_packing(decoder, lengths):
    """Losses and gradients of documents packed into one row are those of the documents alone."""
    generator = torch.Generator().manual_seed(len(lengths))
    documents = [torch.randint(50, (n,), generator=generator) for n in lengths]
    labels = [torch.cat((d[1:], torch.tensor([-100]))) for d in documents]
    segment_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    packed, _ = decoder(torch.cat(documents)[None], torch.cat(labels)[None], segment_ids[None])
    apart = [decoder(d[None], y[None])[0] for d, y in zip(documents, labels, strict=True)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-10, atol=1e-10)
    parameters = list(decoder.parameters())
    ours = torch.autograd.grad(packed.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(torch.cat(apart, dim=1).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_initial_values_depend_on_seed_and_name_alone():
    small, deep = build(n_layers=3), build(n_layers=5)
    again, other = build(n_layers=3), build(n_layers=3)
    other.initialize(1)
    values = dict(deep.named_parameters())
    for name, p in small.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        if p.ndim == 2:
            assert not torch.equal(p, other.get_parameter(name))
            if "out_proj" not in name:
                assert torch.equal(p, values[name]), f"{name} depends on the depth"


def test_residual_projections_start_smaller_with_depth():
    decoder = Decoder(50, d_model=64, n_layers=8, mixer=["attention", "sessa"], block="transformer")
    decoder.initialize(0)
    expected = 0.02 / math.sqrt(16)  # a mixer and an MLP in each of 8 layers
    for i, block in enumerate(decoder.blocks):
        mixer_end = block.out_proj if i % 2 else block.mixer.out_proj  # Sessa has no projection at its end
        for projection in (mixer_end, block.mlp.down):
            assert projection.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert block.mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@everywhere
def test_what_reaches_the_residual_stream_is_projected(layout):
    # So its scale at the start is the projections', whatever the mixer's.
    decoder = contract_decoder(layout)
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for block in decoder.layers:
            assert not torch.equal(block(x), x)
            for parameter in (p for module in block.residual_projections() for p in module.parameters()):
                parameter.zero_()
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_groups_sum_to_all_parameters(layout):
    decoder = build(**layout)
    assert sum(decoder.parameter_groups().values()) == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_flops_are_those_of_the_matrix_products(layout):
    decoder = build(**layout)
    time = (
        8  # of a short row the products with weights are nearly all; the mixers' T x T are checked with them
    )
    square = sum(b.mixer.flops(2 * time) - 2 * b.mixer.flops(time) for b in decoder.blocks) / 2
    weights = sum(p.numel() for n, p in decoder.named_parameters() if p.ndim == 2 and "embedding" not in n)
    weights -= sum(b.mixer.gamma_ctx.weight.numel() for b in decoder.blocks if hasattr(b.mixer, "gamma_ctx"))
    weights += 0 if decoder.head is not None else decoder.embedding.weight.numel()
    assert decoder.flops(time) - square == pytest.approx(2 * time * weights, rel=0.02)


def test_a_mixer_that_does_not_draw_its_parameters_is_named():
    decoder = build(mixer="identity")
    decoder.blocks[1].mixer.gain = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(NotImplementedError, match="Identity must draw gain"):
        decoder.initialize(0)


def test_a_module_that_cannot_be_drawn_is_named():
    decoder = build()
    decoder.blocks[0].extra = torch.nn.ParameterList([torch.zeros(3)])
    with pytest.raises(TypeError, match=r"blocks\.0\.extra: ParameterList"):
        decoder.initialize(0)


def test_the_recipe_says_what_is_built_and_how_many_parameters_that_has():
    recipe = load_recipe("quickstart", model={"n_layers": 3, "mixer": ["mamba", "attention"]})
    decoder = build_decoder(recipe, recipe.data.options.vocab_size)
    assert [type(block.mixer).__name__ for block in decoder.layers] == ["Mamba", "Attention", "Mamba"]
    assert sum(p.numel() for p in decoder.parameters()) == count_parameters(recipe)


@pytest.mark.parametrize("name", [path.stem for path in sorted(SHIPPED.glob("*.yaml"))])
def test_every_recipe_builds_on_the_meta_device(name):
    recipe = sized(load_recipe(name))
    with torch.device("meta"):
        decoder = build_decoder(recipe, build_data(recipe.data, recipe.seed).vocab_size)
    assert all(parameter.is_meta for parameter in decoder.parameters())


def test_norms_biases_and_what_mixers_name_are_spared():
    decoder = build(mixer=["mamba2", "attention"], n_layers=2)
    for name in ("no_decay", "keep_float32"):
        spared = spared_parameters(decoder, name)
        mamba2 = decoder.blocks[0].mixer
        assert {f"blocks.0.mixer.{own}" for own in getattr(mamba2, name)} <= spared
        assert {"norm.weight", "norm.bias", "blocks.1.in_proj.bias"} <= spared
        assert "blocks.0.mixer.in_proj.weight" not in spared
        assert "embedding.weight" not in spared
