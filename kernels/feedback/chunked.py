"""Feedback attention by panels of rows: matrix products and small triangular solves, memory linear in T.

Blocked as LAPACK blocks a triangular solve, with W[t, j] = gamma_t alpha[t, j] made one panel at a time:

    forward, first panel to last:   rhs = f + W[panel, before] s[before];   (I - W[panel, panel]) s = rhs
    backward, last panel to first:  (I - W[panel, panel])^T G = ds;         ds[before] += W[panel, before]^T G

then df = G, dgamma_t = sum_j alpha[t, j] <G_t, s_j>, and
dlogit[t, j] = gamma_t alpha[t, j] (<G_t, s_j> - dgamma_t). The backward pass keeps only q, k, gamma, s
and the log-sum-exp of each row.

Letters: B batch, H heads, N = B * H, T new positions, L past positions, S = L + T columns, K key width,
P value width, R rows of a panel, C columns that a panel sees.
"""

import torch
from torch import Tensor


def feedback_chunked(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor | None,
    ids: Tensor | None,
    scale: float,
    accumulate: torch.dtype,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """As `feedback_reference`, but transient memory is R x S, and nothing of size T x S is kept.

    The logits are rounded to `accumulate` only. Differentiable once.
    """
    if s_past is None:
        s_past = f[:, :, :0]  # (B, H, 0, P)
    if chunk_size is None:  # small panels waste less above the diagonal, large ones make better products
        chunk_size = 128 if f.shape[2] <= 512 else 256
    s, lse = _Feedback.apply(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate)
    return s, lse


def entropy_chunked(
    q: Tensor, k: Tensor, ids: Tensor | None, scale: float, accumulate: torch.dtype
) -> Tensor:
    """Entropy (B, H, T) in nats of each row of alpha, 0 for rows that see nothing."""
    B, H, T, _ = q.shape
    R = min(128, T)
    qn, kn = (x.flatten(0, 1).to(accumulate) for x in (q, k))  # (N, T, K)
    qn = qn * scale
    entropy = qn.new_empty(B * H, T)
    buffer = qn.new_empty(B * H * R * T)
    for lo, hi, first in _panels(ids, T, 0, R):
        logits = _panel_logits(buffer, qn, kn, ids, _not_past(R, q.device), lo, hi, first)  # (N, R, C)
        lse = logits.logsumexp(-1, keepdim=True)  # (N, R, 1)
        alpha = logits.sub_(lse.masked_fill_(lse == float("-inf"), 0.0)).exp_()
        torch.sum(torch.special.entr(alpha), -1, out=entropy[:, lo:hi])
    return entropy.unflatten(0, (B, H))


class _Feedback(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate):
        return _forward(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, _, gamma, s_past, ids, ctx.scale, ctx.chunk_size, _ = inputs
        s, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, gamma, s, lse, s_past, ids)

    @staticmethod
    def backward(ctx, ds, _):
        if ds is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # read once: activation checkpointing frees them as they are read
        L = saved[5].shape[2]
        dq, dk, dgamma, g = _FeedbackBackward.apply(ds, *saved, ctx.scale, ctx.chunk_size)
        return dq, dk, g[:, :, L:], dgamma, g[:, :, :L], None, None, None, None


class _FeedbackBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that differentiating them raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ds, q, k, gamma, s, lse, s_past, ids, scale, chunk_size):
        return _backward(ds, q, k, gamma, s, lse, s_past, ids, scale, chunk_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "chunked feedback attention has no second derivative; use backend='reference'"
        )


# The two passes are opaque operators: torch.compile and torch.func see one call each, and apply the
# backward and vmap rules registered below instead of tracing the loops.


@torch.library.custom_op("mixerlab::feedback_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    ids: Tensor | None,
    scale: float,
    chunk_size: int,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, H, T, P = f.shape
    S = k.shape[2]
    L = S - T
    qn, kn, fn = (x.flatten(0, 1).to(accumulate) for x in (q, k, f))  # (N, T, K), (N, S, K), (N, T, P)
    qn = qn * scale
    gain = gamma.flatten(0, 1).to(accumulate)[..., None]  # (N, T, 1)
    s = fn.new_empty(B * H, S, P)
    s[:, :L] = s_past.flatten(0, 1)
    lse = fn.new_empty(B * H, T, 1)
    buffer = fn.new_empty(B * H * min(chunk_size, T) * S)

    not_past = _not_past(min(chunk_size, T), q.device)
    with torch.autocast(q.device.type, enabled=False):
        for lo, hi, first in _panels(ids, T, L, chunk_size):
            logits = _panel_logits(buffer, qn, kn, ids, not_past, lo, hi, first)  # (N, R, C)
            top = logits.amax(-1, keepdim=True)  # (N, R, 1)
            top.masked_fill_(top == float("-inf"), 0.0)  # rows that see nothing
            weights = logits.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)  # (N, R, 1), at least 1 where anything is visible
            torch.add(top, total.log(), out=lse[:, lo:hi])
            factor = gain[:, lo:hi] / total.clamp_min(1.0)  # (N, R, 1)

            before = L + lo - first
            rhs = torch.bmm(weights[..., :before], s[:, first : L + lo])  # (N, R, P)
            torch.addcmul(fn[:, lo:hi], rhs, factor, out=rhs)
            square = weights[..., before:] * -factor  # (N, R, R)
            torch.linalg.solve_triangular(square, rhs, upper=False, unitriangular=True, out=rhs)
            s[:, L + lo : L + hi] = rhs
    return s[:, L:].unflatten(0, (B, H)).to(f.dtype).contiguous(), lse.view(B, H, T)


@torch.library.custom_op("mixerlab::feedback_backward", mutates_args=())
def _backward(
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    s: Tensor,
    lse: Tensor,
    s_past: Tensor,
    ids: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, gamma, and of past and new s in one (B, H, S, P) tensor."""
    B, H, T, P = s.shape
    S = k.shape[2]
    L = S - T
    accumulate = lse.dtype
    qn, kn = (x.flatten(0, 1).to(accumulate) for x in (q, k))  # (N, T, K), (N, S, K)
    qn = qn * scale
    sn = (torch.cat([s_past, s], dim=2) if L else s).flatten(0, 1).to(accumulate)  # (N, S, P)
    gain = gamma.flatten(0, 1).to(accumulate)[..., None]  # (N, T, 1)
    row_lse = lse.flatten(0, 1)[..., None]  # (N, T, 1)
    row_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)  # rows that see nothing

    # Contiguous whatever the layout of q and k, as register_fake promises.
    dq, dk, dgamma = qn.new_empty(qn.shape), kn.new_zeros(kn.shape), gain.new_empty(gain.shape)
    # Starts as the gradient of s; each panel turns its rows into G and adds to the rows before it.
    g = sn.new_zeros(B * H, S, P)
    g[:, L:] = ds.flatten(0, 1)
    alpha_buffer = sn.new_empty(B * H * min(chunk_size, T) * S)
    dlogits_buffer = torch.empty_like(alpha_buffer)

    not_past = _not_past(min(chunk_size, T), q.device)
    with torch.autocast(q.device.type, enabled=False):
        for lo, hi, first in reversed(_panels(ids, T, L, chunk_size)):
            alpha = _panel_logits(alpha_buffer, qn, kn, ids, not_past, lo, hi, first)  # (N, R, C)
            alpha.sub_(row_lse[:, lo:hi]).exp_()
            panel_gain = gain[:, lo:hi]  # (N, R, 1)

            before = L + lo - first
            square = (alpha[..., before:] * -panel_gain).mT.contiguous()  # (N, R, R): else the solver is slow
            panel_g = g[:, L + lo : L + hi].contiguous()  # (N, R, P)
            torch.linalg.solve_triangular(square, panel_g, upper=True, unitriangular=True, out=panel_g)
            g[:, L + lo : L + hi] = panel_g
            g[:, first : L + lo].baddbmm_(alpha[..., :before].mT, panel_gain * panel_g)

            dlogits = dlogits_buffer[: alpha.numel()].view_as(alpha)
            torch.bmm(panel_g, sn[:, first : L + hi].mT, out=dlogits)
            dlogits.mul_(alpha)
            panel_dgamma = dlogits.sum(-1, keepdim=True)  # (N, R, 1)
            dgamma[:, lo:hi] = panel_dgamma
            dlogits.addcmul_(alpha, panel_dgamma, value=-1)
            # What is left of dlogit, its row factor gamma, goes to the narrow operand.
            torch.mul(torch.bmm(dlogits, kn[:, first : L + hi]), scale * panel_gain, out=dq[:, lo:hi])
            dk[:, first : L + hi].baddbmm_(dlogits.mT, panel_gain * qn[:, lo:hi])

    return (
        dq.view(q.shape).to(q.dtype),
        dk.view(k.shape).to(k.dtype),
        dgamma.view(gamma.shape).to(gamma.dtype),
        g.view(B, H, S, P).to(s.dtype),
    )


def _panels(ids: Tensor | None, T: int, L: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """(first row, end row, first column that any of its rows sees) of each panel."""
    rows = range(0, T, chunk_size)
    first = [0] * len(rows)
    if ids is not None and L == 0:  # ids are then sorted, and a segment's first row is its first column
        first = torch.searchsorted(ids.contiguous(), ids[:, ::chunk_size].contiguous()).amin(0).tolist()
    return [(lo, min(lo + chunk_size, T), c) for lo, c in zip(rows, first, strict=True)]


def _not_past(R: int, device: torch.device) -> Tensor:
    """(R, R), True where a row of a panel must not see a column of the same panel."""
    return torch.ones(R, R, dtype=torch.bool, device=device).triu()


def _panel_logits(
    buffer: Tensor,
    q: Tensor,
    k: Tensor,
    ids: Tensor | None,
    not_past: Tensor,
    lo: int,
    hi: int,
    first: int,
) -> Tensor:
    """Logits (N, R, C) of rows lo to hi, -inf where hidden, in the memory of `buffer`; q is scaled."""
    N, R, L = q.shape[0], hi - lo, k.shape[1] - q.shape[1]
    C = L + hi - first
    logits = buffer[: N * R * C].view(N, R, C)
    torch.bmm(q[:, lo:hi], k[:, first : L + hi].mT, out=logits)
    logits[..., C - R :].masked_fill_(not_past[:R, :R], float("-inf"))
    if ids is not None:
        apart = ids[:, None, L + lo : L + hi, None] != ids[:, None, None, first : L + hi]  # (B, 1, R, C)
        logits.view(ids.shape[0], -1, R, C).masked_fill_(apart, float("-inf"))
    return logits


@_forward.register_fake
def _(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate):
    return torch.empty_like(f, memory_format=torch.contiguous_format), q.new_empty(
        gamma.shape, dtype=accumulate
    )


@_backward.register_fake
def _(ds, q, k, gamma, s, lse, s_past, ids, scale, chunk_size):
    B, H, _, P = s.shape
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        gamma.new_empty(gamma.shape),
        s.new_empty(B, H, k.shape[2], P),
    )


def _vmap_rule(op):
    """Folds the mapped dimension of size V into the batch: (V, B, ...) -> (V * B, ...)."""

    def rule(info, in_dims, *args):
        def fold(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        outputs = op(*map(fold, args, in_dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)

    return rule


_forward.register_vmap(_vmap_rule(_forward))
_backward.register_vmap(_vmap_rule(_backward))
