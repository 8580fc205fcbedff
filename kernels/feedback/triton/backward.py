"""Kernels of the backward pass alone. `weights` (N, height, n_tiles * TILE) holds a panel of columns."""

import triton
import triton.language as tl

from mixerlab.kernels.feedback.triton.functions import (
    dot,
    inner_products,
    norm,
    panel_tile,
    summed_features,
    unit,
)


@triton.jit(do_not_specialize=["lo", "T", "L", "height", "n_tiles", "splits"])
def transposed_solve_kernel(
    weights, ds, rhs, gamma, total, inverse, attended, g, scaled_g, dgamma_parts, correction_parts,
    lo, T, L, height, n_tiles, splits,
    P: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    p = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    some = (p < P)[None, :]
    padded = (T + M - 1) // M * M
    width = n_tiles * TILE
    panel = weights + n * height * width
    blocks = (tl.minimum(R, T - lo) + M - 1) // M
    for behind in range(0, blocks):
        block = blocks - 1 - behind
        local = block * M + i
        rows = lo + local
        inside = rows < T
        here = inside[:, None] & some
        own = n * T * P + rows[:, None] * P + p[None, :]
        v = tl.load(ds + own, mask=here, other=0.0).to(tl.float32)
        for split in range(splits):
            part = rhs + (split * tl.num_programs(1) + n) * R * P
            v += tl.load(part + local[:, None] * P + p[None, :], mask=here, other=0.0)
        for j in range(block + 1, blocks):
            below = j * M + i
            later = (lo + below < T)[:, None]
            w = tl.load(panel + below[:, None] * width + local[None, :])
            after = scaled_g + (n * T + lo) * P + below[:, None] * P + p[None, :]
            y = tl.load(after, mask=later & some, other=0.0)
            v += dot(tl.trans(w), y, None)
        x = tl.load(inverse + n * padded * M + rows[:, None] * M + i[None, :])
        v += dot(tl.trans(x), v.to(x.dtype), None)
        tl.store(g + (n * (L + T) + L) * P + rows[:, None] * P + p[None, :], v.to(x.dtype), mask=here)
        row_total = tl.load(total + n * T + rows, mask=inside, other=0.0)
        # What the panel's weights leave of alpha, a factor of 1/2 to 1, is put here: so they are not rounded again.
        gain = tl.load(gamma + n * T + rows, mask=inside, other=0.0) * norm(row_total * unit(row_total))
        scaled = (gain[:, None] * v).to(x.dtype)
        tl.store(scaled_g + own, scaled, mask=here)
        a = tl.load(attended + own, mask=here, other=0.0)
        at = (tl.program_id(0) * tl.num_programs(1) + n) * T + rows
        tl.store(dgamma_parts + at, tl.sum(v * a, axis=1), mask=inside)
        # Of dgamma the same, but of what `dlogits` multiplies: so rounding leaves the sum over a row's dlogits at 0.
        tl.store(correction_parts + at, tl.sum(scaled.to(tl.float32) * a, axis=1), mask=inside)
        tl.debug_barrier()  # the next block reads what other threads stored


@triton.jit(do_not_specialize=["lo", "first_column", "T", "L", "height", "n_tiles"])
def dlogits_kernel(
    scaled_g, s, first, length, correction_parts, weights, lo, first_column, T, L, height, n_tiles, H,
    P: tl.constexpr, SLICES: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    b = n // H
    local = tl.program_id(1) * TILE
    row = lo + local
    column = first_column + tl.program_id(0) * TILE
    if column >= L + row + TILE:
        return
    summed = summed_features(P, row, column, first, length, b, T, L, TILE)
    if summed == 0:  # weights are 0 there
        return
    rows, columns = row + tl.arange(0, TILE), column + tl.arange(0, TILE)
    gradients = scaled_g + n * T * P + rows[:, None] * P
    values = s + n * (L + T) * P + columns[None, :] * P
    inside = rows < T
    products = inner_products(gradients, values, inside[:, None], (columns < L + T)[None, :], summed, P, STEP)
    correction = tl.zeros((TILE,), tl.float32)
    for part in range(SLICES):
        at = correction_parts + (part * tl.num_programs(2) + n) * T + rows
        correction += tl.load(at, mask=inside, other=0.0)
    own = panel_tile(weights, n, height, n_tiles, TILE)
    w = tl.load(own).to(tl.float32)
    if length is None:
        # Rows that see nothing outside this tile need no correction from elsewhere, and this one is more accurate.
        start = tl.zeros((TILE,), tl.int32)
        if first is not None:
            start = tl.load(first + b * T + rows, mask=inside, other=0).to(tl.int32)
        mean = tl.sum(w * products, axis=1) / tl.maximum(tl.sum(w, axis=1), 1e-30)
        correction = tl.where((start >= column) & (rows < column + TILE), mean, correction)
    dlogits = w * (products - correction[:, None])
    tl.store(own, dlogits.to(weights.dtype.element_ty))
