"""Kernels of both passes: the weights of a panel, and their product with values, gradients, queries or keys.

`weights` (N, height, n_tiles * TILE) holds rows of alpha, but for a factor of each row, from position `lo` and columns
from `first_column`.
"""

import triton
import triton.language as tl

from mixerlab.kernels.feedback.triton.functions import (
    dot,
    inner_products,
    norm,
    panel_tile,
    summed_features,
    unit,
    visible,
)

LN_2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)
"""The largest logit, far below all others, of a row that sees nothing."""


@triton.jit(do_not_specialize=["lo", "first_column", "T", "L", "height", "n_tiles"])
def weights_kernel(
    q, k, first, length, weights, tops, sums, top, total,
    scale, lo, first_column, T, L, height, n_tiles, q_b, q_h, k_b, k_h, H,
    q_t: tl.constexpr, k_t: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    QUANTUM: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """2^(logit - reference), the scale giving logits as powers of 2.

    With `tops`, each row of the tile has its reference, the multiple of QUANTUM that leaves exponents of at most MOST;
    it is stored with the row's sum. Without, rows have that of `top`, and weights are multiplied by the total's unit.
    """
    n = tl.program_id(2).to(tl.int64)
    b, h = n // H, n % H
    row = lo + tl.program_id(1) * TILE
    column = first_column + tl.program_id(0) * TILE
    if column >= L + row + TILE:  # above the diagonal: nothing reads it
        return
    summed = summed_features(K, row, column, first, length, b, T, L, TILE)
    rows, columns = row + tl.arange(0, TILE), column + tl.arange(0, TILE)
    inside = rows < T
    queries = q + b * q_b + h * q_h + rows[:, None] * q_t
    keys = k + b * k_b + h * k_h + columns[None, :] * k_t
    key_inside = (columns < L + T)[None, :]
    products = inner_products(queries, keys, inside[:, None], key_inside, summed, K, STEP)
    seen = visible(row, column, first, length, b, T, L, TILE)
    # The choice keeps product and difference apart: fused, they would round otherwise in one pass than in the other.
    logits = tl.where(seen, scale * products, float("-inf"))
    if tops is not None:
        reference = QUANTUM * tl.ceil(
            (tl.maximum(tl.max(logits, axis=1), NOTHING) - MOST) / QUANTUM
        )  # (TILE,)
    else:
        reference = tl.load(top + n * T + rows, mask=inside, other=0.0)
    # Powers of 2 by exp: of exp2 the compiler makes more registers than let two programs share a multiprocessor.
    w = tl.exp((logits - reference[:, None]) * LN_2)
    if tops is None:
        w *= unit(tl.load(total + n * T + rows, mask=inside, other=0.0))[:, None]
    w = w.to(weights.dtype.element_ty)
    if tops is not None:
        at = (n * n_tiles + tl.program_id(0)) * height + rows - lo
        tl.store(tops + at, reference)
        # Summed as they are stored: weights that sum to 1 leave no rounding that is common to a row.
        tl.store(sums + at, tl.sum(w.to(tl.float32), axis=1))
    tl.store(panel_tile(weights, n, height, n_tiles, TILE), w)


@triton.jit(
    do_not_specialize=[
        *("begin", "end", "fresh", "lo", "first_column", "T", "height", "n_tiles"),
        *("n_out", "out_rows", "splits"),
    ]
)
def product_kernel(
    weights, x, out, first, last, totals,
    factor, begin, end, fresh, lo, first_column, T, height, n_tiles, n_out, out_rows, splits, x_b, x_h, H,
    x_t: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, DIAGONAL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[i] = factor * sum of weights[i, j] x[j], or of weights[j, i] x[j] if TRANSPOSED, for i < n_out.

    Sums over one of `splits` shares of j from `begin` (0 unless TRANSPOSED) to `end`, as far as segments and, where
    the weights hold a part of the DIAGONAL, rows and columns meet. ADD: to what `out` holds from row `fresh` on.
    With `totals` (N, T), divided by those of the rows.
    """
    n = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    b = n // H
    start = tl.program_id(1) * TILE
    i = start + tl.arange(0, TILE)
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (p < W)[None, :]
    x += b * x_b + n % H * x_h
    n_x = end
    if TRANSPOSED:
        if DIAGONAL:
            begin = tl.maximum(begin, start)
        if last is not None:  # columns are rows: there is no past
            end = (tl.load(last + b * T + tl.minimum(lo + start + TILE, T) - 1) - lo).to(tl.int32)
    else:
        begin = 0
        if DIAGONAL:
            end = tl.minimum(end, start + TILE)
        if first is not None:
            seen = tl.load(first + b * T + lo + start).to(tl.int32)
            begin = tl.maximum(seen - first_column, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(end - begin, splits), STEP) * STEP
    begin += split * share
    end = tl.minimum(begin + share, end)

    own = out + (split * (tl.num_programs(2) // splits) + n) * out_rows * W + i[:, None] * W + p[None, :]
    here = (i < n_out)[:, None] & some
    if ADD:
        if begin >= end:  # rows that are fresh have columns here
            return
        products = tl.load(own, mask=here & (i >= fresh)[:, None], other=0.0)
    else:
        products = tl.zeros((TILE, WIDTH), tl.float32)
    width = n_tiles * TILE
    panel = weights + n * height * width
    for at in range(begin, end, STEP):
        j = at + tl.arange(0, STEP)
        # Weights are 0 where they stand for no row or column; x is not read there.
        y = tl.load(x + j[:, None] * x_t + p[None, :], mask=(j < n_x)[:, None] & some, other=0.0)
        if TRANSPOSED:
            w = tl.trans(tl.load(panel + j[:, None] * width + i[None, :]))
        else:
            w = tl.load(panel + i[:, None] * width + j[None, :])
        products = dot(w, y, products)
    if totals is not None:
        products *= norm(tl.load(totals + n * T + lo + i, mask=lo + i < T, other=0.0))[:, None]
    tl.store(own, (products * factor).to(out.dtype.element_ty), mask=here)
