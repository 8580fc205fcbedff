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

from mixerlab.kernels.operator import operator


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
        s_past = f.new_empty(*f.shape[:2], 0, f.shape[3])  # a view of f would ask for a gradient
    if chunk_size is None:  # small panels waste less above the diagonal, large ones make better products
        chunk_size = 128 if f.shape[2] <= 512 else 256
    s, lse = _feedback(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate)
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
        empty = logits.amax(-1) == _hidden(logits.dtype)  # (N, R)
        alpha = torch.softmax(logits, -1, out=logits)
        entropy[:, lo:hi] = torch.special.entr(alpha).sum(-1).masked_fill_(empty, 0.0)
    return entropy.unflatten(0, (B, H))


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

    not_past, hidden = _not_past(min(chunk_size, T), q.device), _hidden(accumulate)
    with torch.autocast(q.device.type, enabled=False):
        for lo, hi, first in _panels(ids, T, L, chunk_size):
            logits = _panel_logits(buffer, qn, kn, ids, not_past, lo, hi, first)  # (N, R, C)
            top = logits.amax(-1, keepdim=True)  # (N, R, 1)
            alpha = torch.softmax(logits, -1, out=logits)  # one pass; the parts of a softmax would be four
            torch.sub(top, alpha.amax(-1, keepdim=True).log_(), out=lse[:, lo:hi])
            panel_gain = gain[:, lo:hi].masked_fill(top == hidden, 0.0)  # (N, R, 1)

            before = L + lo - first
            rhs = torch.bmm(alpha[..., :before], s[:, first : L + lo])  # (N, R, P)
            torch.addcmul(fn[:, lo:hi], rhs, panel_gain, out=rhs)
            square = alpha[..., before:] * -panel_gain  # (N, R, R)
            torch.linalg.solve_triangular(square, rhs, upper=False, unitriangular=True, out=rhs)
            s[:, L + lo : L + hi] = rhs
    lse.masked_fill_(lse == hidden, float("-inf"))
    return s[:, L:].unflatten(0, (B, H)).to(f.dtype).contiguous(), lse.view(B, H, T)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, f, gamma and s_past."""
    B, H, T, P = s.shape
    S = k.shape[2]
    L = S - T
    accumulate = lse.dtype
    qn, kn = (x.flatten(0, 1).to(accumulate) for x in (q, k))  # (N, T, K), (N, S, K)
    qn = qn * scale
    sn = (torch.cat([s_past, s], dim=2) if L else s).flatten(0, 1).to(accumulate)  # (N, S, P)
    empty = (lse == float("-inf")).flatten(0, 1)[..., None]  # (N, T, 1), rows that see nothing
    gain = gamma.flatten(0, 1).to(accumulate)[..., None].masked_fill(empty, 0.0)  # (N, T, 1)

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
            logits = _panel_logits(alpha_buffer, qn, kn, ids, not_past, lo, hi, first)  # (N, R, C)
            alpha = torch.softmax(logits, -1, out=logits)
            panel_gain = gain[:, lo:hi]  # (N, R, 1)

            before = L + lo - first
            square = (alpha[..., before:] * -panel_gain).mT  # (N, R, R)
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

    dgamma.masked_fill_(empty, 0.0)
    return (
        dq.view(q.shape).to(q.dtype),
        dk.view(k.shape).to(k.dtype),
        g[:, L:].reshape(B, H, T, P).to(s.dtype).contiguous(),
        dgamma.view(gamma.shape).to(gamma.dtype),
        g[:, :L].reshape(B, H, L, P).to(s.dtype, copy=True, memory_format=torch.contiguous_format),
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


def _hidden(dtype: torch.dtype) -> float:
    """The logit of what is not visible: beside any visible one its weight is exactly 0. -inf would make NaN of the
    rows that see nothing; so their weights are uniform, and whoever uses them takes a gain of 0."""
    return torch.finfo(dtype).min


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
    """Logits (N, R, C) of rows lo to hi, `_hidden` where not visible, in the memory of `buffer`; q is scaled."""
    N, R, L = q.shape[0], hi - lo, k.shape[1] - q.shape[1]
    C = L + hi - first
    logits = buffer[: N * R * C].view(N, R, C)
    torch.bmm(q[:, lo:hi], k[:, first : L + hi].mT, out=logits)
    logits[..., C - R :].masked_fill_(not_past[:R, :R], _hidden(logits.dtype))
    if ids is not None:
        apart = ids[:, None, L + lo : L + hi, None] != ids[:, None, None, first : L + hi]  # (B, 1, R, C)
        logits.view(ids.shape[0], -1, R, C).masked_fill_(apart, _hidden(logits.dtype))
    return logits


def _forward_fake(q, k, f, gamma, s_past, ids, scale, chunk_size, accumulate):
    return f.new_empty(f.shape), q.new_empty(gamma.shape, dtype=accumulate)


def _backward_fake(ds, q, k, gamma, s, lse, s_past, ids, scale, chunk_size):
    return tuple(x.new_empty(x.shape) for x in (q, k, s, gamma, s_past))


_feedback = operator(
    "feedback",
    _forward,
    _backward,
    outputs=("s", "lse"),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
)
