"""What test_feedback_triton.py runs in a process of its own: the kernels on a GPU, else in Triton's interpreter.

Letters: B batch, H heads, T new positions, L past positions, K key width, P value width.
"""

import itertools
import os
import statistics
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from differentiable import func_grad, func_jacrev, func_vjp, func_vmap, func_vmap_of_grad
from mixerlab.kernels.feedback import feedback_attention
from mixerlab.kernels.feedback.triton import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = tiles.Tiles(tile=32, step=16, block=16, slice=16, widest=32)

if INTERPRETED:
    import interpreter

    interpreter.mend()


@pytest.fixture(autouse=True)
def _poison():
    """Fills memory with NaN that is allocated and not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several panels and tiles at lengths that the interpreter affords."""
    monkeypatch.setattr(tiles, "HALF", SMALL)
    monkeypatch.setattr(tiles, "SINGLE", SMALL)


def make_inputs(B=2, H=2, T=77, K=20, P=24, L=0, *, sharpness=1.0, gain=0.999, seed=0, dtype=FP32):
    """q, k, f, gamma with gains of both signs, and k and s of L past positions if there are any."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, H, T, K) * sharpness, torch.randn(B, H, T, K)
    f, gamma = torch.randn(B, H, T, P), gain * torch.tanh(3 * torch.randn(B, H, T))
    past = [torch.randn(B, H, L, K), torch.randn(B, H, L, P)] if L else []
    low = [x.to(DEVICE, dtype) for x in (q, k, f, *past)]
    return [*low[:3], gamma.to(DEVICE), *low[3:]]


def results(inputs, weights, **options):
    """s, then the gradients of <s, weights> by each input: q, k, f, gamma, and k and s of a past."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    past = tuple(leaves[4:]) or None
    s = feedback_attention(*leaves[:4], past=past, **options)
    return [s.detach(), *torch.autograd.grad((s * weights).sum(), leaves, materialize_grads=True)]


def errors(actual, truth) -> list[float]:
    """RMS errors relative to the truth's RMS."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(actual, truth, strict=True)]


def error_of(inputs, **options) -> float:
    """The worst relative error to the float64 reference, over s and all gradients."""
    weights = torch.randn_like(inputs[2])
    actual = results(inputs, weights, backend="triton", **options)
    options.pop("chunk_size", None)
    truth = results([x.double() for x in inputs], weights.double(), backend="reference", **options)
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]
    return max(errors(actual, truth))


def packed(B, T, length):
    return (torch.arange(T, device=DEVICE) // length).expand(B, T)


# Over 4 eps of the latter two. The first is 3 times what the GPU's exponential leaves, which errs by 2 eps.
TOLERANCES = [(FP32, 1e-6), (FP16, 2e-3), (BF16, 2e-2)]


# ---- against the reference in float64 ----


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype_tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("past", [0, 13, 40])
def test_equals_the_reference_with_all_gradients(dtype_tolerance, past):
    dtype, tolerance = dtype_tolerance
    assert error_of(make_inputs(1, 1 + (past == 0), T=77, L=past, dtype=dtype), chunk_size=64) < tolerance


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("panels", [2, 3])
@pytest.mark.parametrize("case", ["plain", "past", "segments"])
def test_dq_of_several_panels_at_once(panels, case, monkeypatch):
    monkeypatch.setattr(tiles, "DQ_PANELS", panels)
    inputs = make_inputs(1, 1, T=170, L=100 * (case == "past"))
    ids = packed(1, 170, 45) if case == "segments" else None
    assert error_of(inputs, chunk_size=32, segment_ids=ids) < 2e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype_tolerance", TOLERANCES[:2], ids=str)
def test_products_wider_than_a_tile(dtype_tolerance, monkeypatch):
    dtype, tolerance = dtype_tolerance
    for name in ("HALF", "SINGLE"):
        monkeypatch.setattr(tiles, name, replace(SMALL, widest=64))
    assert error_of(make_inputs(1, 1, T=77, K=100, P=60, dtype=dtype), chunk_size=64) < tolerance


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "shape", [(1, 1, 5, 16, 16), (3, 1, 32, 33, 17), (1, 2, 50, 48, 100), (1, 1, 130, 20, 20)]
)
def test_any_length_width_and_number_of_heads(shape):
    assert error_of(make_inputs(*shape)) < 2e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("length", [1, 7, 45, 200])
@pytest.mark.parametrize("dtype_tolerance", TOLERANCES[:2], ids=str)
def test_packed_segments(length, dtype_tolerance):
    dtype, tolerance = dtype_tolerance
    inputs = make_inputs(1, 1, T=101, dtype=dtype)
    if length == 1:  # every position is the first of its segment
        s, dq, dk, df, dgamma = results(inputs, inputs[2], backend="triton", segment_ids=packed(1, 101, 1))
        assert torch.equal(s, inputs[2])
        assert torch.equal(df, inputs[2])
        assert not any(x.count_nonzero() for x in (dq, dk, dgamma))
    else:
        assert error_of(inputs, segment_ids=packed(1, 101, length), chunk_size=64) < tolerance


@pytest.mark.usefixtures("small_tiles")
def test_rows_with_segments_of_their_own():
    ids = torch.tensor([[0] * 3 + [4] * 60 + [9] * 14, [1] * 76 + [2]], device=DEVICE)
    assert error_of(make_inputs(2, 1, T=77), segment_ids=ids, chunk_size=32) < 1e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("lengths", [[0, 70], [33, 1], [64, 32]])
def test_ragged_past(lengths):
    inputs = make_inputs(2, 1, T=40, L=70)
    assert error_of(inputs, past_length=torch.tensor(lengths, device=DEVICE)) < 1e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("chunk_size", [1, 64, 100, 1000])
def test_any_panel_size(chunk_size):
    assert error_of(make_inputs(1, 1, T=100, L=33), chunk_size=chunk_size) < 1e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["plain", "segments", "past"])
def test_programs_that_share_a_sum(case, monkeypatch):
    """As they do where there are few sums of many tiles."""
    inputs = make_inputs(1, 1, T=110, L=30 if case == "past" else 0)
    options = {"segment_ids": packed(1, 110, 90)} if case == "segments" else {}
    monkeypatch.setattr(tiles, "TILES_PER_SPLIT", 1)
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "PROGRAMS", 1)
        alone = results(inputs, inputs[2], backend="triton", chunk_size=64, **options)
    assert error_of(inputs, chunk_size=64, **options) < 1e-6
    shared = results(inputs, inputs[2], backend="triton", chunk_size=64, **options)
    for i in (0, 2):  # s and dk round otherwise
        assert not torch.equal(shared[i], alone[i])


@pytest.mark.parametrize("dtype_tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", ["plain", "segments", "past"])
def test_the_tiles_that_run_on_a_gpu(dtype_tolerance, case):
    dtype, tolerance = dtype_tolerance
    T = 150 if dtype == FP32 else 300  # whose tiles are half as large
    options = {"segment_ids": packed(1, T, 110)} if case == "segments" else {}
    inputs = make_inputs(1, 1, T, 80, 144, L=50 if case == "past" else 0, dtype=dtype)
    assert error_of(inputs, **options, chunk_size=128) < tolerance


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype_tolerance", [(FP32, 1e-5), *TOLERANCES[1:]], ids=str)
@pytest.mark.parametrize("step", [1, -1])
def test_tiles_of_a_row_whose_logits_lie_far_apart(dtype_tolerance, step):
    """Rising, falling and both, by more than the exponents of any dtype take."""
    dtype, tolerance = dtype_tolerance
    q, k, f, gamma = make_inputs(1, 1, T=150, K=16, dtype=dtype)
    q[..., 0] = 16
    k[..., 0] = torch.tensor([0, 6, 25, 12, -9][::step]).repeat_interleave(30)  # times 4 = 16 / sqrt(K)
    assert error_of([q, k, f, gamma], chunk_size=64) < tolerance


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sign", [1, -1])
def test_gains_of_one_sign_near_the_bound(sign):
    inputs = make_inputs(1, 1, 150)
    inputs[3] = torch.full_like(inputs[3], sign * 0.999)
    assert error_of(inputs) < 3e-6


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype_tolerance", TOLERANCES, ids=str)
def test_without_gain_the_output_is_the_input_and_the_gains_gradient_is_right(dtype_tolerance):
    dtype, tolerance = dtype_tolerance
    inputs = make_inputs(1, dtype=dtype)
    inputs[3].zero_()
    weights = torch.randn_like(inputs[2])
    s, dq, dk, df, dgamma = results(inputs, weights, backend="triton")
    assert torch.equal(s, inputs[2])
    assert torch.equal(df, weights)
    assert not any(x.count_nonzero() for x in (dq, dk))
    truth = results([x.double() for x in inputs], weights.double(), backend="reference")
    assert errors([dgamma], truth[-1:])[0] < tolerance


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_position_sees_nothing(dtype):
    inputs = make_inputs(T=1, dtype=dtype)
    s, lse = feedback_attention(*inputs, backend="triton", return_lse=True)
    assert torch.equal(s, inputs[2])
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    _, dq, dk, df, dgamma = results(inputs, inputs[2], backend="triton")
    assert torch.equal(df, inputs[2])
    assert not any(x.count_nonzero() for x in (dq, dk, dgamma))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_only_visible_position_has_weight_1_whatever_its_logit(dtype):
    inputs = make_inputs(T=2, dtype=dtype)
    _, dq, dk, *_ = results(inputs, inputs[2], backend="triton")
    assert max(x.abs().max() for x in (dq, dk)) < 1e-5  # 0 but for a division that need not be exact


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("past", [0, 20])
def test_log_sum_exp(past):
    inputs = make_inputs(1, L=past, sharpness=10.0)
    pair = tuple(inputs[4:]) or None
    _, lse = feedback_attention(*inputs[:4], past=pair, return_lse=True, backend="triton")
    _, truth = feedback_attention(*inputs[:4], past=pair, return_lse=True, backend="reference")
    torch.testing.assert_close(lse, truth, rtol=4e-6, atol=4e-6)  # of logits up to 100
    assert lse.dtype == FP32
    assert not lse.requires_grad


# ---- accuracy against the textbook composition ----


def lengths_and_dtypes():
    gpu = pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU: too long for the interpreter"
    )
    for T, dtype in itertools.product((3, 40, 150, 1024, 4096), (BF16, FP16, FP32)):
        yield pytest.param(T, dtype, marks=() if T <= 150 or (T, dtype) == (1024, BF16) else gpu)


@pytest.mark.parametrize(("T", "dtype"), list(lengths_and_dtypes()), ids=str)
def test_error_is_at_most_1_2_times_the_textbook_compositions(T, dtype, monkeypatch):
    if INTERPRETED:  # whose time goes by the number of steps
        monkeypatch.setattr(tiles, "SINGLE", replace(tiles.SINGLE, step=32))
    cases = list(itertools.product([0.1, 1.0, 8.0], [0.5, 0.999]))
    if INTERPRETED:
        cases = [(0.1, 0.999), (8.0, 0.999), (1.0, 0.5)][: 2 if T > 100 else 3]
    for sharpness, gain in cases:
        ours, textbooks = [], []
        for seed in range(5):
            options = {"sharpness": sharpness, "gain": gain, "seed": seed, "dtype": dtype}
            inputs = make_inputs(-(-12 // T), 1, T, 32, 32, **options)  # one short sequence would be chance
            weights = torch.randn_like(inputs[2])
            truth = results([x.double() for x in inputs], weights.double(), backend="reference")
            ours.append(errors(results(inputs, weights, backend="triton"), truth))
            textbooks.append(errors(results(inputs, weights, backend="reference"), truth))
        for i, name in enumerate(["s", "dq", "dk", "df", "dgamma"]):
            our, textbook = (statistics.median(e[i] for e in es) for es in (ours, textbooks))
            # In float32 both errors are a few roundings, whose number depends on the machine's matrix products.
            floor = 16 if dtype == torch.float32 else 4
            bar = max(1.2 * textbook, floor * torch.finfo(dtype).eps)
            assert our <= bar, (
                f"{name}, sharpness {sharpness}, gain {gain}: {our:.3g}, textbook {textbook:.3g}"
            )


# ---- layouts, dtypes, determinism ----


@pytest.mark.usefixtures("small_tiles")
def test_strided_views_give_the_same_bits_and_so_does_another_run():
    inputs = make_inputs(1, T=40, L=20)
    weights = torch.randn_like(inputs[2])
    plain = results(inputs, weights, backend="triton")
    views = [x.movedim(2, 0).contiguous().movedim(0, 2) for x in inputs]  # laid out T first
    wide = [torch.stack([x, x + 1], dim=-1)[..., 0] for x in inputs]  # every second number
    assert not views[0].is_contiguous()
    assert not wide[0].is_contiguous()
    for other in (inputs, views, wide):
        again = results(other, weights.mT.contiguous().mT, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtypes", [(BF16, FP32, FP32), (FP32, FP16, FP32), (BF16, FP16, BF16)], ids=str)
def test_mixed_dtypes_keep_their_own(dtypes):
    q, k, f, gamma = make_inputs(1, T=40)
    inputs = [q.to(dtypes[0]), k.to(dtypes[0]), f.to(dtypes[1]), gamma.to(dtypes[2])]
    with torch.autocast(DEVICE, BF16):
        assert error_of(inputs) < 1e-2
        assert feedback_attention(*inputs, backend="triton").dtype == dtypes[1]


@pytest.mark.usefixtures("small_tiles")
def test_autocast_changes_nothing():
    inputs = make_inputs(1, T=20)
    weights = torch.ones_like(inputs[2])
    plain = results(inputs, weights, backend="triton")
    with torch.autocast(DEVICE, BF16):
        again = results(inputs, weights, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_inputs_that_the_kernels_cannot_take_are_refused_with_the_reason():
    q, k, f, gamma = make_inputs(T=3)
    for inputs, reason in [
        ((q, k, f, gamma.double()), "float64"),
        ((*(torch.zeros(1, 1, 3, 4097, device=DEVICE),) * 2, f[:1, :1], gamma[:1, :1]), "4096"),
        ((q[:, :, :0], k[:, :, :0], f[:, :, :0], gamma[:, :, :0]), "nothing to compute"),
    ]:
        with pytest.raises(ValueError, match=reason):
            feedback_attention(*inputs, backend="triton")
        feedback_attention(*inputs)  # "auto" takes another
    x, gamma = q[:1, :1, :1, :1].expand(1, 1, 2**21, 1024), gamma[:1, :1, :1].expand(1, 1, 2**21)
    with pytest.raises(ValueError, match="2097152 positions are 1024 wide"):
        feedback_attention(x, x, x, gamma, backend="triton")


# ---- autograd, torch.func, torch.compile ----


def run_triton(q, k, f, gamma):
    return feedback_attention(q, k, f, gamma, backend="triton")


def run_reference(q, k, f, gamma):
    return feedback_attention(q, k, f, gamma, backend="reference")


def assert_all_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("transform", [func_grad, func_vjp, func_vmap, func_jacrev, func_vmap_of_grad])
def test_torch_func_transforms(transform):
    inputs = make_inputs(1, 1, 6, 4, 5)
    assert_all_close(transform(run_triton, inputs), transform(run_reference, inputs))


@pytest.mark.usefixtures("small_tiles")
def test_second_derivative_raises():
    inputs = [x.requires_grad_() for x in make_inputs(1, T=6)]
    (dq,) = torch.autograd.grad(run_triton(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", ["plain", "segments", "past", "autocast", "views"])
def test_compiles_without_a_graph_break(options):
    def loss(q, k, f, gamma, segment_ids, past):
        s, lse = feedback_attention(
            q, k, f, gamma, segment_ids=segment_ids, past=past, return_lse=True, backend="triton"
        )
        return s.square().sum() + lse[..., -1].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for T in (35, 20):
        inputs = [x.requires_grad_() for x in make_inputs(1, T=T)]
        if options == "views":
            inputs = [x.detach().movedim(0, 2).contiguous().movedim(2, 0).requires_grad_() for x in inputs]
        segment_ids = packed(1, T, 20) if options == "segments" else None
        past = tuple(make_inputs(1, T=T, L=6)[4:])
        arguments = [*inputs, segment_ids, past if options == "past" else None]
        with torch.autocast(DEVICE, BF16, enabled=options == "autocast"):
            expected, actual = loss(*arguments), compiled(*arguments)
        assert_all_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", ["plain", "segments", "past"])
def test_operators_are_registered_correctly(case):
    L = 32 if case == "past" else 0
    q, k, f, gamma, *past = make_inputs(2, 1, T=20, L=L)
    s_past = f[:, :, :0]
    length = ids = None
    if case == "past":
        k, s_past = torch.cat([past[0], k], dim=2), past[1]
        length = torch.tensor([20, 32], device=DEVICE)
    if case == "segments":
        ids = packed(2, 20, 9)
    q, k = (x.movedim(0, 2).contiguous().movedim(2, 0) for x in (q, k))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (q, k, f, gamma, s_past, length, ids, 0.5, 32)
    torch.library.opcheck(torch.ops.mixerlab.feedback_triton_forward.default, arguments, test_utils=tests)
    s, *statistics = torch.ops.mixerlab.feedback_triton_forward(*arguments)
    arguments = (torch.randn_like(s), q, k, gamma, s, *statistics, s_past, length, ids, 0.5, 32)
    torch.library.opcheck(torch.ops.mixerlab.feedback_triton_backward.default, arguments, test_utils=tests)


@pytest.mark.usefixtures("small_tiles")
def test_activation_checkpointing():
    inputs = [x.requires_grad_() for x in make_inputs(1, T=20)]
    plain = torch.autograd.grad(run_triton(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(run_triton, *inputs, use_reentrant=False).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("segment_ids", [False, True])
def test_a_cuda_graph_replays_with_other_numbers(segment_ids):
    inputs = [x.requires_grad_() for x in make_inputs(2, 1, 700, 64, 64, dtype=BF16)]
    ids = packed(2, 700, 130).clone() if segment_ids else None

    def step():
        s = feedback_attention(*inputs, segment_ids=ids, backend="triton")
        return s.detach(), *torch.autograd.grad(s.float().square().sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    with torch.no_grad():
        for x, y in zip(inputs, make_inputs(2, 1, 700, 64, 64, seed=1, dtype=BF16), strict=True):
            x.copy_(y)
        if ids is not None:
            ids.copy_(packed(2, 700, 90))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, step(), strict=True))
