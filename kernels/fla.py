"""What the backends by kernels of flash-linear-attention share (github.com/fla-org/flash-linear-attention).

Its kernels are Triton's, and need no compiler. They compute in float32 or less, multiply float32 as TF32 unless Triton
is told otherwise, take differences of running sums for decays, and have no second derivative.

Letters: B batch, T time, H heads, K key width, P value width, N documents of all rows.
"""

import functools
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mixerlab.kernels.backend import why_not_triton

_CHUNK = 64
_LARGEST_KEY = 256


def by_fla(
    kernel: Callable,
    sequences: dict[str, Tensor],
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernel's output (B, T, H, P), and each row's last state (B, H, P, K) in float32.

    Args:
        kernel: of fla, by chunks.
        sequences: what it is given by name, each (B, T, ...).
        initial_state: (B, H, P, K), which enters the first document of each row.
        segment_ids: (B, T); with them all rows are laid end to end.
    """
    state = None if initial_state is None else initial_state.float()
    options = {"scale": 1.0, "output_final_state": True, "state_v_first": True}
    if segment_ids is None:
        return kernel(**sequences, initial_state=state, **options)
    B, T = segment_ids.shape
    bounds = document_bounds(segment_ids)
    first = torch.searchsorted(
        bounds, torch.arange(B, device=bounds.device) * T
    )  # (B,), of each row's documents
    if state is not None:
        state = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, state)
    rows = {name: x.flatten(0, 1)[None] for name, x in sequences.items()}  # (1, B T, ...)
    y, states = kernel(**rows, initial_state=state, cu_seqlens=bounds, **options)
    last = torch.cat((first[1:], first.new_full((1,), len(bounds) - 1))) - 1  # (B,)
    return y.unflatten(1, (B, T))[0], states[last]


@torch.compiler.disable
def document_bounds(segment_ids: Tensor) -> Tensor:
    """(B, T) -> where documents begin in the rows laid end to end, and B T: (N + 1,) int64. Waits for the device."""
    return _bounds(segment_ids, 0 if segment_ids.is_inference() else segment_ids._version)


@functools.lru_cache(maxsize=4)  # tensors are equal to themselves alone; all layers are given the same
def _bounds(segment_ids: Tensor, version: int) -> Tensor:
    """As `document_bounds`. `version` counts the changes in place, after which the bounds are others."""
    first = torch.ones_like(segment_ids, dtype=torch.bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_full((1,), segment_ids.numel())))


def why_not_fla(
    products: tuple[Tensor, Tensor, Tensor], others: tuple[Tensor, ...], chunk_size: int | None
) -> str | None:
    """None if its kernels can take the input, else the reason why not.

    Args:
        products: what is multiplied: queries and keys (..., K), and values (..., P).
        others: what else there is.
        chunk_size: as the operators have it.
    """
    if torch.compiler.is_compiling():
        return "torch.compile does not trace its kernels"
    if reason := why_not_triton(products[0]):  # before the import, which is slow
        return reason
    if torch._C._are_functorch_transforms_active():
        return "its kernels have no rules for torch.func"
    if any(operand.dtype == torch.float64 for operand in (*products, *others)):
        return "its kernels compute in float32, and an input is float64"
    exact = (
        os.environ.get("TRITON_F32_DEFAULT") == "ieee" or torch.get_float32_matmul_precision() != "highest"
    )
    dtype, K, P = products_dtype(*products), products[1].shape[-1], products[2].shape[-1]
    if dtype == torch.float32 and not exact:
        return "its kernels multiply float32 as TF32, which torch.set_float32_matmul_precision('high') would allow"
    if K > _LARGEST_KEY:
        return f"a head's state is {K} wide, and its kernels take up to {_LARGEST_KEY}"
    if dtype.itemsize == 2 and (K % 2 or P % 2):
        return f"a head's state is {P} x {K}, and its kernels take even numbers in {dtype}"
    if chunk_size not in (None, _CHUNK):
        return f"chunk_size is {chunk_size}, and its kernels are called with {_CHUNK}"
    return _why_not_importable()


def products_dtype(a: Tensor, b: Tensor, c: Tensor) -> torch.dtype:
    """The kernels' products need operands of one dtype."""
    return torch.promote_types(a.dtype, torch.promote_types(b.dtype, c.dtype))


@functools.cache
def _why_not_importable() -> str | None:
    if find_spec("fla") is None:
        return "flash-linear-attention is not installed: pip install 'mixerlab[fla]'"
    try:
        importlib.import_module("fla.ops")
    except Exception as error:  # anything, such as a triton that it was not made for
        return f"flash-linear-attention cannot be imported: {error}"
    return None
