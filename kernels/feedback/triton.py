"""Feedback attention on CUDA by panels: Triton kernels, memory linear in T (docs/sessa-kernel.md has the reasons).

Forward, over panels of R rows from the first to the last:

    scores    exp(logit - max of the tile) for the panel's rows and all columns that they see, in the inputs' dtype,
              and each tile's row maxima and sums in float32
    inverse   maximum and sum of whole rows, and (I - W)^-1 - I for each M x M block on the diagonal
    product   alpha[panel, before] s[before]
    solve     the panel's triangle by blocks of M rows, for a slice of the features per program

Backward, over panels of R columns from the last to the first, for all rows that see them:

    alpha               alpha again, from the saved maxima and sums
    transposed_product  alpha[after, panel]^T (gamma G)[after]
    transposed_solve    the panel's triangle, transposed: G = df; and dgamma_t = <G_t, a_t>, a = alpha s saved
    dlogits             alpha * (<gamma_t G_t, s_j> - <gamma_t G_t, a_t>), in place of alpha
    transposed_product  dk
    dq                  dq, added up over the panels in float32

Gains and softmax statistics multiply in float32; products take operands of the inputs' dtype and add up in float32.
Each output element is added up by one program, or in shares by several where there are few elements (`splits`), in a
fixed order: results are deterministic.

A row t sees column c if first[t] <= c < L + t, and, with a past, c < length or c >= L. The past is padded to whole
tiles (the padding lies in that gap), so that tiles of rows and of columns meet at the diagonal.

Letters: B batch, H heads, N = B * H, T new positions, L past positions, S = L + T columns, K key width, P value
width, R rows of a panel, M rows of a diagonal block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """What a program holds. The choice depends on the dtype alone; docs/sessa-kernel.md says why these."""

    tile: int  # rows and columns of a tile, and most features of an output tile
    step: int  # how much of the summed dimension is loaded at a time
    product_step: int  # the same in `product`; a whole tile where the loads are to run ahead over tiles
    block: int  # M
    slice: int  # features per program of a solve
    warps: int
    solve_warps: int
    stages: int


HALF = Tiles(tile=128, step=64, product_step=128, block=64, slice=32, warps=8, solve_warps=4, stages=3)
SINGLE = Tiles(tile=64, step=16, product_step=16, block=32, slice=16, warps=8, solve_warps=4, stages=3)

PANEL_BYTES = 256 * 2**20
"""Panels are made smaller, down to one tile of rows, where a panel's weights would take more than this."""
PROGRAMS = 256
"""Least programs that keep a GPU busy: about two for each multiprocessor of an A100 or H100. A panel of one long
sequence has fewer output tiles than that, and then programs share the sum of a tile."""
TILES_PER_SPLIT = 4
"""Least tiles that a program adds up where the sum is shared."""


def tiles_for(dtype: torch.dtype) -> Tiles:
    return SINGLE if dtype == torch.float32 else HALF


def panel_rows(N: int, T: int, S: int, dtype: torch.dtype, chunk_size: int | None) -> int:
    """R, in whole tiles. Large panels are fewer launches and less traffic of dq, small ones less of a serial solve."""
    tile = tiles_for(dtype).tile
    if chunk_size is not None:
        R = 4 * tile
        while max(chunk_size, tile) < R:
            R //= 2
        return R
    R = 512 if T >= 2048 else 256 if T > 256 else 128
    while R > 128 and N * R * S * dtype.itemsize > PANEL_BYTES:
        R //= 2
    return R


def product_precision() -> str:
    """Of products of float32 operands: what torch allows itself."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
        maximum and sum of exp(logit - maximum) of each row's visible logits, (B, H, T) float32, -inf and 0 where
        nothing is visible; (I - W)^-1 - I of the diagonal blocks, (B, H, ceil(T / M) M, M) in f's dtype.
    """
    B, H, T, P = f.shape
    S, K = k.shape[2:]
    L = S - T
    N = B * H
    tiles = tiles_for(f.dtype)
    R = panel_rows(N, T, S, f.dtype, chunk_size)
    q, k, f, gamma = (x.contiguous() for x in (q, k, f, gamma))
    first = None if ids is None else torch.searchsorted(ids.contiguous(), ids.contiguous())  # (B, T)
    visible = {"first": q if first is None else first, "length": q if length is None else length.contiguous()}
    flags = {"HAS_SEGMENTS": first is not None, "HAS_PAST": L > 0}

    s = f.new_empty(N, S, P)
    if L:
        s[:, :L] = s_past.flatten(0, 1)
    attended = gamma.new_empty(B, H, T, P)
    top, total = gamma.new_empty(B, H, T), gamma.new_empty(B, H, T)
    inverse = f.new_empty(B, H, _round_up(T, tiles.block), tiles.block)
    n_tiles = triton.cdiv(S, tiles.tile)
    weights = f.new_empty(N, R, n_tiles * tiles.tile)
    tops, sums = gamma.new_empty(N, n_tiles, R), gamma.new_empty(N, n_tiles, R)
    width = _width(P, tiles)
    programs = N * triton.cdiv(P, width) * (R // tiles.tile)
    means = gamma.new_empty(_splits(programs, n_tiles), N, R, P)
    precision = product_precision()
    tiling = {"R": R, "TILE": tiles.tile}
    with torch.cuda.device_of(q):
        for lo in range(0, T, R):
            rows = min(R, T - lo)
            row_tiles = triton.cdiv(rows, tiles.tile)
            splits = _splits(programs, (L + lo) // tiles.tile) if L + lo else 0
            scores_kernel[(triton.cdiv(L + lo + rows, tiles.tile), row_tiles, N)](
                q,
                k,
                **visible,
                weights=weights,
                tops=tops,
                sums=sums,
                scale=scale,
                lo=lo,
                T=T,
                L=L,
                n_tiles=n_tiles,
                H=H,
                K=K,
                **tiling,
                **_inner_options(K, tiles),
                **flags,
                PRECISION=precision,
            )
            inverse_kernel[(triton.cdiv(rows, tiles.block), N)](
                weights,
                tops,
                sums,
                gamma,
                visible["first"],
                top,
                total,
                inverse,
                lo,
                T,
                L,
                n_tiles,
                H=H,
                **tiling,
                M=tiles.block,
                HAS_SEGMENTS=flags["HAS_SEGMENTS"],
                # Of the tf32 products of 16-bit inputs the error is less than that of their rounding.
                PRECISION=precision if f.dtype == torch.float32 else "tf32",
                **_launch(tiles.solve_warps),
            )
            if splits:
                product_kernel[(triton.cdiv(P, width), row_tiles, N * splits)](
                    weights,
                    tops,
                    s,
                    visible["first"],
                    top,
                    total,
                    means,
                    lo,
                    T,
                    L,
                    n_tiles,
                    splits,
                    H=H,
                    P=P,
                    **tiling,
                    STEP=tiles.product_step,
                    WIDTH=width,
                    HAS_SEGMENTS=flags["HAS_SEGMENTS"],
                    PRECISION=precision,
                    # Its stages hold TILE columns each, and a third spills registers on sm_80.
                    **_launch(tiles.warps, 2),
                )
            solve_kernel[(triton.cdiv(P, tiles.slice), N)](
                weights,
                tops,
                f,
                gamma,
                visible["first"],
                top,
                total,
                inverse,
                means,
                s,
                attended,
                lo,
                T,
                L,
                n_tiles,
                splits,
                H=H,
                P=P,
                **tiling,
                M=tiles.block,
                WIDTH=tiles.slice,
                HAS_SEGMENTS=flags["HAS_SEGMENTS"],
                PRECISION=precision,
                **_launch(tiles.solve_warps),
            )
    return s[:, L:].unflatten(0, (B, H)).contiguous(), attended, top, total, inverse


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
    L = S - T
    N = B * H
    tiles = tiles_for(s.dtype)
    R = panel_rows(N, T, S, s.dtype, chunk_size)
    ds, q, k, gamma, attended = (x.contiguous() for x in (ds, q, k, gamma, attended))
    top, total, inverse = (x.contiguous() for x in (top, total, inverse))
    s = torch.cat([s_past, s], dim=2) if L else s.contiguous()  # (B, H, S, P)
    first = last = None
    if ids is not None:
        ids = ids.contiguous()
        first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)  # (B, T)
    visible = {"first": q if first is None else first, "length": q if length is None else length.contiguous()}
    flags = {"HAS_SEGMENTS": first is not None, "HAS_PAST": L > 0}

    dq_sum = gamma.new_empty(B, H, T, K)
    dk, g = k.new_empty(B, H, S, K), s.new_empty(B, H, S, P)
    scaled_g = s.new_empty(N, T, P)
    n_slices = triton.cdiv(P, tiles.slice)
    dgamma_parts = gamma.new_empty(n_slices, B, H, T)
    correction_parts = torch.empty_like(dgamma_parts)
    rows_below = _round_up(T, tiles.tile)
    weights = s.new_empty(N, rows_below, R)
    value_width, key_width = _width(P, tiles), _width(K, tiles)
    programs = N * max(triton.cdiv(P, value_width), triton.cdiv(K, key_width)) * (R // tiles.tile)
    most_splits = _splits(programs, rows_below // tiles.tile)
    parts = gamma.new_empty(most_splits * N * R * max(P, K))
    rhs = parts[: most_splits * N * R * P].view(most_splits, N, R, P)
    precision = product_precision()
    tiling = {"R": R, "TILE": tiles.tile}

    def transposed_product(x, out, first_row, factor, begin, splits, lo, columns, diagonal):
        """out (splits, B, H, rows, W), from `first_row`: shares of factor * weights^T x, rows of x from lo + begin."""
        W = x.shape[-1]
        width = _width(W, tiles)
        transposed_product_kernel[(triton.cdiv(W, width), triton.cdiv(columns, tiles.tile), N * splits)](
            weights,
            x,
            out,
            q if last is None else last,
            factor,
            begin,
            lo,
            columns,
            T,
            out.shape[-2],
            first_row,
            splits,
            H=H,
            W=W,
            **tiling,
            STEP=tiles.step,
            WIDTH=width,
            DIAGONAL=diagonal,
            HAS_SEGMENTS=last is not None,
            PRECISION=precision,
            **_launch(tiles.warps, tiles.stages),
        )

    def transposed_sum(x, out, factor, lo, first_column, columns, diagonal):
        """out (B, H, S, W) = factor * weights^T x, for a panel's columns."""
        splits = _splits(programs, (T - lo) // tiles.tile)
        if splits == 1:
            transposed_product(x, out, first_column, factor, 0, 1, lo, columns, diagonal)
            return
        shares = parts[: splits * N * R * x.shape[-1]].view(splits, B, H, R, -1)
        transposed_product(x, shares, 0, factor, 0, splits, lo, columns, diagonal)
        out[:, :, first_column : first_column + columns] = shares[:, :, :, :columns].sum(0)

    # (first row that sees the panel, first column, columns, whether the panel holds a part of the diagonal)
    panels = [(0, c, min(R, L - c), False) for c in range(0, L, R)]
    panels += [(lo, L + lo, min(R, T - lo), True) for lo in range(0, T, R)]
    with torch.cuda.device_of(q):
        for lo, first_column, columns, diagonal in reversed(panels):
            column_tiles, row_tiles = triton.cdiv(columns, tiles.tile), triton.cdiv(T - lo, tiles.tile)
            panel = {"lo": lo, "first_column": first_column, "T": T, "L": L}
            alpha_kernel[(column_tiles, row_tiles, N)](
                q,
                k,
                **visible,
                top=top,
                total=total,
                weights=weights,
                scale=scale,
                **panel,
                H=H,
                K=K,
                **tiling,
                **_inner_options(K, tiles),
                **flags,
                PRECISION=precision,
            )
            span = (lo, first_column, columns, diagonal)
            if diagonal:
                splits = _splits(programs, (T - lo - R) // tiles.tile) if lo + R < T else 0
                if splits:
                    transposed_product(scaled_g, rhs, 0, 1.0, R, splits, lo, columns, True)
                transposed_solve_kernel[(n_slices, N)](
                    weights,
                    ds,
                    rhs,
                    gamma,
                    inverse,
                    attended,
                    g,
                    scaled_g,
                    dgamma_parts,
                    correction_parts,
                    lo,
                    T,
                    L,
                    splits,
                    P=P,
                    **tiling,
                    M=tiles.block,
                    WIDTH=tiles.slice,
                    PRECISION=precision,
                    **_launch(tiles.solve_warps),
                )
            else:
                transposed_sum(scaled_g, g, 1.0, *span)
            dlogits_kernel[(column_tiles, row_tiles, N)](
                scaled_g,
                s,
                **visible,
                correction_parts=correction_parts,
                weights=weights,
                **panel,
                H=H,
                P=P,
                SLICES=n_slices,
                **tiling,
                **_inner_options(P, tiles),
                **flags,
                PRECISION=precision,
            )
            transposed_sum(q, dk, scale, *span)
            dq_kernel[(triton.cdiv(K, key_width), row_tiles, N)](
                weights,
                k,
                visible["first"],
                dq_sum,
                lo,
                first_column,
                columns,
                T,
                L,
                H=H,
                K=K,
                **tiling,
                STEP=tiles.step,
                WIDTH=key_width,
                DIAGONAL=diagonal,
                HAS_SEGMENTS=flags["HAS_SEGMENTS"],
                PRECISION=precision,
                **_launch(tiles.warps, tiles.stages),
            )
    dq = scaled_g.view_as(q) if K == P else torch.empty_like(q)  # scaled_g is not needed any more
    return torch.mul(dq_sum, scale, out=dq), dk, dgamma_parts.sum(0), g


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _width(width: int, tiles: Tiles) -> int:
    """Features of an output tile; a tensor core's product has at least 16."""
    return max(16, min(tiles.tile, triton.next_power_of_2(width)))


def _splits(programs: int, tiles: int) -> int:
    """Among how many programs a sum over `tiles` is divided, where there are only `programs` sums."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), tiles // TILES_PER_SPLIT))


def _inner_options(width: int, tiles: Tiles) -> dict[str, int]:
    """Options of the kernels that sum over features."""
    step = max(16, min(tiles.step, triton.next_power_of_2(width)))
    return {"STEP": step, **_launch(tiles.warps, tiles.stages)}


def _launch(warps: int, stages: int = 3) -> dict[str, int]:
    # A program may have all registers: else the assembler spills a few of some kernels to make room for another.
    return {"num_warps": warps, "num_stages": stages, "maxnreg": 255}


# ---- what several kernels do ----


@triton.jit
def _visible(
    row,
    column,
    first,
    length,
    b,
    T,
    L,
    TILE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PAST: tl.constexpr,
):
    """(TILE, TILE), whether rows from `row` see columns from `column`."""
    rows = row + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    visible = (columns[None, :] < L + rows[:, None]) & (rows < T)[:, None]
    if HAS_SEGMENTS:
        start = tl.load(first + b * T + rows, mask=rows < T, other=0)  # (TILE,)
        visible = visible & (columns[None, :] >= start[:, None])
    if HAS_PAST:
        visible = visible & ((columns < tl.load(length + b)) | (columns >= L))[None, :]
    return visible


@triton.jit
def _summed(
    width,
    row,
    column,
    first,
    length,
    b,
    T,
    L,
    TILE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PAST: tl.constexpr,
):
    """`width`, or 0 where none of the tile's rows sees any of its columns: then there is nothing to compute."""
    if HAS_SEGMENTS:
        width = tl.where(column + TILE <= tl.load(first + b * T + row), 0, width)
    if HAS_PAST:
        width = tl.where((column >= tl.load(length + b)) & (column + TILE <= L), 0, width)
    return width


@triton.jit
def _inner_products(
    x,
    y,
    n_rows,
    n_columns,
    row,
    column,
    summed,
    W: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(TILE, TILE): rows of x (n_rows, W) by rows of y (n_columns, W), over the first `summed` features."""
    rows = row + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    products = tl.zeros((TILE, TILE), tl.float32)
    for at in range(0, summed, STEP):
        features = at + tl.arange(0, STEP)
        inside = features < W
        a = tl.load(
            x + rows[:, None] * W + features[None, :],
            mask=(rows < n_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            y + columns[None, :] * W + features[:, None],
            mask=(columns < n_columns)[None, :] & inside[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
def _finite(top):
    """Maxima to subtract: 0 for rows that see nothing, whose maximum is -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


# ---- forward ----


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles"])
def scores_kernel(
    q,  # (N, T, K)
    k,  # (N, S, K)
    first,  # (B, T)
    length,  # (B,)
    weights,  # (N, R, n_tiles * TILE)
    tops,  # (N, n_tiles, R)
    sums,  # (N, n_tiles, R)
    scale,
    lo,
    T,
    L,
    n_tiles,
    H,
    K: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    b = n // H
    local = tl.program_id(1) * TILE
    row = lo + local
    column = tl.program_id(0) * TILE
    if column >= L + row + TILE:  # above the diagonal: nothing reads it
        return
    summed = _summed(K, row, column, first, length, b, T, L, TILE, HAS_SEGMENTS, HAS_PAST)
    logits = scale * _inner_products(
        q + n * T * K, k + n * (L + T) * K, T, L + T, row, column, summed, K, TILE, STEP, PRECISION
    )
    visible = _visible(row, column, first, length, b, T, L, TILE, HAS_SEGMENTS, HAS_PAST)
    logits = tl.where(visible, logits, float("-inf"))
    top = tl.max(logits, axis=1)  # (TILE,)
    # Summed as they are stored: weights that sum to 1 leave no rounding that is common to a row.
    w = tl.exp(logits - _finite(top)[:, None]).to(weights.dtype.element_ty)

    rows = local + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    at = weights + n * R * n_tiles * TILE + rows[:, None] * (n_tiles * TILE) + columns[None, :]
    tl.store(at, w)
    statistics = (n * n_tiles + tl.program_id(0)) * R + rows
    tl.store(tops + statistics, top)
    tl.store(sums + statistics, tl.sum(w.to(tl.float32), axis=1))


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles"])
def inverse_kernel(
    weights,  # (N, R, n_tiles * TILE)
    tops,  # (N, n_tiles, R)
    sums,  # (N, n_tiles, R)
    gamma,  # (N, T)
    first,  # (B, T)
    top,  # (N, T)
    total,  # (N, T)
    inverse,  # (N, ceil(T / M) * M, M)
    lo,
    T,
    L,
    n_tiles,
    H,
    R: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    local = tl.program_id(0) * M + i  # (M,)
    rows = lo + local
    inside = rows < T
    own = (L + lo + tl.program_id(0) * M) // TILE  # the tile of columns that holds the diagonal
    begin = 0
    if HAS_SEGMENTS:
        begin = (tl.load(first + n // H * T + lo + tl.program_id(0) * M) // TILE).to(tl.int32)

    row_top = tl.full((M,), float("-inf"), tl.float32)
    for tile in range(begin, own + 1):
        row_top = tl.maximum(row_top, tl.load(tops + (n * n_tiles + tile) * R + local))
    shift = _finite(row_top)
    row_total = tl.zeros((M,), tl.float32)
    for tile in range(begin, own + 1):
        statistics = (n * n_tiles + tile) * R + local
        row_total += tl.load(sums + statistics) * tl.exp(tl.load(tops + statistics) - shift)
    tl.store(top + n * T + rows, row_top, mask=inside)
    tl.store(total + n * T + rows, row_total, mask=inside)

    gain = tl.load(gamma + n * T + rows, mask=inside, other=0.0)
    factor = tl.exp(tl.load(tops + (n * n_tiles + own) * R + local) - shift) / tl.maximum(row_total, 1.0)
    columns = tl.multiple_of(L + lo, M) + tl.program_id(0) * M + i
    own_rows = weights + n * R * n_tiles * TILE + local[:, None] * (n_tiles * TILE)  # (M, 1)
    w = tl.load(own_rows + columns[None, :]).to(tl.float32)
    w = w * (gain * factor)[:, None]

    # The inverse of blocks twice as large: [[A, 0], [-C, D]]^-1 = [[A^-1, 0], [D^-1 C A^-1, D^-1]].
    difference = (
        i[:, None] ^ i[None, :]
    )  # its highest bit is the size of the blocks that row and column are in
    x = tl.where(i[:, None] == i[None, :], 1.0, tl.where(difference == 1, w, 0.0))
    size = 2
    while size < M:
        off = tl.where((difference >= size) & (difference < 2 * size), w, 0.0)
        x += tl.dot(x, tl.dot(off, x, input_precision=PRECISION), input_precision=PRECISION)
        size *= 2
    x = tl.where(i[:, None] > i[None, :], x, 0.0)
    padded = (T + M - 1) // M * M
    at = inverse + n * padded * M + rows[:, None] * M + i[None, :]
    tl.store(at, x.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles", "splits"])
def product_kernel(
    weights,  # (N, R, n_tiles * TILE)
    tops,  # (N, n_tiles, R)
    s,  # (N, S, P)
    first,  # (B, T)
    top,  # (N, T)
    total,  # (N, T)
    means,  # (splits, N, R, P)
    lo,
    T,
    L,
    n_tiles,
    splits,
    H,
    P: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over one of `splits` shares of the tiles before the panel."""
    n = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    local = tl.program_id(1) * TILE + tl.arange(0, TILE)
    rows = lo + local
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (p < P)[None, :]
    shift = _finite(tl.load(top + n * T + rows, mask=rows < T, other=0.0))  # (TILE,)
    begin = 0
    end = (L + lo) // TILE
    if HAS_SEGMENTS:
        begin = (tl.load(first + n // H * T + lo + tl.program_id(1) * TILE) // TILE).to(tl.int32)
    share = tl.cdiv(end - begin, splits)
    begin += split * share
    own_rows = weights + n * R * n_tiles * TILE + local[:, None] * (n_tiles * TILE)  # (TILE, 1)
    values = s + n * (L + T) * P

    attended = tl.zeros((TILE, WIDTH), tl.float32)
    for tile in range(begin, tl.minimum(begin + share, end)):
        products = tl.zeros((TILE, WIDTH), tl.float32)
        for at in range(0, TILE, STEP):
            columns = tile * TILE + at + tl.arange(0, STEP)
            w = tl.load(own_rows + columns[None, :])
            y = tl.load(values + columns[:, None] * P + p[None, :], mask=some, other=0.0)
            products = tl.dot(w, y, products, input_precision=PRECISION)
        factor = tl.exp(tl.load(tops + (n * n_tiles + tile) * R + local) - shift)
        attended += factor[:, None] * products
    row_total = tl.load(total + n * T + rows, mask=rows < T, other=1.0)
    attended = attended / tl.maximum(row_total, 1.0)[:, None]
    sequences = tl.num_programs(2) // splits
    own = means + (split * sequences + n) * R * P + local[:, None] * P + p[None, :]
    tl.store(own, attended, mask=some)


@triton.jit(do_not_specialize=["lo", "T", "L", "n_tiles", "splits"])
def solve_kernel(
    weights,  # (N, R, n_tiles * TILE)
    tops,  # (N, n_tiles, R)
    f,  # (N, T, P)
    gamma,  # (N, T)
    first,  # (B, T)
    top,  # (N, T)
    total,  # (N, T)
    inverse,  # (N, ceil(T / M) * M, M)
    means,  # (splits, N, R, P)
    s,  # (N, S, P)
    attended,  # (N, T, P)
    lo,
    T,
    L,
    n_tiles,
    splits,
    H,
    P: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (p < P)[None, :]
    padded = (T + M - 1) // M * M
    # Said so, loads are of 16 bytes and run ahead: L is in whole tiles and lo in whole panels.
    panel = weights + n * R * n_tiles * TILE + tl.multiple_of(L + lo, M)  # its own columns
    solution = s + (n * (L + T) + L + lo) * P  # its own rows
    for block in range(0, (tl.minimum(R, T - lo) + M - 1) // M):
        local = block * M + i
        rows = lo + local
        inside = rows < T
        shift = _finite(tl.load(top + n * T + rows, mask=inside, other=0.0))  # (M,)
        norm = 1.0 / tl.maximum(tl.load(total + n * T + rows, mask=inside, other=1.0), 1.0)
        own_rows = panel + local[:, None] * (n_tiles * TILE)  # (M, 1)
        begin = 0
        if HAS_SEGMENTS:
            begin = tl.maximum(tl.load(first + n // H * T + lo + block * M) - lo, 0).to(tl.int32) // M

        u = tl.zeros((M, WIDTH), tl.float32)
        for split in range(splits):
            mean = means + (split * tl.num_programs(1) + n) * R * P
            u += tl.load(mean + local[:, None] * P + p[None, :], mask=some, other=0.0)
        for j in range(begin, block):
            w = tl.load(own_rows + (j * M + i)[None, :])
            y = tl.load(solution + (j * M + i)[:, None] * P + p[None, :], mask=some, other=0.0)
            tile = (L + lo + j * M) // TILE
            factor = tl.exp(tl.load(tops + (n * n_tiles + tile) * R + local) - shift) * norm
            u += factor[:, None] * tl.dot(w, y, input_precision=PRECISION)

        here = inside[:, None] & some
        own = n * T * P + rows[:, None] * P + p[None, :]
        gain = tl.load(gamma + n * T + rows, mask=inside, other=0.0)
        rhs = tl.load(f + own, mask=here, other=0.0).to(tl.float32) + gain[:, None] * u
        x = tl.load(inverse + n * padded * M + rows[:, None] * M + i[None, :])
        solved = (rhs + tl.dot(x, rhs.to(x.dtype), input_precision=PRECISION)).to(x.dtype)
        tl.store(solution + local[:, None] * P + p[None, :], solved, mask=here)

        w = tl.load(own_rows + local[None, :])
        tile = (L + lo + block * M) // TILE
        factor = tl.exp(tl.load(tops + (n * n_tiles + tile) * R + local) - shift) * norm
        u += factor[:, None] * tl.dot(w, solved, input_precision=PRECISION)
        tl.store(attended + own, u, mask=here)
        tl.debug_barrier()  # the next block reads what other threads stored


# ---- backward ----


@triton.jit(do_not_specialize=["lo", "first_column", "T", "L"])
def alpha_kernel(
    q,  # (N, T, K)
    k,  # (N, S, K)
    first,  # (B, T)
    length,  # (B,)
    top,  # (N, T)
    total,  # (N, T)
    weights,  # (N, ceil(T / TILE) * TILE, R), rows from lo
    scale,
    lo,
    first_column,
    T,
    L,
    H,
    K: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    b = n // H
    row = lo + tl.program_id(1) * TILE
    column = first_column + tl.program_id(0) * TILE
    if column >= L + row + TILE:
        return
    summed = _summed(K, row, column, first, length, b, T, L, TILE, HAS_SEGMENTS, HAS_PAST)
    logits = scale * _inner_products(
        q + n * T * K, k + n * (L + T) * K, T, L + T, row, column, summed, K, TILE, STEP, PRECISION
    )
    rows = row + tl.arange(0, TILE)
    shift = _finite(tl.load(top + n * T + rows, mask=rows < T, other=0.0))
    norm = 1.0 / tl.maximum(tl.load(total + n * T + rows, mask=rows < T, other=1.0), 1.0)
    visible = _visible(row, column, first, length, b, T, L, TILE, HAS_SEGMENTS, HAS_PAST)
    alpha = tl.where(visible, tl.exp(logits - shift[:, None]) * norm[:, None], 0.0)
    padded = (T + TILE - 1) // TILE * TILE
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = weights + n * padded * R + (rows - lo)[:, None] * R + columns[None, :]
    tl.store(at, alpha.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["begin", "lo", "columns", "T", "out_rows", "out_row", "splits"])
def transposed_product_kernel(
    weights,  # (N, ceil(T / TILE) * TILE, R), rows from lo
    x,  # (N, T, W)
    out,  # (splits, N, out_rows, W), rows from out_row
    last,  # (B, T)
    factor,
    begin,
    lo,
    columns,
    T,
    out_rows,
    out_row,
    splits,
    H,
    W: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[column] = factor * sum of weights[t, column] x[t] over one of `splits` shares of the rows from lo + begin."""
    n = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    column = tl.program_id(1) * TILE
    j = column + tl.arange(0, TILE)
    features = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (features < W)[None, :]
    padded = (T + TILE - 1) // TILE * TILE
    end = T - lo
    if DIAGONAL:
        begin = tl.maximum(begin, column)
    if HAS_SEGMENTS:  # columns are rows: there is no past
        end = (tl.load(last + n // H * T + tl.minimum(lo + column + TILE, T) - 1) - lo).to(tl.int32)
    share = tl.cdiv(tl.cdiv(end - begin, splits), STEP) * STEP
    begin += split * share
    panel = weights + n * padded * R
    operand = x + (n * T + lo) * W
    products = tl.zeros((TILE, WIDTH), tl.float32)
    for at in range(begin, tl.minimum(begin + share, end), STEP):
        t = at + tl.arange(0, STEP)
        inside = (t < T - lo)[:, None]
        a = tl.load(panel + t[:, None] * R + j[None, :], mask=inside, other=0.0)
        y = tl.load(operand + t[:, None] * W + features[None, :], mask=inside & some, other=0.0)
        products = tl.dot(tl.trans(a), y, products, input_precision=PRECISION)
    sequences = tl.num_programs(2) // splits
    own = out + ((split * sequences + n) * out_rows + out_row) * W + j[:, None] * W + features[None, :]
    tl.store(own, (products * factor).to(out.dtype.element_ty), mask=(j < columns)[:, None] & some)


@triton.jit(do_not_specialize=["lo", "T", "L", "splits"])
def transposed_solve_kernel(
    weights,  # (N, ceil(T / TILE) * TILE, R), rows from lo
    ds,  # (N, T, P)
    parts,  # (splits, N, R, P)
    gamma,  # (N, T)
    inverse,  # (N, ceil(T / M) * M, M)
    attended,  # (N, T, P)
    g,  # (N, S, P)
    scaled_g,  # (N, T, P)
    dgamma_parts,  # (ceil(P / WIDTH), N, T)
    correction_parts,  # (ceil(P / WIDTH), N, T)
    lo,
    T,
    L,
    splits,
    P: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, M)
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (p < P)[None, :]
    padded = (T + TILE - 1) // TILE * TILE
    padded_blocks = (T + M - 1) // M * M
    panel = weights + n * padded * R
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
            part = parts + (split * tl.num_programs(1) + n) * R * P
            v += tl.load(part + local[:, None] * P + p[None, :], mask=here, other=0.0)
        for j in range(block + 1, blocks):
            below = j * M + i
            later = (lo + below < T)[:, None]
            w = tl.load(panel + below[:, None] * R + local[None, :])
            after = scaled_g + (n * T + lo) * P + below[:, None] * P + p[None, :]
            y = tl.load(after, mask=later & some, other=0.0)
            v += tl.dot(tl.trans(w), y, input_precision=PRECISION)
        x = tl.load(inverse + n * padded_blocks * M + rows[:, None] * M + i[None, :])
        v += tl.dot(tl.trans(x), v.to(x.dtype), input_precision=PRECISION)
        tl.store(g + (n * (L + T) + L) * P + rows[:, None] * P + p[None, :], v.to(x.dtype), mask=here)
        gain = tl.load(gamma + n * T + rows, mask=inside, other=0.0)
        scaled = (gain[:, None] * v).to(x.dtype)
        tl.store(scaled_g + own, scaled, mask=here)
        a = tl.load(attended + own, mask=here, other=0.0)
        at = (tl.program_id(0) * tl.num_programs(1) + n) * T + rows
        tl.store(dgamma_parts + at, tl.sum(v * a, axis=1), mask=inside)
        # gamma dgamma, but of what `dlogits` multiplies: so rounding leaves the sum over a row's dlogits at 0.
        tl.store(correction_parts + at, tl.sum(scaled.to(tl.float32) * a, axis=1), mask=inside)
        tl.debug_barrier()  # the next block reads what other threads stored


@triton.jit(do_not_specialize=["lo", "first_column", "T", "L"])
def dlogits_kernel(
    scaled_g,  # (N, T, P)
    s,  # (N, S, P)
    first,  # (B, T)
    length,  # (B,)
    correction_parts,  # (SLICES, N, T)
    weights,  # (N, ceil(T / TILE) * TILE, R), rows from lo
    lo,
    first_column,
    T,
    L,
    H,
    P: tl.constexpr,
    SLICES: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    b = n // H
    row = lo + tl.program_id(1) * TILE
    column = first_column + tl.program_id(0) * TILE
    if column >= L + row + TILE:
        return
    summed = _summed(P, row, column, first, length, b, T, L, TILE, HAS_SEGMENTS, HAS_PAST)
    if summed == 0:  # alpha is 0 there
        return
    products = _inner_products(
        scaled_g + n * T * P, s + n * (L + T) * P, T, L + T, row, column, summed, P, TILE, STEP, PRECISION
    )
    rows = row + tl.arange(0, TILE)
    correction = tl.zeros((TILE,), tl.float32)
    for part in range(SLICES):
        at = correction_parts + (part * tl.num_programs(2) + n) * T + rows
        correction += tl.load(at, mask=rows < T, other=0.0)
    padded = (T + TILE - 1) // TILE * TILE
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = weights + n * padded * R + (rows - lo)[:, None] * R + columns[None, :]
    alpha = tl.load(at).to(tl.float32)
    if not HAS_PAST:
        # Rows that see nothing outside this tile need no correction from elsewhere, and this one is more accurate.
        start = tl.zeros((TILE,), tl.int32)
        if HAS_SEGMENTS:
            start = tl.load(first + b * T + rows, mask=rows < T, other=0).to(tl.int32)
        mean = tl.sum(alpha * products, axis=1) / tl.maximum(tl.sum(alpha, axis=1), 1e-30)
        correction = tl.where((start >= column) & (rows < column + TILE), mean, correction)
    dlogits = alpha * (products - correction[:, None])
    tl.store(at, dlogits.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["lo", "first_column", "columns", "T", "L"])
def dq_kernel(
    weights,  # (N, ceil(T / TILE) * TILE, R), rows from lo
    k,  # (N, S, K)
    first,  # (B, T)
    dq_sum,  # (N, T, K)
    lo,
    first_column,
    columns,
    T,
    L,
    H,
    K: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    DIAGONAL: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    local = tl.program_id(1) * TILE
    t = local + tl.arange(0, TILE)
    rows = lo + t
    features = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    some = (features < K)[None, :]
    padded = (T + TILE - 1) // TILE * TILE
    begin = 0
    end = columns
    started = t >= 0  # whether a panel before, of later columns, has written these rows
    if DIAGONAL:
        end = tl.minimum(columns, local + TILE)
        started = t >= R
    if HAS_SEGMENTS:
        begin = tl.maximum(tl.load(first + n // H * T + lo + local) - lo, 0).to(tl.int32) // TILE * TILE
        if begin >= end:  # nothing to add; a panel that starts a row has its diagonal
            return
    panel = weights + n * padded * R
    keys = k + (n * (L + T) + first_column) * K
    own = dq_sum + n * T * K + rows[:, None] * K + features[None, :]
    here = (rows < T)[:, None] & some
    products = tl.load(own, mask=here & started[:, None], other=0.0)
    for at in range(begin, end, STEP):
        j = at + tl.arange(0, STEP)
        w = tl.load(panel + t[:, None] * R + j[None, :])
        # Beyond the panel's own columns the weights of this panel are not written, or 0.
        inside = (j < columns)[:, None]
        y = tl.load(keys + j[:, None] * K + features[None, :], mask=inside & some, other=0.0)
        products = tl.dot(w, y, products, input_precision=PRECISION)
    tl.store(own, products, mask=here)
