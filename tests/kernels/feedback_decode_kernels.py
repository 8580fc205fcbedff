"""What test_feedback_decode.py runs in a process of its own: decode.py on a GPU, else in Triton's interpreter.

Letters: B batch, H heads, L cached positions, K key width, P value width.
"""

import os

import numpy as np
import pytest
import torch

from mixerlab.kernels.feedback import feedback_attention
from mixerlab.kernels.feedback.step import step_fused
from mixerlab.mixers import build_mixer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FP16, FP32 = torch.float16, torch.float32
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [FP16, FP32, pytest.param(torch.bfloat16, marks=needs_gpu)]  # the interpreter truncates to bfloat16


@pytest.fixture(autouse=True)
def _poison():
    """Fills memory with NaN that is allocated and not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(B=2, H=2, L=77, K=20, P=24, *, sharpness=1.0, seed=0, dtype=FP32):
    """q, k, f, gamma of one new position, gains of both signs; k and s of L past ones."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, H, 1, K) * sharpness, torch.randn(B, H, 1, K)
    f, gamma = torch.randn(B, H, 1, P), 0.999 * torch.tanh(3 * torch.randn(B, H, 1))
    k_past, s_past = torch.randn(B, H, L, K), torch.randn(B, H, L, P)
    return [x.to(DEVICE, dtype) for x in (q, k, f)] + [
        gamma.to(DEVICE),
        *(x.to(DEVICE, dtype) for x in (k_past, s_past)),
    ]


def step(inputs, length=None, backend="triton"):
    *new, k_past, s_past = inputs
    return feedback_attention(
        *new, past=(k_past, s_past), past_length=length, return_lse=True, backend=backend
    )


def lengths(*values):
    return torch.tensor(values, device=DEVICE)


def assert_agrees(inputs, length=None):
    """s within the rounding of its dtype of the float64 reference, lse within that of float32."""
    s, lse = step(inputs, length)
    truth, true_lse = step([x.double() for x in inputs], length, "reference")
    assert s.dtype == inputs[2].dtype
    assert lse.dtype == FP32
    allowed = 0.5 * torch.finfo(s.dtype).eps if s.dtype != FP32 else 4e-7
    assert (s.double() - truth).norm() <= allowed * truth.norm()
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)


# ---- against the reference in float64 ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [None, (0, 77), (1, 32), (33, 64)], ids=str)
def test_equals_the_reference_whatever_the_length(length, dtype):
    assert_agrees(make_inputs(dtype=dtype), None if length is None else lengths(*length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "widths", [(16, 16), (4, 5), (64, 128), (100, 300), (600, 16), (1024, 1024)], ids=str
)
def test_any_width(widths, dtype):
    assert_agrees(make_inputs(1, 1, 40, *widths, dtype=dtype))


def test_one_head_4096_wide():
    assert_agrees(make_inputs(1, 1, 3, 4096, 4096))


@pytest.mark.parametrize("L", [1, 31, 2048, 2100])  # beyond what `combine` takes at once
def test_any_number_of_positions(L):
    assert_agrees(make_inputs(1, 1, L, 16, 16), lengths(L))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "L", [40, 100, 230, 500, 600]
)  # one block of 64, 128, 256 and 512 positions; two of 512
def test_larger_blocks(L, dtype, monkeypatch):
    from mixerlab.kernels.feedback.triton import decode

    monkeypatch.setattr(decode, "_MOST_BLOCKS", 1)
    assert_agrees(make_inputs(1, 1, L, 20, 70, dtype=dtype))
    inputs, length = make_inputs(2, 1, L, 40, 24, dtype=dtype), lengths(L - 7, L // 2 + 1)
    assert_agrees(inputs, length)
    expected = step(inputs, length)
    apart = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in inputs]  # every second number
    assert_agrees(apart, length)
    for b, n in enumerate(length.tolist()):  # what is not valid is not read
        inputs[4][b, :, n:] = inputs[5][b, :, n:] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(step(inputs, length), expected, strict=True))


@pytest.mark.parametrize("sharpness", [0.01, 30.0, 1000.0])
def test_diffuse_and_sharp_routing(sharpness):
    assert_agrees(make_inputs(L=150, sharpness=sharpness, dtype=FP16))


def test_operands_of_several_dtypes():
    q, k, f, gamma, k_past, s_past = make_inputs()
    s, _ = step([q.half(), k.half(), f, gamma.half(), k_past.half(), s_past])
    rounded = [x.double() for x in (q.half(), k.half(), f, gamma.half(), k_past.half(), s_past)]
    torch.testing.assert_close(s.double(), step(rounded, backend="reference")[0], rtol=1e-6, atol=1e-6)


def test_where_nothing_is_visible_the_output_is_the_input():
    inputs = make_inputs(dtype=FP16)
    s, lse = step(inputs, lengths(0, 0))
    assert torch.equal(s, inputs[2])
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


# ---- what lies in memory ----


def test_what_is_not_valid_is_not_read():
    inputs, length = make_inputs(L=150), lengths(5, 70)
    expected = step(inputs, length)
    for b, n in enumerate(length.tolist()):
        inputs[4][b, :, n:] = inputs[5][b, :, n:] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(step(inputs, length), expected, strict=True))


def test_a_length_beyond_the_cache_reads_no_further():
    inputs = make_inputs(L=40)
    longer = [x if i < 4 else torch.cat([x, torch.full_like(x, torch.nan)], 2) for i, x in enumerate(inputs)]
    views = [*longer[:4], longer[4][:, :, :40], longer[5][:, :, :40]]
    assert all(torch.equal(a, b) for a, b in zip(step(views, lengths(40, 90)), step(inputs), strict=True))


def test_strided_views_give_the_same_bits_and_so_does_another_run():
    inputs, length = make_inputs(L=90), lengths(33, 90)
    expected = step(inputs, length)
    layouts = {
        "again": inputs,
        "positions first": [x.movedim(2, 0).contiguous().movedim(0, 2) for x in inputs],
        "every second number": [torch.stack([x, x + 1], dim=-1)[..., 0] for x in inputs],
        "heads of a wider row": [torch.cat([x, x + 1], dim=1)[:, : x.shape[1]] for x in inputs],
    }
    for name, views in layouts.items():
        assert all(torch.equal(a, b) for a, b in zip(step(views, length), expected, strict=True)), name


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter, which shows every load")
@pytest.mark.parametrize(("most_blocks", "extra"), [(512, 0.09), (64, 0.015)])  # blocks of 32 and of 128
def test_8192_cached_positions_move_few_more_bytes_than_the_cache(most_blocks, extra, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    from mixerlab.kernels.feedback.triton import decode

    monkeypatch.setattr(decode, "_MOST_BLOCKS", most_blocks)

    bytes_of = {"load": 0, "store": 0}
    masked_load, masked_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def moved(pointers, mask):
        return int(np.sum(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8

    def load(self, pointers, mask, *rest):
        bytes_of["load"] += moved(pointers, mask)
        return masked_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        bytes_of["store"] += moved(pointers, mask)
        return masked_store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    inputs = make_inputs(1, 1, 8300, 256, 256, dtype=FP16)
    step(inputs, lengths(8192))
    cache = 2 * 8192 * 256 * FP16.itemsize
    assert (
        cache < bytes_of["load"] < (1 + extra * 2 / 3) * cache
    )  # each number of the cache once, and little else
    assert cache < sum(bytes_of.values()) < (1 + extra) * cache  # the bar is 1.3


# ---- gradients, torch.compile, torch.func, CUDA graphs ----


def test_gradients_flow_where_they_are_wanted():
    q, k, *rest = make_inputs(L=10)  # k is no part of its own row
    inputs, found = [x.requires_grad_() for x in (q, *rest)], []
    for backend in ("triton", "reference"):
        q, f, gamma, *past = inputs
        s = feedback_attention(q, k, f, gamma, past=tuple(past), past_length=lengths(0, 7), backend=backend)
        found.append(torch.autograd.grad(s.square().sum(), inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_by_torch_func():
    q, k, f, gamma, *past = make_inputs(L=10)

    def loss(q, backend):
        return feedback_attention(q, k, f, gamma, past=tuple(past), backend=backend).square().sum()

    found, expected = (torch.func.grad(lambda q, b=b: loss(q, b))(q) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiles_without_a_graph_break():
    inputs = make_inputs(L=40)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(inputs, lengths(3, 40)), step(inputs, lengths(3, 40))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_the_operator_is_registered_correctly():
    q, _, f, gamma, k_past, s_past = make_inputs(L=40)
    for length in (None, lengths(3, 40)):
        torch.library.opcheck(step_fused, (q, k_past, f, gamma, s_past, length, 0.5))


def test_vmap():
    several = [torch.stack(x) for x in zip(*(make_inputs(L=9, seed=seed) for seed in range(3)), strict=True)]
    mapped = torch.func.vmap(lambda *inputs: step(list(inputs)))(*several)
    for i in range(3):
        alone = step([x[i] for x in several])
        assert all(torch.equal(a[i], b) for a, b in zip(mapped, alone, strict=True))


@needs_gpu
def test_a_cuda_graph_replays_with_other_lengths():
    inputs, length = make_inputs(2, 1, 500, 64, 64), lengths(3, 500)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(inputs, length)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(inputs, length)
    length.copy_(lengths(77, 0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, step(inputs, length), strict=True))


# ---- the mixer ----


def test_sessa_decoded_token_by_token_equals_its_forward():
    torch.manual_seed(0)
    mixer = build_mixer({"name": "sessa", "n_feedback_heads": 2, "backend": "triton"}, 32)
    mixer, x = mixer.to(DEVICE), torch.randn(2, 34, 32, device=DEVICE)
    with torch.no_grad():
        state, pieces = mixer.init_state(2, 50, torch.device(DEVICE)), []
        for t in range(34):
            y, state = mixer.extend(x[:, t : t + 1], state)
            pieces.append(y)
    mixer.sessa.backend = "reference"
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_sessa_gives_its_caches_whole(dtype, monkeypatch):
    from mixerlab.kernels.feedback.triton import decode

    given = []
    decoded = decode.feedback_decode

    def watch(q, k_past, f, gamma, s_past, length, scale):
        given.append((k_past.data_ptr(), s_past.data_ptr(), k_past.shape[2]))
        return decoded(q, k_past, f, gamma, s_past, length, scale)

    monkeypatch.setattr(decode, "feedback_decode", watch)
    mixer = build_mixer({"name": "sessa", "backend": "triton"}, 32).to(DEVICE)
    state = mixer.init_state(2, 50, torch.device(DEVICE), dtype)
    with torch.no_grad():
        for _ in range(3):
            y, state = mixer.extend(torch.randn(2, 1, 32, device=DEVICE), state)
    assert given == [(state.k_fb.data_ptr(), state.s.data_ptr(), 50)] * 3
    assert y.dtype == FP32
