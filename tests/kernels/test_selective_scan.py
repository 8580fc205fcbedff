"""Letters: B batch, T time, D channels, N state size per channel."""

import itertools

import pytest
import torch
from torch import Tensor

from measure import peak_bytes
from mixerlab.kernels.backend import use_backend
from mixerlab.kernels.selective_scan import chunked, selective_scan

F64 = torch.float64
BACKENDS = ["reference", "chunked"]


def make_inputs(B=2, T=13, D=3, N=4, *, seed=0, dtype=F64) -> list[Tensor]:
    """x, dt, A, B_in, C_out, D_skip, initial_state."""
    torch.manual_seed(seed)
    x, dt = torch.randn(B, T, D, dtype=F64), torch.rand(B, T, D, dtype=F64) / 2
    A = -torch.rand(D, N, dtype=F64) * 3 - 0.1
    B_in, C_out = torch.randn(2, B, T, N, dtype=F64)
    D_skip, initial_state = torch.randn(D, dtype=F64), torch.randn(B, D, N, dtype=F64)
    return [y.to(dtype) for y in (x, dt, A, B_in, C_out, D_skip, initial_state)]


def segments(T: int) -> Tensor:
    """Ids (2, T): segments of several lengths, one position included, and one row that is a single segment."""
    ids = torch.arange(T) // 37 + (torch.arange(T) > 5).long() + (torch.arange(T) > 6).long()
    return torch.stack((ids, torch.zeros_like(ids)))


def run(inputs, **options):
    *inputs, initial_state = inputs
    return selective_scan(*inputs, initial_state=initial_state, return_state=True, **options)


def gradients(inputs, **options) -> list[Tensor]:
    """Outputs and last state, then the gradient of a weighted sum of both by each input."""
    leaves = [y.detach().clone().requires_grad_() for y in inputs]
    y, state = run(leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()
    return [
        y.detach(),
        state.detach(),
        *torch.autograd.grad((y * weights).sum() + state.square().sum(), leaves),
    ]


def assert_all_close(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the mathematics ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_sum_over_the_past(backend, packed):
    """y_t = sum_{j <= t} <C_t, exp(A sum_{j < i <= t} dt_i) B_j> dt_j x_j + D x_t: the recurrence unrolled."""
    x, dt, A, B_in, C_out, D_skip, h = inputs = make_inputs()
    ids = segments(13) if packed else torch.zeros(2, 13, dtype=torch.int64)
    expected = D_skip * x
    for b, t in itertools.product(range(2), range(13)):
        for j in range(t + 1):
            if ids[b, j] == ids[b, t]:
                decay = (A * dt[b, j + 1 : t + 1].sum(0)[:, None]).exp()  # (D, N)
                expected[b, t] += (decay * B_in[b, j] * C_out[b, t]).sum(-1) * dt[b, j] * x[b, j]
        if ids[b, t] == ids[b, 0]:
            decay = (A * dt[b, : t + 1].sum(0)[:, None]).exp()  # (D, N)
            expected[b, t] += (decay * h[b] * C_out[b, t]).sum(-1)
    y, _ = run(inputs, segment_ids=ids if packed else None, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257, 1000])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_the_recurrence_with_all_gradients(T, packed, monkeypatch):
    inputs = make_inputs(T=T)
    options = {"segment_ids": segments(T) if packed else None}
    expected = gradients(inputs, backend="reference", **options)
    assert_all_close(gradients(inputs, backend="chunked", **options), expected)
    monkeypatch.setattr(chunked, "chunk_length", lambda D, N, device: 16)  # many chunks, the last one ragged
    assert_all_close(gradients(inputs, backend="chunked", **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments_equal_the_documents_apart(backend):
    x, dt, A, B_in, C_out, D_skip, _ = make_inputs(B=1, T=20)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 1, 12]))[None]
    packed, state = selective_scan(
        x, dt, A, B_in, C_out, D_skip, segment_ids=ids, return_state=True, backend=backend
    )
    apart = []
    for x_, dt_, B_, C_ in zip(*(y.split([7, 1, 12], dim=1) for y in (x, dt, B_in, C_out)), strict=True):
        apart.append(selective_scan(x_, dt_, A, B_, C_, D_skip, return_state=True, backend=backend))
    torch.testing.assert_close(packed, torch.cat([y for y, _ in apart], dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, apart[-1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_carried_state_continues_the_sequence(backend):
    *inputs, state = make_inputs(T=50)
    whole, last = run([*inputs, state], backend=backend)
    x, dt, A, B_in, C_out, D_skip = inputs
    outputs = []
    for pieces in zip(*(y.split([1, 30, 19], dim=1) for y in (x, dt, B_in, C_out)), strict=True):
        y, state = run([*pieces[:2], A, *pieces[2:], D_skip, state], backend=backend)
        outputs.append(y)
    assert_all_close([torch.cat(outputs, dim=1), state], [whole, last], 1e-12)


# ---- numerics ----


def wild_inputs(T: int) -> list[Tensor]:
    """Steps from 1e-8 to 100, mixed in one sequence: decays from 1 down to an underflow."""
    x, dt, A, B_in, C_out, D_skip, h = make_inputs(B=1, T=T, D=4, N=4)
    dt = 10 ** (torch.rand_like(dt) * 10 - 8)
    A = -torch.arange(1.0, 5.0, dtype=F64).expand(4, 4)
    return [y.float().double() for y in (x, dt, A, B_in, C_out, D_skip, h)]  # exact in float32


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b).norm() / b.norm())


def test_stays_accurate_in_float32_for_long_sequences_and_wild_steps():
    inputs = wild_inputs(16384)
    with torch.no_grad():
        expected = run(inputs, backend="reference")
        actual = run([y.float() for y in inputs], backend="chunked")
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-4
    exact = gradients(inputs, backend="chunked")  # float64; equal to the recurrence by the tests above
    assert_all_close(exact[:2], expected)
    for a, b in zip(gradients([y.float() for y in inputs], backend="chunked"), exact, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("step", [0.0, 1e-8, 1e4])
def test_equal_steps_of_any_size_are_finite(step):
    inputs = [y.float() for y in make_inputs(T=300)]
    inputs[1] = torch.full_like(inputs[1], step)
    with torch.autograd.set_detect_anomaly(True):
        for value in gradients(inputs, backend="chunked"):
            assert value.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_inputs_give_low_precision_outputs_and_a_float32_state(backend):
    inputs = make_inputs(T=100)
    low = [y.bfloat16() if i in (0, 3, 4) else y.float() for i, y in enumerate(inputs)]  # x, B_in, C_out
    exact = run([y.double() for y in low])
    leaves = [y.requires_grad_() for y in low]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = run(leaves, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative(y, exact[0]) < 4e-3  # one rounding to bf16
    assert relative(state, exact[1]) < 1e-5
    for leaf, gradient in zip(
        leaves, torch.autograd.grad(y.float().sum() + state.sum(), leaves), strict=True
    ):
        assert gradient.dtype == leaf.dtype


def test_result_is_the_same_on_every_run():
    inputs = [y.float() for y in make_inputs(T=200)]
    for a, b in zip(gradients(inputs), gradients(inputs), strict=True):
        assert torch.equal(a, b)


# ---- as an operator ----


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed):
    inputs = [y.requires_grad_() for y in make_inputs(T=11)]
    ids = segments(11) if packed else None
    assert torch.autograd.gradcheck(
        lambda *y: run(y, segment_ids=ids, backend="chunked"), inputs, fast_mode=True
    )


def test_torch_func_transforms_go_through_chunked():
    inputs = tuple(make_inputs(T=9))
    everything = tuple(range(len(inputs)))

    def loss(*y, backend):
        output, state = run(y, backend=backend)
        return output.square().sum() + state.sum()

    def per_sample(*y, backend):
        mapped = tuple(None if i in (2, 5) else 0 for i in everything)  # A and D_skip are shared
        one = torch.func.grad(
            lambda *z: loss(*(v if i in (2, 5) else v[None] for i, v in enumerate(z)), backend=backend),
            argnums=everything,
        )
        return torch.func.vmap(one, in_dims=mapped)(*y)

    def jacobian(*y, backend):
        return torch.func.jacrev(lambda A: run((*y[:2], A, *y[3:]), backend=backend)[1])(y[2])

    for transform in (per_sample, lambda *y, backend: (jacobian(*y, backend=backend),)):
        assert_all_close(transform(*inputs, backend="chunked"), transform(*inputs, backend="reference"))


def test_second_derivative_raises():
    inputs = [y.requires_grad_() for y in make_inputs()]
    (gradient,) = torch.autograd.grad(run(inputs, backend="chunked")[0].sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(gradient.square().sum(), inputs[1])


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed):
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    for T in (20, 33):
        leaves = [y.requires_grad_() for y in make_inputs(T=T)]
        ids = segments(T) if packed else None
        y, expected = (
            f(*leaves[:6], initial_state=leaves[6], segment_ids=ids) for f in (compiled, selective_scan)
        )
        torch.testing.assert_close(y, expected)
        assert_all_close(
            torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), 1e-12
        )


def test_operators_are_registered_correctly():
    x, dt, A, B_in, C_out, _, h = make_inputs(T=20)
    rates, resets = A.expand(2, *A.shape), torch.rand(2, 20) < 0.2
    args = (x, dt, rates, B_in, C_out, h, resets, 16, False)
    torch.library.opcheck(torch.ops.mixerlab.selective_scan_forward.default, args)
    y, state, boundaries = torch.ops.mixerlab.selective_scan_forward(*args)
    backward_args = (y, state, x, dt, rates, B_in, C_out, boundaries, resets, 16, False)
    torch.library.opcheck(torch.ops.mixerlab.selective_scan_backward.default, backward_args)


def test_takes_views_and_inputs_without_gradient():
    x, dt, A, B_in, C_out, D_skip, h = make_inputs()
    views = [x.mT.contiguous().mT, dt[:, :1].expand_as(dt), A.mT.contiguous().mT, B_in, C_out, D_skip, h]
    dense = [y.contiguous() for y in views]
    assert_all_close(gradients(views, backend="chunked"), gradients(dense, backend="reference"))
    x.requires_grad_()
    selective_scan(x, dt, A, B_in, C_out, backend="chunked").sum().backward()
    assert x.grad is not None


def test_use_backend_decides_what_auto_means():
    inputs = [y.requires_grad_() for y in make_inputs()]
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(run(inputs)[0].sum(), inputs[0], create_graph=True)
        torch.autograd.grad(gradient.square().sum(), inputs[1])  # which chunked refuses


def test_memory_grows_linearly_and_holds_few_states(tmp_path):
    D, N = 64, 16

    def peak(T):
        inputs = [y.requires_grad_() for y in make_inputs(1, T, D, N, dtype=torch.float32)]
        return peak_bytes(lambda: run(inputs, backend="chunked")[0].sum().backward(), tmp_path)

    short, long = peak(4096), peak(8192)
    assert long < 2.1 * short
    assert long < 8192 * D * N * 4 / 2  # half of what all states alone would take


# ---- errors ----


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 13), r"x has shape \(2, 13\), expected \(B, T, D\)"),
        ("x", torch.zeros(2, 0, 3), "x has no positions"),
        ("dt", torch.zeros(2, 12, 3), r"dt has shape \(2, 12, 3\), expected .*: \(2, 13, 3\)"),
        ("A", torch.zeros(3), r"A has shape \(3,\), expected \(D, N\)"),
        ("B_in", torch.zeros(2, 13, 5), r"B_in has shape \(2, 13, 5\)"),
        ("C_out", torch.zeros(2, 13, 4, dtype=torch.int32), "C_out has dtype torch.int32"),
        ("D_skip", torch.zeros(4), r"D_skip has shape \(4,\)"),
        ("initial_state", torch.zeros(2, 4, 3), r"initial_state has shape \(2, 4, 3\)"),
        ("segment_ids", torch.zeros(2, 13), "segment_ids has dtype torch.float32, expected torch.int64"),
        ("dt", torch.zeros(2, 13, 3, device="meta"), "dt is on device meta"),
        ("backend", "cuda", "unknown backend 'cuda'"),
        ("backend", "triton", "it is on device cpu"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(name, value, message):
    names = ("x", "dt", "A", "B_in", "C_out", "D_skip", "initial_state")
    arguments = dict(zip(names, make_inputs(), strict=True)) | {name: value}
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)
