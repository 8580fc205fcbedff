"""What several of the Triton kernels do. A tile is TILE rows from `row` by TILE columns from `column`.

`first` (B, T), where a row's segment begins, is None without segments; `length` (B,), how many past positions are
valid, without a past.
"""

import triton
import triton.language as tl


@triton.jit
def visible(row, column, first, length, b, T, L, TILE: tl.constexpr):
    """(TILE, TILE), whether rows see columns."""
    rows = row + tl.arange(0, TILE)
    columns = column + tl.arange(0, TILE)
    seen = (columns[None, :] < L + rows[:, None]) & (rows < T)[:, None]
    if first is not None:
        start = tl.load(first + b * T + rows, mask=rows < T, other=0)  # (TILE,)
        seen = seen & (columns[None, :] >= start[:, None])
    if length is not None:
        seen = seen & ((columns < tl.load(length + b)) | (columns >= L))[None, :]
    return seen


@triton.jit
def summed_features(width, row, column, first, length, b, T, L, TILE: tl.constexpr):
    """`width`, or 0 where none of the tile's rows sees any of its columns: then there is nothing to compute."""
    if first is not None:
        width = tl.where(column + TILE <= tl.load(first + b * T + row), 0, width)
    if length is not None:
        width = tl.where((column >= tl.load(length + b)) & (column + TILE <= L), 0, width)
    return width


@triton.jit
def inner_products(x, y, x_inside, y_inside, summed, W: tl.constexpr, STEP: tl.constexpr):
    """(TILE, TILE): of the rows that begin at x (TILE, 1) and at y (1, TILE), over `summed` of the W features."""
    products = tl.zeros((x.shape[0], y.shape[1]), tl.float32)
    for at in range(0, summed, STEP):
        p = at + tl.arange(0, STEP)
        a = tl.load(x + p[None, :], mask=x_inside & (p < W)[None, :], other=0.0)
        b = tl.load(y + p[:, None], mask=y_inside & (p < W)[:, None], other=0.0)
        products = dot(a, b, products)
    return products


@triton.jit
def panel_tile(weights, n, height, n_tiles, TILE: tl.constexpr):
    """(TILE, TILE), where in a panel's weights the program's tile lies."""
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    width = n_tiles * TILE
    return weights + n * height * width + rows[:, None] * width + columns[None, :]


@triton.jit
def dot(a, b, sums):
    """a b, added to `sums` if that is not None. Never in TF32: tensor cores drop bits of it, and errors add up."""
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def halves(x, dtype: tl.constexpr):
    """float32 x as the sum of two numbers of `dtype`."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def norm(total):
    """1 / total, and 0 for rows that see nothing."""
    return tl.where(total > 0, 1.0, 0.0) / tl.where(total > 0, total, 1.0)


@triton.jit
def unit(total):
    """The power of 2 that brings a total between 1 and 2."""
    exponent = total.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where(total > 0, (0x7F000000 - exponent).to(tl.float32, bitcast=True), 1.0)
