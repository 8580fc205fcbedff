"""One new position of feedback attention on CUDA: two Triton launches that read the cache once, in place.

    attend    a block of cached positions per program: logits, their maximum, the sum of exp(logit - maximum), and
              the states weighted by it
    combine   brings the blocks together for a few features per program, and applies gain and input

Arithmetic is in float32, and each number is added up by one program in a fixed order. Blocks beyond a row's length
end at once and are never read. Beside the cache, a block moves its weighted states, written and read in float32: with
blocks of 32 positions and a 16-bit cache 1/16 more bytes. 32 is small enough that 8192 positions of one head make 256
programs, some for every multiprocessor. `combine` has few programs, 32 for one head 1024 wide, and each reads its
features of every block, so beyond 512 blocks (16384 positions) the block doubles with the cache: at 65536 positions it
has 128, and the extra bytes are 1/64. It stops at 512 positions, from where on there are more blocks than 512.

Letters: B batch, H heads, L cached positions, K key width, P value width.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixerlab.kernels.feedback.triton.tiles import Launcher, strides

_BLOCKS = (32, 64, 128, 256, 512)
"""Cached positions per program: the fewest that make at most `_MOST_BLOCKS`, else the last."""
_MOST_BLOCKS = 512
_LOADED = 16384
"""Most bytes loaded at a time."""


def feedback_decode(
    q: Tensor,
    k_past: Tensor,
    f: Tensor,
    gamma: Tensor,
    s_past: Tensor,
    past_length: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """s = f + gamma * alpha s_past with alpha the softmax of scale * <q, k_past> over the valid positions.

    Args:
        q: (B, H, 1, K). k_past: (B, H, L, K). f: (B, H, 1, P). s_past: (B, H, L, P). Any strides; each bfloat16,
            float16 or float32.
        gamma: (B, H, 1), any of these dtypes.
        past_length: (B,) int64, how many of the L are valid, or None for all. The rest is not read.

    Returns:
        s (B, H, 1, P) in f's dtype, and the log-sum-exp (B, H, 1) of the valid logits, float32.
    """
    B, H, L, K = k_past.shape
    P = s_past.shape[3]
    block = next((size for size in _BLOCKS if size * _MOST_BLOCKS >= L), _BLOCKS[-1])
    n_blocks = triton.cdiv(L, block)
    empty = partial(torch.empty, dtype=torch.float32, device=q.device)
    tops, totals, sums = empty(B, H, n_blocks), empty(B, H, n_blocks), empty(B, H, n_blocks, P)
    s, lse = f.new_empty(B, H, 1, P), empty(B, H, 1)
    run = Launcher(
        q=q, k=k_past, s_past=s_past, f=f, gamma=gamma, s=s, lse=lse, tops=tops, totals=totals, sums=sums,
        length=None if past_length is None else past_length.contiguous(),
        scale=scale, L=L, H=H, K=K, P=P, BLOCK=block, K_CHUNK=_chunk(k_past, block), P_CHUNK=_chunk(s_past, block),
        # Narrow, so that one wide head is spread over many programs.
        CHUNK=32, BLOCKS=64,
        **strides("q", q, "bhlp"), **strides("k", k_past, "bhlp"), **strides("s", s_past, "bhlp"),
        **strides("f", f, "bhlp"), **strides("gamma", gamma, "bh"),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        run(attend_kernel, n_blocks, B * H, warps=8 if max(K, P) > 64 else 4)
        run(combine_kernel, triton.cdiv(P, 32), B * H, warps=4)
    return s, lse


def _chunk(cache: Tensor, block: int) -> int:
    """Features loaded at a time of a block's positions."""
    most = _LOADED // (cache.element_size() * block)
    if cache.stride(3) != 1:  # of numbers that lie apart, each takes two registers of address
        most //= 4
    elif cache.stride(2) * cache.element_size() % 16:  # short loads, which take more registers than long ones
        most //= 2
    return min(max(16, triton.next_power_of_2(cache.shape[3])), most)


@triton.jit(do_not_specialize=["L"])
def attend_kernel(
    q, k, s_past, length, tops, totals, sums, scale, L,
    q_b, q_h, q_p, k_b, k_h, k_l, k_p, s_b, s_h, s_l, s_p,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    K_CHUNK: tl.constexpr, P_CHUNK: tl.constexpr,
):  # fmt: skip
    """tops, totals (B, H, blocks) and sums (B, H, blocks, P) of one block. Names such as k_l are strides."""
    block = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    valid = L.to(tl.int64)
    if length is not None:
        valid = tl.minimum(valid, tl.load(length + b))
    if block * BLOCK >= valid:
        return
    at = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    seen = at < valid
    q += b * q_b + h * q_h
    k_rows = k + b * k_b + h * k_h + at[:, None] * k_l  # (BLOCK, 1)
    s_rows = s_past + b * s_b + h * s_h + at[:, None] * s_l
    out = row * tl.num_programs(0) + block

    # Summed over the chunks before it is summed within them: one exchange between threads, not one per chunk.
    products = tl.zeros((BLOCK, K_CHUNK), tl.float32)
    # Only with a number of stages given does the compiler load ahead in loops without matrix products.
    for lo in tl.range(0, K, K_CHUNK, num_stages=3):
        c = lo + tl.arange(0, K_CHUNK)[None, :]  # (1, K_CHUNK)
        q_c = tl.load(q + c * q_p, mask=c < K, other=0.0).to(tl.float32)
        k_c = tl.load(k_rows + c * k_p, mask=seen[:, None] & (c < K), other=0.0).to(tl.float32)
        products += q_c * k_c
    logits = tl.where(seen, tl.sum(products, axis=1) * scale, -float("inf"))  # (BLOCK,)
    top = tl.max(logits, axis=0)
    weights = tl.exp(logits - top)  # (BLOCK,)
    tl.store(tops + out, top)
    tl.store(totals + out, tl.sum(weights, axis=0))
    for lo in tl.range(0, P, P_CHUNK, num_stages=3):
        c = lo + tl.arange(0, P_CHUNK)
        s_c = tl.load(s_rows + c[None, :] * s_p, mask=seen[:, None] & (c < P)[None, :], other=0.0)
        tl.store(sums + out * P + c, tl.sum(weights[:, None] * s_c.to(tl.float32), axis=0), mask=c < P)


@triton.jit(do_not_specialize=["L"])
def combine_kernel(
    tops, totals, sums, f, gamma, length, s, lse, L, f_b, f_h, f_p, gamma_b, gamma_h,
    H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """s (B, H, 1, P) for CHUNK features, and lse (B, H, 1)."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    c = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)  # (CHUNK,)
    valid = L.to(tl.int64)
    if length is not None:
        valid = tl.minimum(valid, tl.load(length + b))
    first = row * tl.cdiv(L, BLOCK)  # the row's first block
    n_blocks = tl.cdiv(valid, BLOCK).to(tl.int32)  # what is behind them was not written
    top = -float("inf")
    for lo in tl.range(0, n_blocks, BLOCKS):
        i = lo + tl.arange(0, BLOCKS)  # (BLOCKS,)
        top = tl.maximum(
            top, tl.max(tl.load(tops + first + i, mask=i < n_blocks, other=-float("inf")), axis=0)
        )
    total = 0.0
    attended = tl.zeros((CHUNK,), tl.float32)
    for lo in tl.range(0, n_blocks, BLOCKS, num_stages=3):
        i = lo + tl.arange(0, BLOCKS)
        inside = i < n_blocks
        factor = tl.exp(tl.load(tops + first + i, mask=inside, other=-float("inf")) - top)  # (BLOCKS,)
        total += tl.sum(factor * tl.load(totals + first + i, mask=inside, other=0.0), axis=0)
        mask = inside[:, None] & (c < P)[None, :]
        parts = tl.load(sums + (first + i)[:, None] * P + c[None, :], mask=mask, other=0.0)
        attended += tl.sum(factor[:, None] * parts, axis=0)
    if n_blocks > 0:  # else s = f, and lse stays -inf
        attended = attended / total
        top += tl.log(total)
    gain = tl.load(gamma + b * gamma_b + h * gamma_h).to(tl.float32)
    f_c = tl.load(f + b * f_b + h * f_h + c * f_p, mask=c < P, other=0.0).to(tl.float32)
    tl.store(s + row * P + c, f_c + gain * attended, mask=c < P)
    if tl.program_id(0) == 0:
        tl.store(lse + row, top)
