"""Kernels of the forward pass alone: a panel's rows as a whole, and its triangle."""

import triton
import triton.language as tl

from mixerlab.kernels.feedback.triton.functions import dot, halves, norm
from mixerlab.kernels.feedback.triton.products import NOTHING

LANES = tl.constexpr(32)
"""Tiles of which a program of `inverse` reads the statistics at a time."""


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles"])
def inverse_kernel(
    weights, tops, sums, gamma, first, top, total, inverse, lo, T, L, n_tiles, H,
    R: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    local = tl.program_id(0) * M + i  # (M,)
    rows = lo + local
    inside = rows < T
    own = (L + lo + tl.program_id(0) * M) // TILE  # the tile of columns that holds the diagonal
    begin = 0
    if first is not None:
        begin = (tl.load(first + n // H * T + lo + tl.program_id(0) * M) // TILE).to(tl.int32)

    # Many tiles at a time, brought together once: the walk is short, and its loads run ahead.
    lane_top = tl.full((LANES, M), NOTHING, tl.float32)
    lane_total = tl.zeros((LANES, M), tl.float32)
    low = tl.full((LANES, M), float("inf"), tl.float32)
    for tile in tl.range(begin, own + 1, LANES, num_stages=3):
        lane = tile + tl.arange(0, LANES)[:, None]
        at = (n * n_tiles + lane) * R + local[None, :]
        reference = tl.load(tops + at, mask=lane <= own, other=NOTHING)
        here = tl.load(sums + at, mask=lane <= own, other=0.0)
        grown = tl.maximum(lane_top, reference)
        lane_total = lane_total * tl.exp2(lane_top - grown) + here * tl.exp2(reference - grown)
        low = tl.minimum(low, tl.where(here > 0, reference, float("inf")))
        lane_top = grown
    row_top = tl.max(lane_top, axis=0)
    row_total = tl.sum(lane_total * tl.exp2(lane_top - row_top[None, :]), axis=0)
    tl.store(top + n * T + rows, row_top, mask=inside)
    tl.store(total + n * T + rows, row_total, mask=inside)

    own_rows = weights + n * R * n_tiles * TILE + local[:, None] * (n_tiles * TILE)  # (M, 1)
    if tl.max(row_top - tl.min(low, axis=0), axis=0) > 0:
        # Rare: tiles of a row differ in their references. Multiplied by powers of 2, weights keep their digits.
        for tile in range(begin, own + 1):
            by = tl.exp2(tl.load(tops + (n * n_tiles + tile) * R + local) - row_top)
            for column in range(tile * TILE, (tile + 1) * TILE, M):
                at = own_rows + (column + i)[None, :]
                w = tl.load(at).to(tl.float32) * by[:, None]
                tl.store(at, w.to(weights.dtype.element_ty))
        tl.debug_barrier()  # what other threads stored is read below

    factor = (tl.load(gamma + n * T + rows, mask=inside, other=0.0) * norm(row_total))[:, None]
    columns = tl.multiple_of(L + lo, M) + tl.program_id(0) * M + i
    w = tl.load(own_rows + columns[None, :])

    # The inverse of blocks twice as large: [[A, 0], [-C, D]]^-1 = [[A^-1, 0], [D^-1 C A^-1, D^-1]]. Of 16-bit weights
    # all products are of 16 bits: the factors of rows stay outside, and what is float32 is multiplied in two parts.
    # The highest bit of the difference is the size of the blocks that row and column are in.
    difference = i[:, None] ^ i[None, :]
    x = tl.where(i[:, None] == i[None, :], 1.0, tl.where(difference == 1, w * factor, 0.0))
    size = 2
    while size < M:
        off = tl.where((difference >= size) & (difference < 2 * size), w, 0.0).to(w.dtype)
        if w.dtype == tl.float32:
            x += dot(x, factor * dot(off, x, None), None)
        else:
            x_high, x_low = halves(x, w.dtype)
            y = factor * dot(off, x_high, dot(off, x_low, None))
            y_high, y_low = halves(y, w.dtype)
            x = dot(x_high, y_high, dot(x_low, y_high, dot(x_high, y_low, x)))
        size *= 2
    x = tl.where(i[:, None] > i[None, :], x, 0.0)
    padded = (T + M - 1) // M * M
    tl.store(inverse + n * padded * M + rows[:, None] * M + i[None, :], x.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles", "splits"])
def solve_kernel(
    weights, f, gamma, first, total, inverse, means, s, attended, lo, T, L, n_tiles, splits, H,
    P: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    p = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    some = (p < P)[None, :]
    padded = (T + M - 1) // M * M
    # Said so, loads are of 16 bytes and run ahead: L is in whole tiles and lo in whole panels.
    panel = weights + n * R * n_tiles * TILE + tl.multiple_of(L + lo, M)  # its own columns
    solution = s + (n * (L + T) + L + lo) * P  # its own rows
    for block in range(0, (tl.minimum(R, T - lo) + M - 1) // M):
        local = block * M + i
        rows = lo + local
        inside = rows < T
        divided = norm(tl.load(total + n * T + rows, mask=inside, other=0.0))[:, None]
        own_rows = panel + local[:, None] * (n_tiles * TILE)  # (M, 1)
        begin = 0
        if first is not None:
            begin = tl.maximum(tl.load(first + n // H * T + lo + block * M) - lo, 0).to(tl.int32) // M

        here = inside[:, None] & some
        u = tl.zeros((M, SLICE), tl.float32)
        for split in range(splits):
            mean = means + (split * tl.num_programs(1) + n) * R * P
            u += tl.load(mean + local[:, None] * P + p[None, :], mask=here, other=0.0)
        sums = tl.zeros((M, SLICE), tl.float32)
        for j in range(begin, block):
            w = tl.load(own_rows + (j * M + i)[None, :])
            y = tl.load(solution + (j * M + i)[:, None] * P + p[None, :], mask=some, other=0.0)
            sums = dot(w, y, sums)
        u += divided * sums

        own = n * T * P + rows[:, None] * P + p[None, :]
        gain = tl.load(gamma + n * T + rows, mask=inside, other=0.0)
        rhs = tl.load(f + own, mask=here, other=0.0).to(tl.float32) + gain[:, None] * u
        x = tl.load(inverse + n * padded * M + rows[:, None] * M + i[None, :])
        solved = (rhs + dot(x, rhs.to(x.dtype), None)).to(x.dtype)
        tl.store(solution + local[:, None] * P + p[None, :], solved, mask=here)

        w = tl.load(own_rows + local[None, :])
        u += divided * dot(w, solved, None)
        tl.store(attended + own, u, mask=here)
        tl.debug_barrier()  # the next block reads what other threads stored
