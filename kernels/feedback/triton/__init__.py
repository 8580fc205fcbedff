"""Feedback attention on CUDA by panels: Triton kernels, memory linear in T (docs/sessa-kernel.md has the reasons).

Forward, over panels of R rows from the first to the last:

    weights   2^(logit - reference) for the panel's rows and all columns that they see, in the inputs' dtype, and each
              tile's references (coarse maxima) and sums of rows in float32
    inverse   reference and sum of whole rows, weights brought to the row's reference where a tile's is another, and
              (I - W)^-1 - I for each M x M block on the diagonal
    product   alpha[panel, before] s[before]: of weights, divided by the sums
    solve     the panel's triangle by blocks of M rows, for a slice of the features per program

Backward, over panels of R columns from the last to the first, for all rows that see them:

    weights           again, from the saved references, but for a power of 2: those of a row sum to 1 to 2, say m
    product           alpha[after, panel]^T (gamma G)[after], of weights and gamma G / m
    transposed_solve  the panel's triangle, transposed: G = df; and dgamma_t = <G_t, a_t>, a = alpha s saved
    dlogits           weight * (<gamma_t G_t / m, s_j> - <gamma_t G_t / m, a_t>), in its place
    product           dk
    product           dq, added up over the panels in float32, several panels at a time if `DQ_PANELS` says so

Gains and softmax statistics multiply in float32; products take operands of the inputs' dtype and add up in float32.
Each output element is added up by one program, or in shares by several where there are few elements (`splits_for`), in
a fixed order: results are deterministic.

A row t sees column c if first[t] <= c < L + t, and, with a past, c < length or c >= L. The past is padded to whole
tiles (the padding lies in that gap), so that tiles of rows and of columns meet at the diagonal.

Letters: B batch, H heads, N = B * H, T new positions, L past positions, S = L + T columns, K key width, P value
width, R rows of a panel, M rows of a diagonal block. Arguments of kernels have one name and shape for all of them:

    q (B, H, T, K), k (B, H, S, K)          with strides such as q_t for the step to the next position
    weights (N, height, n_tiles * TILE)     of a panel: rows from position lo, columns from first_column
    tops, sums (N, n_tiles, R)              references, as powers of 2, and sums of rows of its tiles;
    top, total (N, T)                       of whole rows
    inverse (N, ceil(T / M) * M, M)
    means, rhs (splits, N, R, P)            shares of the product over columns before, or rows after, the panel
    f, ds, attended (N, T, P), s, g (N, S, P), gamma (N, T)
    scaled_g (N, T, P)                      gamma G / m
    dgamma_parts, correction_parts (SLICES, N, T)
    first, last (B, T)                      where the segment of a row begins, and behind its end; None without
    length (B,)                             how many past positions are valid; None without
"""

from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from mixerlab.kernels.feedback.triton import tiles as tiling
from mixerlab.kernels.feedback.triton.backward import dlogits_kernel, transposed_solve_kernel
from mixerlab.kernels.feedback.triton.forward import inverse_kernel, solve_kernel
from mixerlab.kernels.feedback.triton.products import product_kernel, weights_kernel
from mixerlab.kernels.feedback.triton.tiles import (
    Launcher,
    readable,
    round_up,
    splits_for,
    strides,
    tiles_for,
)


def feedback_forward(
    q: Tensor,
    k: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    length: Tensor | None,
    ids: Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve for s.

    Args:
        q: (B, H, T, K). k: (B, H, S, K). f: (B, H, T, P). s_past: (B, H, L, P). All of one dtype, bfloat16, float16
            or float32; L in whole tiles.
        gamma: (B, H, T) float32.
        length: (B,) int64, how many of the L are valid, or None where L = 0.
        ids: (B, T) int64, non-decreasing, or None; only where L = 0.

    Returns:
        s (B, H, T, P) in f's dtype; alpha s (B, H, T, P) float32, in which a row's logit gradients cancel well;
        for each row, the reference and the sum of 2^(logit / ln 2 - reference) over what is visible, (B, H, T) float32,
        the sum 0 where that is nothing; (I - W)^-1 - I of the diagonal blocks, (B, H, ceil(T / M) M, M) in f's dtype.
    """
    B, H, T, P = f.shape
    S, K = k.shape[2:]
    L, N = S - T, B * H
    tiles = tiles_for(f.dtype)
    TILE, M, R = tiles.tile, tiles.block, tiling.panel_rows(N, T, S, f.dtype, chunk_size)
    q, k, f, gamma = readable(q), readable(k), f.contiguous(), gamma.contiguous()

    first = None if ids is None else torch.searchsorted(ids.contiguous(), ids.contiguous())  # (B, T)

    s = f.new_empty(B, H, S, P)
    s[:, :, :L] = s_past
    attended, inverse = gamma.new_empty(B, H, T, P), f.new_empty(B, H, round_up(T, M), M)
    top, total = torch.empty_like(gamma), torch.empty_like(gamma)
    n_tiles = cdiv(S, TILE)
    weights = f.new_empty(N, R, n_tiles * TILE)
    tops, sums = gamma.new_empty(N, n_tiles, R), gamma.new_empty(N, n_tiles, R)
    programs = N * cdiv(P, tiles.width(P)) * (R // TILE)
    means = gamma.new_empty(splits_for(programs, n_tiles), N, R, P)
    run = Launcher(
        q=q, k=k, f=f, gamma=gamma, s=s, attended=attended, inverse=inverse, first=first, last=None, length=length,
        weights=weights, tops=tops, sums=sums, top=top, total=total, means=means, scale=scale / log(2), first_column=0,
        T=T, L=L, H=H, K=K, P=P, R=R, TILE=TILE, M=M, SLICE=tiles.slice, height=R, n_tiles=n_tiles,
        DIAGONAL=False, **tiling.exponents(f.dtype),
        **strides("q", q), **strides("k", k),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for lo in range(0, T, R):
            rows, before = min(R, T - lo), L + lo
            splits = splits_for(programs, before // TILE) if before else 0
            row_tiles, column_tiles = cdiv(rows, TILE), cdiv(before + rows, TILE)
            panel = run.having(lo=lo, splits=splits)
            panel(weights_kernel, column_tiles, row_tiles, N, STEP=tiles.inner_step(K))
            panel(inverse_kernel, cdiv(rows, M), N, warps=4)
            if before:
                _product(panel, s, means, rows=rows, end=before, splits=splits, totals=total)
            panel(solve_kernel, cdiv(P, tiles.slice), N, warps=4)
    return s[:, :, L:].contiguous(), attended, top, total, inverse


def feedback_backward(
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    gamma: Tensor,
    s: Tensor,
    attended: Tensor,
    top: Tensor,
    total: Tensor,
    inverse: Tensor,
    s_past: Tensor,
    length: Tensor | None,
    ids: Tensor | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, gamma, and of past and new s in one (B, H, S, P) tensor; all contiguous."""
    B, H, T, P = s.shape
    S, K = k.shape[2:]
    L, N = S - T, B * H
    tiles = tiles_for(s.dtype)
    TILE, M, R = tiles.tile, tiles.block, tiling.panel_rows(N, T, S, s.dtype, chunk_size)
    q, k = readable(q), readable(k)
    ds, gamma, attended, top, total, inverse = (
        x.contiguous() for x in (ds, gamma, attended, top, total, inverse)
    )
    s = torch.cat([s_past, s], dim=2) if L else s.contiguous()  # (B, H, S, P)
    first = last = None
    if ids is not None:
        ids = ids.contiguous()
        first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)  # (B, T)

    dq_sum = gamma.new_empty(B, H, T, K)
    dk, g, scaled_g = k.new_empty(B, H, S, K), s.new_empty(B, H, S, P), s.new_empty(B, H, T, P)
    n_slices = cdiv(P, tiles.slice)
    dgamma_parts, correction_parts = gamma.new_empty(2, n_slices, B, H, T)
    weights = s.new_empty(N, round_up(T, TILE), tiling.DQ_PANELS * R)
    programs = N * max(cdiv(P, tiles.width(P)), cdiv(K, tiles.width(K))) * (R // TILE)
    parts = gamma.new_empty(splits_for(programs, cdiv(T, TILE)) * N * R * max(P, K))
    run = Launcher(
        q=q, k=k, s=s, gamma=gamma, ds=ds, attended=attended, inverse=inverse, g=g, scaled_g=scaled_g,
        scale=scale / log(2), weights=weights, tops=None, sums=None, top=top, total=total, rhs=parts, first=first,
        last=last, length=length, dgamma_parts=dgamma_parts, correction_parts=correction_parts, SLICES=n_slices,
        SLICE=tiles.slice, T=T, L=L, H=H, K=K, P=P, R=R, TILE=TILE, M=M, height=weights.shape[1],
        n_tiles=weights.shape[2] // TILE, **tiling.exponents(s.dtype),
        **strides("q", q), **strides("k", k),
    )  # fmt: skip

    # (first row that sees the panel, first column, columns, whether the panel holds a part of the diagonal)
    past = [(0, c, min(R, L - c), False) for c in range(0, L, R)]
    new = [(lo, L + lo, min(R, T - lo), True) for lo in range(0, T, R)]
    groups = [p[i : i + tiling.DQ_PANELS] for p in (past, new) for i in range(0, len(p), tiling.DQ_PANELS)]
    with torch.cuda.device_of(q):
        for group in reversed(groups):
            top_row, left, _, diagonal = group[0]
            for lo, first_column, columns, _ in reversed(group):
                own = weights[:, lo - top_row :, first_column - left :]
                panel = run.having(weights=own, lo=lo, first_column=first_column, DIAGONAL=diagonal)
                below = T - lo  # rows that see the panel
                grid = (cdiv(columns, TILE), cdiv(below, TILE), N)
                transposed = partial(_product, panel, rows=columns, end=below, TRANSPOSED=True)
                add_up = partial(_add_up, transposed, parts, splits_for(programs, below // TILE))

                panel(weights_kernel, *grid, STEP=tiles.inner_step(K))
                if diagonal:
                    splits = splits_for(programs, (below - R) // TILE) if below > R else 0
                    if splits:
                        rhs = parts[: splits * N * R * P].view(splits, B, H, R, P)
                        transposed(scaled_g[:, :, lo:], rhs, begin=R, splits=splits)
                    panel(transposed_solve_kernel, n_slices, N, warps=4, splits=splits)
                else:
                    add_up(scaled_g, g[:, :, first_column : first_column + columns])
                panel(dlogits_kernel, *grid, STEP=tiles.inner_step(P))
                add_up(q[:, :, lo:], dk[:, :, first_column : first_column + columns], factor=scale)
            fresh = len(group) * R if diagonal else 0  # how many rows of dq no panel before has written
            end = sum(columns for _, _, columns, _ in group)
            panel = run.having(lo=top_row, first_column=left, DIAGONAL=diagonal)
            _product(
                panel,
                k[:, :, left:],
                dq_sum[:, :, top_row:],
                rows=T - top_row,
                end=end,
                ADD=True,
                fresh=fresh,
            )
    dq = scaled_g if K == P else q.new_empty(q.shape)  # scaled_g is not needed any more
    return torch.mul(dq_sum, scale, out=dq), dk, dgamma_parts.sum(0), g


def _product(
    run: Launcher, x: Tensor, out: Tensor, *, rows: int, end: int, splits: int = 1, **options: Any
) -> None:
    """Launch out[..., :rows, :] = weights x, for x (B, H, end or more, W) and out (splits, B, H, rows or more, W).

    Views of the rows of tensors that are contiguous otherwise may be written.
    """
    W, tiles = x.shape[3], tiles_for(x.dtype)
    width = tiles.width(W)
    grid = (cdiv(W, width), cdiv(rows, tiles.tile), x.shape[0] * x.shape[1] * splits)
    defaults = {
        "totals": None,
        "STEP": tiles.step,
        "factor": 1.0,
        "begin": 0,
        "fresh": 0,
        "TRANSPOSED": False,
        "ADD": False,
    }
    sizes = {
        "n_out": rows,
        "out_rows": out.stride(-3) // W,
        "end": end,
        "splits": splits,
        "W": W,
        "WIDTH": width,
    }
    run(product_kernel, *grid, x=x, out=out, **strides("x", x), **sizes, **defaults | options)


def _add_up(product: Any, parts: Tensor, splits: int, x: Tensor, out: Tensor, **options: Any) -> None:
    """`product` into out (B, H, rows, W), from shares where several programs share a sum."""
    if splits == 1:
        product(x, out, **options)
    else:
        shares = parts[: splits * out.numel()].view(splits, *out.shape)
        product(x, shares, splits=splits, **options)
        out.copy_(shares.sum(0))  # of `sum` with out= the shares would be rounded first
