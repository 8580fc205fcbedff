"""The SSD operator's matrix form against its recurrence, and the recurrence against a sum written out."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels.ssd import ssd

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
