"""The gated delta rule's backends against the paper's recurrence written out, and against closed forms."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from mixerlab.kernels.gated_delta_rule import gated_delta_rule

BATCH, HEADS, KEY, VALUE = 2, 3, 5, 4


def inputs(time, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(BATCH, time, HEADS, *shape, dtype=dtype, generator=generator)

    q, k = draw(KEY), normalize(draw(KEY), dim=-1)
    log_decay = -0.1 * draw().exp()
    return [x.requires_grad_() for x in (q, k, draw(VALUE), log_decay, draw().sigmoid())]


def initial_state():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, HEADS, VALUE, KEY, dtype=torch.float64, generator=generator).requires_grad_()


def documents(time):
    """Segment ids (BATCH, time) of documents with lengths of their own in each row."""
    index = torch.arange(time)
    return torch.stack([index // 37, 5 + (index + 11) // 70])


def naive(q, k, v, log_decay, beta, initial_state=None, segment_ids=None):
    """Equation 10 of arXiv 2412.06464 as it stands, with the K x K matrix of each step."""
    rows = []
    for b in range(q.shape[0]):
        state = q.new_zeros(HEADS, VALUE, KEY) if initial_state is None else initial_state[b]
        outputs = []
        for t in range(q.shape[1]):
            if t and segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                state = torch.zeros_like(state)
            key, share = k[b, t], beta[b, t, :, None, None]  # (H, K), (H, 1, 1)
            outer = key[:, :, None] * key[:, None, :]  # (H, K, K)
            step = log_decay[b, t].exp()[:, None, None] * (torch.eye(KEY, dtype=q.dtype) - share * outer)
            state = state @ step + share * v[b, t][:, :, None] * key[:, None, :]
            outputs.append(torch.einsum("hpk,hk->hp", state, q[b, t]))
        rows.append((torch.stack(outputs), state))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def with_gradients(function, arguments, **options):
    y, state = function(*arguments, **options)
    generator = torch.Generator().manual_seed(9)
    parts = [(z * torch.randn(z.shape, dtype=z.dtype, generator=generator)).sum() for z in (y, state)]
    wanted = [*arguments, options["initial_state"]]
    return [y, state], torch.autograd.grad(parts[0] + parts[1], wanted)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_equals_the_papers_recurrence_with_all_gradients(backend, time, packed):
    arguments = inputs(time)
    options = {"initial_state": initial_state(), "segment_ids": documents(time) if packed else None}

    def ours(*arguments, **options):
        return gated_delta_rule(*arguments, return_state=True, backend=backend, **options)

    values, gradients = with_gradients(ours, arguments, **options)
    expected, expected_gradients = with_gradients(naive, arguments, **options)
    for mine, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 16, 37, 1000])
def test_the_size_of_chunks_makes_no_difference(size):
    arguments = inputs(90)
    options = {"initial_state": initial_state(), "segment_ids": documents(90), "return_state": True}
    ours = gated_delta_rule(*arguments, backend="chunked", chunk_size=size, **options)
    for mine, theirs in zip(ours, gated_delta_rule(*arguments, backend="reference", **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_sequence_goes_on_from_its_state(backend):
    arguments = inputs(90)
    whole, last = gated_delta_rule(*arguments, return_state=True, backend=backend)
    state, pieces = None, []
    for cut in (slice(0, 1), slice(1, 70), slice(70, 90)):
        y, state = gated_delta_rule(
            *(x[:, cut] for x in arguments), initial_state=state, return_state=True, backend=backend
        )
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_key_finds_the_value_last_written_to_it(backend):
    """With orthonormal keys, a share of 1 and no decay, however often they are written."""
    time = 200
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(KEY, KEY, dtype=torch.float64, generator=generator))[0]
    written = torch.randint(KEY, (time,), generator=generator)
    asked = torch.randint(KEY, (time,), generator=generator)
    v = torch.randn(1, time, 1, VALUE, dtype=torch.float64, generator=generator)
    still, whole = torch.zeros(1, time, 1, dtype=torch.float64), torch.ones(1, time, 1, dtype=torch.float64)
    q, k = basis[asked][None, :, None], basis[written][None, :, None]
    y = gated_delta_rule(q, k, v, still, whole, backend=backend)
    for t in range(time):
        before = [s for s in range(t + 1) if written[s] == asked[t]]
        expected = v[0, before[-1], 0] if before else torch.zeros(VALUE, dtype=torch.float64)
        torch.testing.assert_close(y[0, t, 0], expected, rtol=1e-12, atol=1e-12)


def test_one_key_for_all_positions_stays_exact_in_float32():
    """The hardest triangular system: every entry below the diagonal is 1."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 2048, 1, VALUE, generator=generator)
    k = torch.zeros(1, 2048, 1, KEY)
    k[..., 0] = 1
    y = gated_delta_rule(k, k, v, torch.zeros(1, 2048, 1), torch.ones(1, 2048, 1), backend="chunked")
    torch.testing.assert_close(y, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decays", [(1e-8, 100.0), (1.0, 100.0), (1e-3, 0.1)])
def test_values_and_gradients_stay_exact_in_float32_with_decays_of_all_sizes(decays):
    time = 1500
    generator = torch.Generator().manual_seed(0)
    low, high = decays
    log_decay = -low * (high / low) ** torch.rand(1, time, 2, generator=generator)
    beta = torch.rand(1, time, 2, generator=generator)
    q, k, v, cotangent = torch.randn(4, 1, time, 2, 8, generator=generator)
    arguments = [x.requires_grad_() for x in (q, normalize(k, dim=-1), v, log_decay, beta)]
    exact = [x.detach().double().requires_grad_() for x in arguments]
    ours = gated_delta_rule(*arguments, backend="chunked")
    theirs = gated_delta_rule(*exact, backend="reference")
    assert (ours - theirs).norm() <= 2e-6 * theirs.norm()
    for a, b in zip(
        torch.autograd.grad(ours, arguments, cotangent),
        torch.autograd.grad(theirs, exact, cotangent.double()),
        strict=True,
    ):
        assert (a - b).norm() <= 5e-6 * b.norm()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_low_precision_rounds_what_is_read_and_not_the_state(backend):
    arguments = [x.detach() for x in inputs(1000, dtype=torch.float32)]
    low = [x.bfloat16() for x in arguments[:3]] + arguments[3:]
    y, state = gated_delta_rule(*low, return_state=True, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, last = gated_delta_rule(*(x.double() for x in low), return_state=True, backend="reference")
    assert (y.double() - exact).norm() <= 1e-2 * exact.norm()
    assert (state - last).norm() <= 1e-5 * last.norm()


def test_the_gradient_can_be_differentiated_again():
    arguments = [x.detach()[:1, :, :1].requires_grad_() for x in inputs(5)]
    assert torch.autograd.gradgradcheck(
        lambda *a: gated_delta_rule(*a, backend="chunked", chunk_size=3), arguments, fast_mode=True
    )


def test_memory_grows_linearly_with_time():
    def peak(time):
        arguments = inputs(time, dtype=torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gated_delta_rule(*arguments, backend="chunked").sum().backward()
        live = most = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most

    assert peak(4096) <= 2.2 * peak(2048)


@pytest.mark.parametrize("transform", ["compile", "func"])
def test_works_under_transforms(transform):
    q, k, v, log_decay, beta = inputs(70)

    def loss(v):
        return gated_delta_rule(q, k, v, log_decay, beta, backend="chunked").square().sum()

    (expected,) = torch.autograd.grad(loss(v), v)
    if transform == "func":
        actual = torch.func.grad(loss)(v.detach())
    else:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(v), v)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (
            0,
            torch.zeros(2, 0, 3, 5),
            r"q has shape \(2, 0, 3, 5\), expected \(B, T, H, K\) with T at least 1",
        ),
        (1, torch.zeros(2, 9, 3, 4), r"k has shape .*, as q: \(2, 9, 3, 5\)"),
        (2, torch.zeros(2, 8, 3, 4), r"v has shape \(2, 8, 3, 4\), expected \(B, T, H, P\): \(2, 9, 3, 4\)"),
        (3, torch.zeros(2, 9, 1), r"log_decay has shape \(2, 9, 1\)"),
        (4, torch.ones(2, 9, 3, dtype=torch.int64), r"beta has dtype torch.int64, expected a floating-point"),
    ],
)
def test_what_does_not_fit_is_named(position, wrong, message):
    arguments = [x.detach() for x in inputs(9)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*arguments)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"initial_state": torch.zeros(2, 3, 5, 4)}, r"initial_state has shape .*: \(2, 3, 4, 5\)"),
        ({"segment_ids": torch.zeros(2, 9)}, r"segment_ids has dtype torch.float32, expected torch.int64"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        (
            {"backend": "triton"},
            r"unknown backend 'triton', expected one of \['auto', 'fla', 'chunked', 'reference'\]",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_named(option, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*inputs(9), **option)
