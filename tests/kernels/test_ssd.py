"""The SSD operator's matrix form against its recurrence, and the recurrence against a sum written out."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mixerlab.kernels.ssd import mamba_ssm_kernel, ssd

BATCH, HEADS, WIDTH, STATE = 2, 4, 3, 5


def inputs(time, groups=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    x = draw(BATCH, time, HEADS, WIDTH)
    dt = draw(BATCH, time, HEADS).exp()
    A = -draw(HEADS).exp()
    B_in, C_out = draw(BATCH, time, groups, STATE), draw(BATCH, time, groups, STATE)
    return [y.requires_grad_() for y in (x, dt, A, B_in, C_out, draw(HEADS))]


def documents(time):
    """Segment ids (BATCH, time) of documents with lengths of their own in each row."""
    index = torch.arange(time)
    return torch.stack([index // 37, (index + 11) // 70])


def with_gradients(backend, arguments, **options):
    y, state = ssd(*arguments, backend=backend, return_state=True, **options)
    generator = torch.Generator().manual_seed(9)
    parts = [(z * torch.randn(z.shape, dtype=z.dtype, generator=generator)).sum() for z in (y, state)]
    loss = torch.stack(parts).sum()
    wanted = [a for a in (*arguments, options.get("initial_state")) if a is not None]
    return [y, state, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 257, 1000])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_chunks_equal_the_recurrence_with_all_gradients(time, groups, packed):
    arguments = inputs(time, groups)
    state = torch.randn(
        BATCH, HEADS, WIDTH, STATE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    options = {"initial_state": state.requires_grad_(), "segment_ids": documents(time) if packed else None}
    ours = with_gradients("chunked", arguments, **options)
    reference = with_gradients("reference", arguments, **options)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_equals_the_sum_over_the_past(backend):
    x, dt, A, B_in, C_out, D = (a.detach() for a in inputs(9))
    y = ssd(x, dt, A, B_in, C_out, D, backend=backend)
    for h in range(HEADS):
        g = h // (HEADS // 2)
        for t in range(9):
            total = D[h] * x[:, t, h]
            for j in range(t + 1):
                decay = (A[h] * dt[:, j + 1 : t + 1, h].sum(1)).exp()  # (B,)
                weight = decay * dt[:, j, h] * (C_out[:, t, g] * B_in[:, j, g]).sum(-1)  # (B,)
                total = total + weight[:, None] * x[:, j, h]
            torch.testing.assert_close(y[:, t, h], total)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_sequence_goes_on_from_its_state(backend):
    x, dt, A, B_in, C_out, D = inputs(90)
    whole, last = ssd(x, dt, A, B_in, C_out, D, return_state=True, backend=backend)
    state, pieces = None, []
    for cut in (slice(0, 1), slice(1, 70), slice(70, 90)):
        cuts = (x[:, cut], dt[:, cut], A, B_in[:, cut], C_out[:, cut], D)
        y, state = ssd(*cuts, initial_state=state, return_state=True, backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_long_sequences_with_steps_of_all_sizes_stay_exact():
    time = 16384
    generator = torch.Generator().manual_seed(0)
    dt = 10 ** (torch.rand(1, time, 2, generator=generator) * 10 - 8)  # 1e-8 to 100
    x = torch.randn(1, time, 2, 4, generator=generator)
    B_in, C_out = (torch.randn(1, time, 1, 8, generator=generator) for _ in range(2))
    A = -torch.tensor([1.0, 16.0])
    arguments = [a.requires_grad_() for a in (x, dt, A, B_in, C_out)]
    ours = ssd(*arguments, backend="chunked")
    exact = ssd(*(a.detach().double() for a in arguments), backend="reference")
    assert torch.isfinite(ours).all()
    assert (ours - exact).norm() <= 1e-4 * exact.norm()
    for gradient in torch.autograd.grad(ours.sum(), arguments):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("steps", [(1e-8, 100.0), (1.0, 100.0), (1e-3, 0.1)])
def test_gradients_stay_exact_with_steps_of_all_sizes(steps):
    generator = torch.Generator().manual_seed(0)
    low, high = steps
    dt = low * (high / low) ** torch.rand(1, 1000, 2, generator=generator)
    x, cotangent = torch.randn(2, 1, 1000, 2, 4, generator=generator)
    B_in, C_out = torch.randn(2, 1, 1000, 1, 8, generator=generator)
    arguments = [a.requires_grad_() for a in (x, dt, -torch.tensor([1.0, 16.0]), B_in, C_out)]
    exact = [a.detach().double().requires_grad_() for a in arguments]
    ours = torch.autograd.grad(ssd(*arguments, backend="chunked"), arguments, cotangent)
    theirs = torch.autograd.grad(ssd(*exact, backend="reference"), exact, cotangent.double())
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_memory_grows_linearly_with_time():
    def peak(time):
        arguments = inputs(time, dtype=torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            ssd(*arguments, backend="chunked").sum().backward()
        live = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most

    assert peak(8192) <= 2.2 * peak(4096)


@pytest.mark.parametrize("transform", ["compile", "func"])
def test_works_under_transforms(transform):
    arguments = inputs(70)

    def loss(x):
        return ssd(x, *arguments[1:]).square().sum()

    (expected,) = torch.autograd.grad(loss(arguments[0]), arguments[0])
    if transform == "func":
        actual = torch.func.grad(loss)(arguments[0].detach())
    else:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(arguments[0]), arguments[0])
    torch.testing.assert_close(actual, expected)


def documented(
    x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, return_final_states=False
):
    """What mamba_ssm's mamba_chunk_scan_combined computes, one position after another.

    Read off its kernels: a row's initial state belongs to sequence 0, the state is dropped where `seq_idx` changes,
    and the final state is that after the last position.
    """
    assert x.dtype == B.dtype == C.dtype
    assert {dt.dtype, A.dtype} == {torch.float32}
    assert chunk_size in (64, 256)
    share = x.shape[2] // B.shape[2]
    B, C = (y.float().repeat_interleave(share, dim=2) for y in (B, C))  # (batch, time, heads, N)
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=torch.float32)
    state = state if initial_states is None else initial_states
    assert state.dtype == torch.float32
    current = torch.zeros(x.shape[0], dtype=torch.int32)
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            state = state * (seq_idx[:, t] == current)[:, None, None, None]
            current = seq_idx[:, t]
        entering = (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None]
        state = (dt[:, t] * A).exp()[..., None, None] * state + entering
        y = (state * C[:, t, :, None]).sum(-1)
        outputs.append(y if D is None else y + D[:, None] * x[:, t].float())
    out = torch.stack(outputs, dim=1).to(x.dtype)
    return (out, state) if return_final_states else out


@pytest.fixture
def stand_in(monkeypatch):
    """A mamba_ssm that runs here, where TF32 is allowed; returns the list of its calls."""
    calls = []

    def kernels(*arguments, **options):
        calls.append(options)
        return documented(*arguments, **options)

    package = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    monkeypatch.setattr(package, "mamba_chunk_scan_combined", kernels, raising=False)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(mamba_ssm_kernel, "why_not_cuda", lambda x: None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    mamba_ssm_kernel._load.cache_clear()
    yield calls
    mamba_ssm_kernel._load.cache_clear()


def initial_state(dtype=torch.float32, width=WIDTH, state=STATE):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, HEADS, width, state, dtype=dtype, generator=generator).requires_grad_()


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("start", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba_ssm_is_given_what_it_expects(groups, start, packed, stand_in):
    arguments = inputs(90, groups, dtype=torch.float32)
    ids = documents(90) + torch.tensor([[5], [-3]])  # ids need not start at 0
    options: dict[str, Any] = {
        "initial_state": initial_state() if start else None,
        "segment_ids": ids if packed else None,
    }
    ours = with_gradients("mamba_ssm", arguments, **options)
    assert len(stand_in) == 1
    for mine, theirs in zip(ours, with_gradients("reference", arguments, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    x, dt, A, B_in, C_out, _ = arguments
    y = ssd(x, dt, A, B_in, C_out, chunk_size=64, **options)  # without a skip, by "auto"
    assert len(stand_in) == 2
    torch.testing.assert_close(
        y, ssd(x, dt, A, B_in, C_out, backend="reference", **options), rtol=1e-4, atol=1e-4
    )


def test_mamba_ssm_may_be_given_mixed_precision(stand_in):
    x, dt, A, B_in, C_out, D = (a.detach() for a in inputs(20, dtype=torch.float32))
    low = (x.bfloat16(), dt, A, B_in.bfloat16(), C_out, D.bfloat16())
    y, state = ssd(*low, initial_state=initial_state().detach().bfloat16(), return_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact = ssd(*low, initial_state=initial_state().detach().bfloat16(), backend="reference")
    torch.testing.assert_close(y, exact, rtol=2e-2, atol=2e-2)
    assert len(stand_in) == 1


def test_a_single_position_needs_no_mamba_ssm(stand_in):
    arguments = inputs(1, dtype=torch.float32)
    torch.testing.assert_close(ssd(*arguments), ssd(*arguments, backend="reference"))
    assert stand_in == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"args": [y.double() for y in a]}, "compute in float32, and an input is float64"),
        (lambda a: {"args": [*a[:2], a[2].double(), *a[3:]]}, "an input is float64"),
        (lambda a: {"chunk_size": 48}, "chunk_size is 48"),
        (
            lambda a: {"args": [*a[:3], *(torch.zeros(BATCH, 9, 2, 257) for _ in "BC")]},
            "the state size is 257",
        ),
    ],
)
def test_what_mamba_ssm_cannot_take_falls_to_the_chunked_backend(change, message, stand_in):
    arguments = [a.detach() for a in inputs(9, dtype=torch.float32)]
    options = change(arguments)
    arguments = options.pop("args", arguments)
    with pytest.raises(ValueError, match=message):
        ssd(*arguments, backend="mamba_ssm", **options)
    torch.testing.assert_close(ssd(*arguments, **options), ssd(*arguments, backend="chunked", **options))
    assert stand_in == []


def test_mamba_ssm_is_left_out_where_float32_must_be_exact(stand_in, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    x, dt, A, B_in, C_out, D = (a.detach() for a in inputs(9, dtype=torch.float32))
    with pytest.raises(ValueError, match="multiply float32 as TF32"):
        ssd(x, dt, A, B_in, C_out, D, backend="mamba_ssm")
    ssd(x.half(), dt, A, B_in.half(), C_out.half(), D, backend="mamba_ssm")
    assert len(stand_in) == 1


@pytest.mark.parametrize("transform", ["compile", "func"])
def test_transforms_do_without_mamba_ssm(transform, stand_in):
    test_works_under_transforms(transform)
    x, *rest = (a.detach() for a in inputs(70, dtype=torch.float32))
    if transform == "func":
        torch.func.grad(lambda x: ssd(x, *rest).sum())(x)
        with pytest.raises(ValueError, match=r"no rules for torch\.func"):
            torch.func.grad(lambda x: ssd(x, *rest, backend="mamba_ssm").sum())(x)
    else:
        torch.compile(lambda x: ssd(x, *rest), fullgraph=True, backend="eager")(x)
    assert stand_in == []


def test_mamba_ssm_says_why_it_cannot_run(monkeypatch):
    arguments = [a.detach().half() for a in inputs(9)]
    with pytest.raises(ValueError, match=r"'mamba_ssm' cannot take this input: it is on device cpu.*chunked"):
        ssd(*arguments, backend="mamba_ssm")
    monkeypatch.setattr(mamba_ssm_kernel, "why_not_cuda", lambda x: None)
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    mamba_ssm_kernel._load.cache_clear()
    with pytest.raises(ValueError, match="mamba_ssm is not installed"):
        ssd(*arguments, backend="mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    mamba_ssm_kernel._load.cache_clear()
    with pytest.raises(ValueError, match=r"mamba_ssm cannot be imported: No module named 'mamba_ssm.ops'"):
        ssd(*arguments, backend="mamba_ssm")
    mamba_ssm_kernel._load.cache_clear()


def why_not_here() -> str | None:
    return mamba_ssm_kernel._load()[1] if torch.cuda.is_available() else "no CUDA device"


@pytest.mark.skipif("why_not_here() is not None", reason=f"mamba_ssm's kernels: {why_not_here()}")
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 5e-3)])
def test_mamba_ssm_equals_the_recurrence_with_all_gradients(dtype, tolerance, packed, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    time, width, state = 600, 32, 64
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).cuda()

    x, B_in, C_out = (
        draw(BATCH, time, *shape).to(dtype) for shape in ((HEADS, width), (2, state), (2, state))
    )
    high = [draw(BATCH, time, HEADS).sigmoid() / 5, -draw(HEADS).exp(), draw(HEADS)]
    start, weights = draw(BATCH, HEADS, width, state), draw(BATCH, time, HEADS, width)
    ids = (documents(time) + 7).cuda() if packed else None
    results = []
    for backend, wide in (("mamba_ssm", False), ("reference", True)):
        leaves = [
            (y.double() if wide else y.clone()).requires_grad_() for y in (x, B_in, C_out, *high, start)
        ]
        x_, B_, C_, dt, A, D, h = leaves
        options = {"initial_state": h, "segment_ids": ids, "return_state": True, "backend": backend}
        y, last = ssd(x_, dt, A, B_, C_, D, **options)
        loss = (y * weights).sum() + last.square().sum()
        results.append([y, last, *torch.autograd.grad(loss, leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()
