"""How the Triton kernels of feedback attention cut their work, and how they are launched."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """What a program holds. The choice depends on the dtype alone; docs/sessa-kernel.md says why these."""

    tile: int  # rows and columns of a tile
    step: int  # how much of the summed dimension is loaded at a time
    block: int  # M
    slice: int  # features per program of a solve
    widest: int  # most features of a product's output tile

    def width(self, features: int) -> int:
        """Features of a product's output tile; a tensor core's product has at least 16."""
        return max(16, min(self.widest, triton.next_power_of_2(features)))

    def inner_step(self, features: int) -> int:
        """Features loaded at a time where the sum is over them."""
        return max(16, min(self.step, triton.next_power_of_2(features)))


HALF = Tiles(tile=128, step=64, block=64, slice=32, widest=128)
SINGLE = Tiles(tile=64, step=16, block=32, slice=16, widest=64)

# What a GPU has yet to choose: benchmarks/feedback_gpu.py has a row for each.
WIDE = replace(HALF, widest=256)
"""In place of HALF on sm_90 (on sm_80 the product that adds to dq spills): a product of 128 x 256 reads weights half as
often, and one program has all registers of a multiprocessor."""
DQ_PANELS = 1
"""Panels whose products with keys are added to dq at once. Two halve the traffic of dq, and keep twice the weights."""

PANEL_BYTES = 256 * 2**20
"""Panels are made smaller, down to one tile of rows, where a panel's weights would take more than this."""
MOST_SEQUENCES = 65535
"""Of the last dimension of CUDA's grids."""
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


def splits_for(programs: int, tiles: int) -> int:
    """Among how many programs a sum over `tiles` is divided, where there are only `programs` sums."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), tiles // TILES_PER_SPLIT))


def exponents(dtype: torch.dtype) -> dict[str, int]:
    """Of weights as powers of 2: references are multiples of QUANTUM, and the largest of a tile's row at most MOST.

    With the exponents of float32 nearly all tiles of a row share one. Those of float16 go from -14 to 15.
    """
    return {"QUANTUM": 14, "MOST": 15} if dtype == torch.float16 else {"QUANTUM": 64, "MOST": 32}


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def readable(x: Tensor) -> Tensor:
    """x (B, H, T, W), copied unless rows are contiguous and 32 bits count what lies within a sequence."""
    rows = x.shape[2] + 2 * HALF.tile
    return x if x.stride(3) == 1 and rows * x.stride(2) < 2**31 else x.contiguous()


def strides(name: str, x: Tensor, axes: str = "bht") -> dict[str, int]:
    """Of the first axes, as kernels name them: batch, head and position."""
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(axes)}


class Launcher:
    """Launches kernels with arguments of one name for all kernels: each takes those that it names."""

    def __init__(self, **arguments: Any):
        self.arguments = arguments

    def having(self, **arguments: Any) -> "Launcher":
        return Launcher(**self.arguments | arguments)

    def __call__(self, kernel: Any, *grid: int, warps: int = 8, stages: int = 3, **arguments: Any) -> None:
        if grid[-1] > MOST_SEQUENCES:
            raise ValueError(
                f"feedback attention: {grid[-1]} sequences times heads are more than one launch takes on a GPU, "
                f"{MOST_SEQUENCES}; give it parts of the batch (under torch.vmap: chunk_size)"
            )
        arguments = self.arguments | arguments
        named = {name: arguments[name] for name in kernel.arg_names}
        # A program may have all registers: else the assembler spills a few of some kernels to make room for another.
        kernel[grid](**named, num_warps=warps, num_stages=stages, maxnreg=255)
