"""Selective attention against a loop over positions, and its gate in training."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mixerlab.lm.model.precision import to_bf16
from mixerlab.mixers import build_mixer
from mixerlab.mixers.selective_attention import CapacityPenalty
from mixerlab.mixers.testing import double, inputs


def selective(**options):
    spec = {"name": "selective_attention", "below": "identity", "n_heads": 2, **options}
    return double(lambda d_model: build_mixer(spec, d_model))


@pytest.mark.parametrize("window", [3, 100])
def test_equals_a_loop_over_positions(window):
    mixer = selective(window=window, below={"name": "attention", "n_heads": 2})
    x = inputs()
    h = mixer.below(x)
    alpha = mixer.gate(h).softmax(-1)[..., 1]
    attending = alpha > 0.5
    q, k, v = (
        getattr(mixer.attention, f"{name}_proj")(h).unflatten(-1, (2, 16)) for name in "qkv"
    )  # (B, T, H, K)
    expected = h.clone()
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            if not attending[b, i]:
                continue
            seen = [j for j in range(i + 1) if attending[b, j] and i - j < window]
            weights = torch.einsum("hk,jhk->hj", q[b, i], k[b, seen]).div(16**0.5).softmax(-1)
            heads = torch.einsum("hj,jhk->hk", weights, v[b, seen])
            o = mixer.attention.out_proj(heads.flatten())
            expected[b, i] = (1 - alpha[b, i]) * h[b, i] + alpha[b, i] * o
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


def test_the_cache_has_a_slot_for_each_position_of_the_window():
    state = selective(window=8).init_state(2, 1000)
    assert state.attention.k.shape[2] == 8
    assert state.attention.selected.shape == (2, 8)
    assert selective(window=8).init_state(2, 5).attention.selected.shape == (2, 5)


def test_the_penalty_is_that_of_the_formula():
    attending = torch.rand(
        3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    cotangent = inputs(3, 7, 1)[..., 0]
    passed = CapacityPenalty.apply(attending, 0.15, 2.5)
    assert torch.equal(passed, attending)
    (ours,) = torch.autograd.grad((passed * cotangent).sum(), attending)
    explicit = (attending * cotangent).sum() + 2.5 * (0.15 - attending.mean()) ** 2
    (expected,) = torch.autograd.grad(explicit, attending)
    torch.testing.assert_close(ours, expected)


def test_training_follows_the_straight_through_gumbel_softmax():
    mixer = selective(capacity=0.2, penalty_weight=3.0, window=6).train()
    x = inputs().requires_grad_()
    torch.manual_seed(1)
    y = mixer(x)
    torch.manual_seed(1)
    scores = mixer.gate(x)
    attending = F.gumbel_softmax(scores, tau=1, hard=True)[..., 1]
    alpha = scores.softmax(-1)[..., 1]
    o = mixer.attention(x, selected=attending > 0.5)
    expected = x + (attending * alpha)[..., None] * (o - x)
    assert 0 < attending.mean() < 1
    torch.testing.assert_close(y, expected)
    penalty = 3.0 * (0.2 - attending.mean()) ** 2
    wanted = (x, *mixer.parameters())
    ours = torch.autograd.grad(y.square().sum(), wanted)
    theirs = torch.autograd.grad(expected.square().sum() + penalty, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(mixer(x), y), "the next sample is another"


def test_a_step_of_several_micro_batches_minimises_the_mean_of_their_penalties():
    """Each with a share of the step's positions, and of its labels, of its own."""
    mixer = selective(capacity=0.2, penalty_weight=3.0, window=6).train()
    parts = [inputs(seed=0), inputs(batch=1, time=5, seed=1), inputs(time=9, seed=2)]
    n_labels = 40

    torch.manual_seed(1)
    mixer.micro_batches = len(parts)
    for x in parts:
        (mixer(x).square().sum() / n_labels).backward()
    ours = [p.grad.clone() for p in mixer.parameters()]

    torch.manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in parts:
        scores = mixer.gate(x)
        attending = F.gumbel_softmax(scores, tau=1, hard=True)[..., 1]
        o = mixer.attention(x, selected=attending > 0.5)
        y = x + (attending * scores.softmax(-1)[..., 1])[..., None] * (o - x)
        loss = loss + y.square().sum() / n_labels
        loss = loss + 3.0 * (0.2 - attending.mean()) ** 2 / len(parts)
    theirs = torch.autograd.grad(loss, list(mixer.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_attend_with_the_probability_alpha():
    mixer = selective()
    h = inputs(1, 3).expand(4000, -1, -1)
    torch.manual_seed(0)
    attending, alpha = mixer._select(h, training=True)
    torch.testing.assert_close(attending.mean(0), alpha[0], atol=0.03, rtol=0)
    assert set(attending.unique().tolist()) == {0, 1}


def test_evaluation_adds_no_penalty_and_no_noise():
    x = inputs()
    outputs, gradients = [], []
    for weight in (0.0, 5.0):
        mixer = selective(penalty_weight=weight)
        outputs.append(mixer(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), mixer.gate.weight)[0])
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_the_share_of_attending_positions_is_drawn_to_the_capacity():
    mixer = selective(capacity=0.15).train()
    x = inputs(8, 32)
    optimizer = torch.optim.Adam(mixer.gate.parameters(), lr=0.03)
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        (0 * mixer(x)).sum().backward()  # a loss that asks for nothing
        optimizer.step()
    share = torch.stack([mixer._select(x, training=True)[0].mean() for _ in range(20)]).mean().item()
    assert share == pytest.approx(0.15, abs=0.03)


@pytest.mark.parametrize("below", ["mamba2", "sessa"])
def test_training_works_under_checkpointing(below):
    mixer = selective(below=below).train()
    gradients = []
    for run in (mixer, lambda x: checkpoint(mixer, x, use_reentrant=False)):
        torch.manual_seed(0)
        y = run(inputs())
        gradients.append(torch.autograd.grad(y.square().sum(), list(mixer.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [False, True], ids=["bf16-mixed", "bf16-true"])
def test_training_works_under_autocast(low):
    mixer = selective(below="mamba2").float().train()
    if low:
        to_bf16(mixer)
    x = inputs().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        attending, _ = mixer._select(mixer.below(x), training=True)
    assert attending.dtype == torch.float32
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_training_compiles_in_one_graph():
    torch._dynamo.reset()
    mixer = selective(below="mamba2", window=4).train()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    segment_ids = (torch.arange(21) // 8).expand(2, -1)
    for segments in (None, segment_ids):
        results = []
        for run in (mixer, compiled):
            torch.manual_seed(0)
            y = run(inputs(), segments)
            results.append((y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
