"""Letters: B batch, H heads, T new positions, L past positions, S = L + T, K key width, P value width."""

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from differentiable import func_grad, func_jacrev, func_vjp, func_vmap, func_vmap_of_grad
from dispatched import dispatched
from measure import peak_bytes
from mixerlab.kernels.backend import use_backend
from mixerlab.kernels.feedback import feedback_attention, routing_entropy

F64 = torch.float64
BACKENDS = ["reference", "chunked"]
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 5, 5], [3] * 13])  # (B, T) = (2, 13)


def make_inputs(B=2, H=2, T=13, K=4, P=5, *, sharpness=1.0, gain=0.999, seed=0, dtype=F64) -> list[Tensor]:
    """q, k, f, gamma with gains of both signs, up to `gain`."""
    torch.manual_seed(seed)
    q, k = torch.randn(B, H, T, K, dtype=F64) * sharpness, torch.randn(B, H, T, K, dtype=F64)
    f = torch.randn(B, H, T, P, dtype=F64)
    gamma = gain * torch.tanh(3 * torch.randn(B, H, T, dtype=F64))
    return [q.to(dtype), k.to(dtype), f.to(dtype), gamma.to(dtype if dtype == F64 else torch.float32)]


def by_rows(inputs, visible):
    """The definition, one row after another; `visible(b, t, j)` says whether row t sees row j < t."""
    q, k, f, gamma = inputs
    B, H, T, K = q.shape
    s = f.clone()
    lse = torch.full((B, H, T), -math.inf, dtype=F64)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        seen = [j for j in range(t) if visible(b, t, j)]
        if seen:
            logits = torch.stack([q[b, h, t] @ k[b, h, j] for j in seen]) / math.sqrt(K)
            weights = logits.exp() / logits.exp().sum()
            s[b, h, t] += gamma[b, h, t] * sum(w * s[b, h, j] for w, j in zip(weights, seen, strict=True))
            lse[b, h, t] = logits.exp().sum().log()
    return s, lse


def gradients(inputs, loss_weights, *, autocast=False, **options):
    """s, computed under bf16 autocast if asked for, then the gradient of <s, loss_weights> by each input:
    q, k, f, gamma and, if present, k and s of past."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    past = (leaves[4], leaves[5]) if len(leaves) > 4 else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        s = feedback_attention(*leaves[:4], past=past, **options)
    return [s.detach(), *torch.autograd.grad((s * loss_weights).sum(), leaves, materialize_grads=True)]


def assert_all_close(actual, expected, tolerance=1e-10):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the mathematics ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
def test_equals_the_definition_row_by_row(backend, segment_ids):
    inputs = make_inputs()
    s, lse = feedback_attention(
        *inputs, segment_ids=segment_ids, return_lse=True, backend=backend, chunk_size=4
    )
    ids = torch.zeros(2, 13) if segment_ids is None else segment_ids
    expected = by_rows(inputs, lambda b, t, j: ids[b, t] == ids[b, j])
    assert_all_close([s, lse], expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_routing_has_the_power_law_response_of_the_closed_form(backend):
    T, gain, tau = 300, 0.6, 17
    q = torch.zeros(1, 1, T, 2, dtype=F64)
    f = torch.zeros(1, 1, T, 1, dtype=F64)
    f[..., tau, :] = 1.0
    gamma = torch.full((1, 1, T), gain, dtype=F64)
    s = feedback_attention(q, torch.randn_like(q), f, gamma, backend=backend, chunk_size=64)[0, 0, :, 0]
    expected = [0.0] * tau + [1.0]
    for lag in range(1, T - tau):
        start = math.lgamma(tau + 1) - math.lgamma(tau + 1 + gain)
        expected.append(gain * math.exp(start + math.lgamma(tau + lag + gain) - math.lgamma(tau + lag + 1)))
    assert_all_close([s], [torch.tensor(expected, dtype=F64)], 1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    gain=st.floats(0.0, 0.999),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    chunk_size=st.integers(1, 50),
    backend=st.sampled_from(BACKENDS),
)
def test_output_is_bounded_by_the_input_over_one_minus_gain(T, seed, gain, sharpness, chunk_size, backend):
    inputs = make_inputs(1, 1, T, sharpness=sharpness, gain=gain, seed=seed)
    s = feedback_attention(*inputs, backend=backend, chunk_size=chunk_size)
    bound = inputs[2].norm(dim=-1).max() / (1 - gain)
    assert s.norm(dim=-1).max() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_neumann_series(backend):
    q, k, f, gamma = make_inputs(1, 1, 12)
    logits = (q @ k.mT / 2).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(), -math.inf)
    B = gamma[..., None] * logits.softmax(-1).nan_to_num(0.0)  # (1, 1, T, T), nilpotent
    term = s = f
    for _ in range(11):
        term = B @ term
        s = s + term
    assert_all_close([feedback_attention(q, k, f, gamma, backend=backend, chunk_size=5)], [s], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_without_gain_or_without_past_the_output_is_the_input_exactly(backend, dtype):
    q, k, f, gamma = make_inputs(dtype=dtype)
    assert torch.equal(feedback_attention(q, k, f, gamma * 0, backend=backend, chunk_size=4), f)
    first = [q[:, :, :1], k[:, :, :1], f[:, :, :1], gamma[:, :, :1]]
    s, lse = feedback_attention(*first, backend=backend, return_lse=True)
    assert torch.equal(s, first[2])
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_token_changes_nothing_before_it(backend):
    inputs = make_inputs(1, 1, 13)
    leaves = [x.clone().requires_grad_() for x in inputs]
    feedback_attention(*leaves, backend=backend, chunk_size=4)[:, :, :7].sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert torch.count_nonzero(leaf.grad[:, :, 7:]) == 0
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, 7:] += 0.1
    before, after = (feedback_attention(*x, backend=backend, chunk_size=4) for x in (inputs, changed))
    assert_all_close([after[:, :, :7]], [before[:, :, :7]], 1e-13)


def test_scale_multiplies_the_logits():
    q, k, f, gamma = make_inputs()
    for backend in BACKENDS:
        scaled = feedback_attention(q, k, f, gamma, scale=0.3, backend=backend)
        assert_all_close(
            [scaled], [feedback_attention(q * 0.3, k, f, gamma, scale=1.0, backend=backend)], 1e-13
        )


# ---- gradients, and chunked against the definition ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS[:, :7]])
def test_gradcheck_across_panel_borders(backend, segment_ids):
    inputs = [x.requires_grad_() for x in make_inputs(2, 1, 7, 2, 2, gain=0.9)]

    def run(*x):
        return feedback_attention(*x, segment_ids=segment_ids, backend=backend, chunk_size=3)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 40.0])
@pytest.mark.parametrize("L", [0, 1, 9])
def test_chunked_equals_reference_with_all_gradients(T, sharpness, L):
    inputs = make_inputs(T=L + T, sharpness=sharpness)
    if L:
        q, k, f, gamma = inputs
        inputs = [q[:, :, L:], k[:, :, L:], f[:, :, L:], gamma[:, :, L:], k[:, :, :L], f[:, :, :L]]
    weights = torch.randn_like(inputs[2])
    chunked = gradients(inputs, weights, backend="chunked", chunk_size=8)
    assert_all_close(chunked, gradients(inputs, weights, backend="reference"))


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 13, 100, None])
def test_segments_and_ragged_past_agree_for_any_panel_size(chunk_size):
    inputs = make_inputs()
    weights = torch.randn_like(inputs[2])
    past = [torch.randn(2, 2, 6, 4, dtype=F64), torch.randn(2, 2, 6, 5, dtype=F64)]
    cases = [(inputs, {"segment_ids": SEGMENTS})]
    cases += [(inputs + past, {"past_length": torch.tensor(n)}) for n in ([2, 5], [0, 6])]
    for tensors, options in cases:
        chunked = gradients(tensors, weights, backend="chunked", chunk_size=chunk_size, **options)
        assert_all_close(chunked, gradients(tensors, weights, backend="reference", **options))
        assert all(torch.isfinite(x).all() for x in chunked)


def test_default_panels_agree_in_float32():
    inputs = make_inputs(1, 1, 500, 16, 16, dtype=torch.float32)
    weights = torch.randn_like(inputs[2])
    for a, b in zip(*(gradients(inputs, weights, backend=backend) for backend in BACKENDS), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("backend", BACKENDS)
def test_anomaly_mode_finds_no_nan(backend):
    leaves = [x.requires_grad_() for x in make_inputs(sharpness=40.0)]
    with torch.autograd.detect_anomaly(check_nan=True):
        feedback_attention(*leaves, segment_ids=SEGMENTS, backend=backend, chunk_size=4).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_segments_equal_the_documents_apart(backend):
    inputs = make_inputs(1)
    weights = torch.randn_like(inputs[2])
    packed = gradients(inputs, weights, segment_ids=SEGMENTS[:1], backend=backend, chunk_size=4)
    pieces = []
    for lo, hi in itertools.pairwise([0, 3, 5, 11, 13]):
        piece = [x[:, :, lo:hi] for x in inputs]
        pieces.append(gradients(piece, weights[:, :, lo:hi], backend=backend, chunk_size=4))
    assert_all_close(packed, [torch.cat(x, dim=2) for x in zip(*pieces, strict=True)])


# ---- past ----


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 19)), backend=st.sampled_from(BACKENDS))
def test_continuation_from_any_cuts_equals_the_whole(cuts, backend):
    q, k, f, gamma = make_inputs(T=20)
    whole = feedback_attention(q, k, f, gamma, return_lse=True, backend="reference")
    s, lse = f[:, :, :0], gamma[:, :, :0]
    for lo, hi in itertools.pairwise([0, *sorted(cuts), 20]):
        new = [x[:, :, lo:hi] for x in (q, k, f, gamma)]
        piece, piece_lse = feedback_attention(
            *new, past=(k[:, :, :lo], s), return_lse=True, backend=backend, chunk_size=4
        )
        s, lse = torch.cat([s, piece], dim=2), torch.cat([lse, piece_lse], dim=2)
    assert_all_close([s, lse], whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 5])
def test_ragged_caches_equal_each_row_alone(backend, T):
    inputs = make_inputs(3, T=T)
    past = (torch.randn(3, 2, 8, 4, dtype=F64), torch.randn(3, 2, 8, 5, dtype=F64))
    lengths = [0, 3, 8]
    options = {"return_lse": True, "backend": backend, "chunk_size": 2}
    together = feedback_attention(*inputs, past=past, past_length=torch.tensor(lengths), **options)
    for b, n in enumerate(lengths):
        row = [x[b : b + 1] for x in inputs]
        valid = (past[0][b : b + 1, :, :n], past[1][b : b + 1, :, :n])
        alone = feedback_attention(*row, past=valid, **options)
        assert_all_close([x[b : b + 1] for x in together], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 5])
def test_a_cache_may_be_longer_than_its_content_and_of_another_dtype(backend, T):
    inputs = make_inputs(3, T=T)
    for lengths in ([0, 0, 0], [2, 7, 5]):
        longest = max(lengths)
        k, s = (torch.randn(3, 2, 20, width, dtype=torch.bfloat16) for width in (4, 5))
        k[:, :, longest:] = s[:, :, longest:] = torch.nan
        options: dict[str, Any] = {"past_length": torch.tensor(lengths), "backend": backend}
        actual = feedback_attention(*inputs, past=(k, s), past_longest=longest, **options)
        content = (k[:, :, :longest].double(), s[:, :, :longest].double())
        assert_all_close([actual], [feedback_attention(*inputs, past=content, **options)])


def test_past_receives_gradients_at_one_new_position():
    inputs = [*make_inputs(T=1), torch.randn(2, 2, 6, 4, dtype=F64), torch.randn(2, 2, 6, 5, dtype=F64)]
    leaves = [x.requires_grad_() for x in inputs]

    def run(q, k, f, gamma, k_past, s_past):
        return feedback_attention(q, k, f, gamma, past=(k_past, s_past), past_length=torch.tensor([0, 4]))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_new_position_does_not_copy_the_cache(dtype, tmp_path):
    inputs = make_inputs(2, 2, 1, 64, 64, dtype=dtype)
    cache = torch.zeros(2, 2, 2, 4096, 64, dtype=dtype)
    past = (cache[0, :, :, :3000], cache[1, :, :, :3000])  # (B, H, L, 64), views of longer buffers
    for past_length in (None, torch.tensor([3000, 100])):
        with torch.no_grad():
            peak = peak_bytes(
                lambda past_length=past_length: feedback_attention(
                    *inputs, past=past, past_length=past_length
                ),
                tmp_path,
            )
        assert peak < past[0].nbytes / 4


# ---- torch.func, torch.compile, views ----


def run_chunked(q, k, f, gamma):
    return feedback_attention(q, k, f, gamma, backend="chunked", chunk_size=4)


def run_reference(q, k, f, gamma):
    return feedback_attention(q, k, f, gamma, backend="reference")


@pytest.mark.parametrize("transform", [func_grad, func_vjp, func_vmap, func_jacrev, func_vmap_of_grad])
def test_torch_func_transforms_go_through_chunked(transform):
    inputs = make_inputs(T=6)
    assert_all_close(transform(run_chunked, inputs), transform(run_reference, inputs))


def test_second_derivative_raises():
    inputs = [x.requires_grad_() for x in make_inputs(T=6)]
    (dq,) = torch.autograd.grad(run_chunked(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda q: func_grad(run_chunked, [q, *inputs[1:]])[0].sum())(inputs[0])


def test_forward_mode_raises():
    inputs = tuple(make_inputs(T=6))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(run_chunked, inputs, inputs)


@pytest.mark.parametrize("options", ["plain", "segments", "past", "autocast", "views"])
def test_compiles_without_a_graph_break(options):
    def loss(q, k, f, gamma, segment_ids, past):
        s = feedback_attention(q, k, f, gamma, segment_ids=segment_ids, past=past, chunk_size=4)
        return s.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for T in (13, 9):
        inputs = [x.requires_grad_() for x in make_inputs(T=T)]
        if options == "views":  # (B, H, T, ...) laid out (H, T, B, ...)
            inputs = [x.detach().movedim(0, 2).contiguous().movedim(2, 0).requires_grad_() for x in inputs]
        segment_ids = SEGMENTS[:, :T] if options == "segments" else None
        past = (torch.randn(2, 2, 6, 4, dtype=F64), torch.randn(2, 2, 6, 5, dtype=F64))
        arguments = [*inputs, segment_ids, past if options == "past" else None]
        with torch.autocast("cpu", torch.bfloat16, enabled=options == "autocast"):
            expected, actual = loss(*arguments), compiled(*arguments)
        assert_all_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), 1e-12)


def test_compiled_code_follows_use_backend():
    inputs = make_inputs(1, 1, 6)
    calls = []

    def record(graph, _):
        calls.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(feedback_attention, fullgraph=True, backend=record)
    compiled(*inputs)
    with use_backend("reference"):
        compiled(*inputs)
    assert "solve_triangular" not in str(calls[0])
    assert "solve_triangular" in str(calls[1])


def test_the_backward_pass_is_one_call():
    inputs = [x.requires_grad_() for x in make_inputs()]
    s = run_chunked(*inputs)
    calls = dispatched(lambda: torch.autograd.grad(s, inputs, torch.ones_like(s)))
    assert [name for name in calls if name != "aten.detach"] == [
        "aten.ones_like",
        "mixerlab.feedback_backward",
    ]


def test_operators_are_registered_correctly():
    q, k, f, gamma = make_inputs(H=1, T=6)  # one head: layouts of q and k reach the loops as they are
    past = torch.randn(2, 1, 0, 5, dtype=F64)
    arguments = (q, k, f, gamma, past, SEGMENTS[:, :6], 0.5, 4, F64)
    torch.library.opcheck(torch.ops.mixerlab.feedback_forward.default, arguments)
    s, lse = torch.ops.mixerlab.feedback_forward(*arguments)
    saved = (q, k, gamma, s, lse, past, SEGMENTS[:, :6], 0.5, 4)
    torch.library.opcheck(torch.ops.mixerlab.feedback_backward.default, (torch.randn_like(s), *saved))
    q, k = (x.movedim(0, 2).contiguous().movedim(2, 0) for x in (q, k))
    saved = (q, k, *saved[2:])
    torch.library.opcheck(torch.ops.mixerlab.feedback_backward.default, (torch.randn_like(s), *saved))


def test_takes_views_and_inputs_without_gradient():
    inputs = make_inputs()
    views = [x.movedim(2, 0).contiguous().movedim(0, 2) for x in inputs]  # (B, H, T, ...) laid out T first
    assert not views[0].is_contiguous()
    weights = torch.randn_like(inputs[2])
    assert_all_close(gradients(views, weights, chunk_size=4), gradients(inputs, weights, chunk_size=4), 1e-13)
    f = inputs[2].clone().requires_grad_()
    (df,) = torch.autograd.grad((run_chunked(inputs[0], inputs[1], f, inputs[3]) * weights).sum(), [f])
    assert_all_close([df], [gradients(inputs, weights)[3]])
    assert not run_chunked(*inputs).requires_grad


# ---- numerics ----


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("gain", [0.5, 0.999])
def test_bf16_error_is_at_most_1_2_times_the_textbook_compositions(sharpness, gain):
    errors: dict[str, list[list[float]]] = {backend: [] for backend in BACKENDS}
    for seed in range(5):
        inputs = make_inputs(
            1, 1, 150, 32, 32, sharpness=sharpness, gain=gain, seed=seed, dtype=torch.bfloat16
        )
        weights = torch.randn(1, 1, 150, 32, dtype=torch.bfloat16)
        truth = gradients([x.double() for x in inputs], weights.double(), backend="reference")
        for backend in BACKENDS:
            results = gradients(inputs, weights, backend=backend, autocast=True)
            errors[backend].append(
                [float((a - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True)]
            )
    names = ["s", "dq", "dk", "df", "dgamma"]
    for i, name in enumerate(names):
        chunked, reference = (
            statistics.median(e[i] for e in errors[backend]) for backend in ("chunked", "reference")
        )
        assert chunked <= max(1.2 * reference, 4 * torch.finfo(torch.bfloat16).eps), name
    chunked, reference = (
        statistics.median(e[0] for e in errors[backend]) for backend in ("chunked", "reference")
    )
    assert chunked <= 1.2 * reference  # the output itself without the floor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_result_has_the_dtype_of_f_and_statistics_at_least_float32(backend, dtype):
    inputs = [x.requires_grad_() for x in make_inputs(dtype=dtype)]
    with torch.autocast("cpu", torch.bfloat16):
        s, lse = feedback_attention(*inputs, return_lse=True, backend=backend)
    s.sum().backward()
    assert s.dtype == dtype
    assert lse.dtype == (F64 if dtype == F64 else torch.float32)
    assert not lse.requires_grad
    for x in inputs:
        assert x.grad is not None
        assert x.grad.dtype == x.dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float32_inputs_in_float32(backend):
    inputs = make_inputs(dtype=torch.float32)
    weights = torch.ones_like(inputs[2])
    plain = gradients(inputs, weights, backend=backend)
    assert_all_close(gradients(inputs, weights, backend=backend, autocast=True), plain, 0)


# ---- memory ----


def test_memory_of_chunked_grows_linearly_and_of_reference_quadratically(tmp_path):
    def peak(backend, T):
        inputs = [x.requires_grad_() for x in make_inputs(1, 1, T, 16, 16, dtype=torch.float32)]
        return peak_bytes(
            lambda: feedback_attention(*inputs, backend=backend, chunk_size=64).sum().backward(), tmp_path
        )

    assert peak("chunked", 1024) < 2.1 * peak("chunked", 512)
    assert peak("reference", 1024) > 3.5 * peak("reference", 512)
    assert peak("chunked", 1024) < peak("reference", 1024) / 10


def test_memory_of_the_entropy_grows_linearly(tmp_path):
    def peak(T):
        q, k, _, _ = make_inputs(1, 1, T, 16, 1, dtype=torch.float32)
        return peak_bytes(lambda: routing_entropy(q, k), tmp_path)

    assert peak(2048) < 2.1 * peak(1024)


def test_nothing_of_size_t_by_t_is_saved():
    def saved(backend):
        sizes: list[int] = []

        def pack(x):
            sizes.append(x.numel())
            return x

        inputs = [x.requires_grad_() for x in make_inputs(1, 1, 64, 4, 4)]
        ids = torch.arange(64)[None] // 30
        with saved_tensors_hooks(pack, lambda x: x):
            feedback_attention(*inputs, segment_ids=ids, backend=backend, chunk_size=8)
        return sizes

    assert max(saved("chunked")) == 64 * 4
    assert max(saved("reference")) >= 64 * 64


# ---- routing entropy ----


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS])
def test_entropy_equals_its_definition(segment_ids):
    q, k, _, _ = make_inputs()
    ids = torch.zeros(2, 13) if segment_ids is None else segment_ids
    hidden = (ids[:, :, None] != ids[:, None, :]) | torch.ones(13, 13, dtype=torch.bool).triu()  # (B, T, T)
    alpha = (q @ k.mT * 0.7).masked_fill(hidden[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    expected = -(alpha * alpha.clamp_min(1e-300).log()).sum(-1)  # (B, H, T)
    assert_all_close([routing_entropy(q, k, scale=0.7, segment_ids=segment_ids)], [expected], 1e-12)


def test_entropy_of_uniform_routing_is_the_log_of_the_past():
    q = torch.zeros(1, 1, 300, 4, requires_grad=True)
    entropy = routing_entropy(q, q)
    assert not entropy.requires_grad
    assert_all_close([entropy[0, 0, 1:].exp()], [torch.arange(1.0, 300.0)], 1e-5)
    assert entropy[0, 0, 0] == 0


def test_entropy_of_sharp_routing_is_zero_even_in_bf16():
    q = torch.eye(8, dtype=torch.bfloat16)[None, None] * 1e4
    q[0, 0] = q[0, 0, 0].clone()
    k = torch.eye(8, dtype=torch.bfloat16)[None, None]
    assert torch.equal(routing_entropy(q, k), torch.zeros(1, 1, 8))


# ---- errors ----


def replaced(position, tensor):
    inputs = make_inputs()
    inputs[position] = tensor
    return inputs


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (replaced(0, torch.zeros(2, 13, 4)), {}, r"q has shape \(2, 13, 4\), expected \(B, H, T, K\)"),
        (replaced(1, torch.zeros(2, 2, 12, 4)), {}, r"k has shape \(2, 2, 12, 4\).*\(2, 2, 13, 4\)"),
        (replaced(1, torch.zeros(2, 2, 13, 4)), {}, r"k has dtype torch.float32, expected torch.float64"),
        (replaced(0, torch.zeros(2, 2, 13, 4).long()), {}, r"q has dtype torch.int64"),
        (replaced(2, torch.zeros(2, 2, 13)), {}, r"f has shape \(2, 2, 13\), expected \(B, H, T, P\)"),
        (replaced(2, torch.zeros(2, 1, 13, 5)), {}, r"f has shape \(2, 1, 13, 5\).*\(2, 2, 13, 5\)"),
        (replaced(3, torch.zeros(2, 2, 13, 1)), {}, r"gamma has shape \(2, 2, 13, 1\).*\(2, 2, 13\)"),
        (replaced(3, torch.zeros(2, 2, 13, device="meta")), {}, r"gamma is on device meta, expected cpu"),
        (make_inputs(), {"segment_ids": SEGMENTS[:1]}, r"segment_ids has shape \(1, 13\).*\(2, 13\)"),
        (make_inputs(), {"segment_ids": SEGMENTS.int()}, r"segment_ids has dtype torch.int32"),
        (
            make_inputs(),
            {"past": (torch.zeros(2, 2, 6, 4).int(), torch.zeros(2, 2, 6, 5))},
            r"past\[0\] has dtype",
        ),
        (
            make_inputs(),
            {"past": (torch.zeros(2, 2, 6, 4, dtype=F64), torch.zeros(2, 2, 5, 5, dtype=F64))},
            r"past\[1\] has shape \(2, 2, 5, 5\).*\(2, 2, 6, 5\)",
        ),
        (
            make_inputs(),
            {"segment_ids": SEGMENTS, "past": (torch.zeros(2, 2, 6, 4), torch.zeros(2, 2, 6, 5))},
            "segment_ids and past exclude each other",
        ),
        (make_inputs(), {"past_length": torch.tensor([1, 2])}, "past_length is given without past"),
        (make_inputs(), {"chunk_size": 0}, "chunk_size is 0"),
        (make_inputs(), {"backend": "fast"}, r"feedback_attention: unknown backend 'fast'.*reference"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        feedback_attention(*inputs, **options)
