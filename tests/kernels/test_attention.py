"""Causal attention: each backend against a loop over positions, and flex_attention's mask against the dense one.

Letters: B batch, T queries, S keys, H query heads, G key-value heads, K key width, P value width.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mixerlab.kernels.attention import causal_attention, flex
from mixerlab.kernels.backend import use_backend

F64 = torch.float64
BACKENDS = ["reference", "sdpa"]
SEGMENTS = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])  # (B, T) = (2, 12)


def make_inputs(T=12, S=12, *, B=2, H=4, G=2, K=8, P=5, dtype=F64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(*shape, dtype=F64, generator=generator).to(dtype)
        for shape in ((B, H, T, K), (B, G, S, K), (B, G, S, P))
    )
    return q, k, v


def some(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < 0.4


def loop(q, k, v, seen):
    """seen(b, i, j): does query i see key j?"""
    rows = torch.empty(*q.shape[:3], v.shape[3], dtype=F64)
    for b, h, i in product(*map(range, q.shape[:3])):
        g = h * k.shape[1] // q.shape[1]
        at = [j for j in range(k.shape[2]) if seen(b, i, j)]
        rows[b, h, i] = torch.softmax(k[b, g, at] @ q[b, h, i] / q.shape[3] ** 0.5, dim=0) @ v[b, g, at]
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("selected", [None, some(2, 12)], ids=["all keys", "selected keys"])
@pytest.mark.parametrize("window", [None, 1, 5, 12])
def test_equals_a_loop_over_positions(window, selected, segment_ids, backend):
    def seen(b, i, j):
        return (
            j <= i
            and (window is None or i - j < window)
            and (segment_ids is None or bool(segment_ids[b, i] == segment_ids[b, j]))
            and (selected is None or j == i or bool(selected[b, j]))
        )

    q, k, v = make_inputs()
    y = causal_attention(q, k, v, segment_ids, window, selected, backend=backend)
    torch.testing.assert_close(y, loop(q, k, v, seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("selected", [None, some(2, 9)], ids=["all keys", "selected keys"])
def test_keys_may_lie_at_any_positions(selected, window, backend):
    at = torch.tensor([[7, 8, 9], [3, 4, 5]])  # (B, T)
    keys_at = torch.tensor([[9, 8, 2, 3, 4, 5, 6, 7, 1], [0, 1, 2, 3, 4, 5, -1, -5, -2]])  # (B, S)

    def seen(b, i, j):
        i, key = int(at[b, i]), int(keys_at[b, j])
        return (
            0 <= key <= i
            and (window is None or i - key < window)
            and (selected is None or key == i or bool(selected[b, j]))
        )

    q, k, v = make_inputs(3, 9)
    y = causal_attention(q, k, v, window=window, selected=selected, positions=(at, keys_at), backend=backend)
    torch.testing.assert_close(y, loop(q, k, v, seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"segment_ids": SEGMENTS}, {"selected": some(2, 12), "window": 3}],
    ids=["plain", "window", "segments", "selected"],
)
def test_gradients_of_the_backends_agree(options: dict[str, Any]):
    results = []
    for backend in BACKENDS:
        inputs = [x.requires_grad_() for x in make_inputs()]
        y = causal_attention(*inputs, **options, backend=backend)
        results.append(torch.autograd.grad((y * torch.cos(y)).sum(), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def composed(monkeypatch):
    """flex_attention as torch composes it on a CPU."""
    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)


@pytest.mark.usefixtures("composed")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("selected", [False, True], ids=["all keys", "selected keys"])
@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("time", [100, 128, 700])
def test_flex_shows_what_the_reference_shows(time, window, selected, packed):
    q, k, v = make_inputs(time, time, H=2, G=1, K=16, P=16)
    ids = torch.stack([(torch.arange(time) > 70).long(), torch.arange(time) // 90]) if packed else None
    chosen = some(2, time) if selected else None
    y = flex.attention_flex(q, k, v, ids, window, chosen)
    expected = causal_attention(q, k, v, ids, window, chosen, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # The blocks that a GPU visits are those with something to see.
    mask = flex.block_mask(ids, window, time, q.device)
    whole = create_block_mask(mask.mask_mod, 2 if packed else None, None, time, time, device="cpu")
    assert torch.equal(mask.to_dense(), whole.to_dense())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 40])
def test_flex_equals_the_reference_with_all_gradients_on_a_gpu(window):
    ids = (torch.arange(300) // 70).expand(2, 300).cuda()
    results = []
    for backend, dtype in (("flex", torch.float32), ("reference", F64)):
        inputs = make_inputs(300, 300, K=32, P=32, dtype=torch.float32)
        q, k, v = (x.to("cuda", dtype).requires_grad_() for x in inputs)
        y = causal_attention(q, k, v, ids, window, backend=backend)
        results.append([y, *torch.autograd.grad((y * torch.cos(y)).sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 5e-3 * b.norm()


# ---- which backend ----


class OnGpu:
    """What the choice of a backend asks of q, k and v."""

    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16

    def __init__(self, *shape):
        self.shape = shape


@pytest.fixture
def chosen(monkeypatch):
    """causal_attention's choice for such tensors, as a function."""
    from mixerlab.kernels import attention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names: list[str] = []

    class Chosen(Exception):
        pass

    def choose(*arguments):
        names.append(original(*arguments))
        raise Chosen

    original = attention.choose
    monkeypatch.setattr(attention, "choose", choose)

    def run(width=64, **options):
        q = OnGpu(2, 4, 300, width)
        with pytest.raises(Chosen):
            causal_attention(q, q, q, **options)
        return names[-1]

    return run


def test_on_a_gpu_no_mask_of_all_positions_is_made(chosen):
    ids, at = torch.zeros(2, 300), (torch.zeros(2, 1), torch.zeros(2, 300))
    assert chosen() == chosen(window=300) == chosen(positions=at) == "sdpa"
    assert chosen(segment_ids=ids) == chosen(window=299) == chosen(selected=ids.bool()) == "flex"
    assert chosen(segment_ids=ids, width=8) == "sdpa"  # flex cannot take it


def test_what_a_backend_cannot_take_is_said():
    q, k, v = make_inputs()
    with pytest.raises(ValueError, match=r"'flex' cannot take this input: it is on device cpu.*sdpa"):
        causal_attention(q, k, v, SEGMENTS, backend="flex")
    with pytest.raises(ValueError, match="exclude each other"):
        causal_attention(q, k, v, SEGMENTS, positions=(SEGMENTS, SEGMENTS))


@pytest.mark.usefixtures("composed")
def test_use_backend_changes_auto(monkeypatch):
    inputs = make_inputs()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    with use_backend("reference"):
        causal_attention(*inputs)
    with pytest.raises(TypeError):
        causal_attention(*inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_stays_and_its_sums_are_float32(backend):
    inputs = make_inputs(60, 60, dtype=torch.bfloat16)
    exact = causal_attention(*(x.double() for x in inputs), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_attention(*inputs, backend=backend)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 5e-3 * exact.norm()
