"""SSD by the Triton kernels of the mamba_ssm package (github.com/state-spaces/mamba), where that is installed.

They compute what `ssd_chunked` does, in a few launches. Two things are less exact than there: the decays inside a
chunk are differences of running sums in float32, and the products of float32 inputs are TF32. They have no second
derivative.

Letters: B batch, T time, H heads, G groups that share B_in and C_out, P head dim, N state size.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from mixerlab.kernels.backend import why_not_cuda

_CHUNK = 256  # what mamba_ssm and transformers use
_CHUNKS = (16, 32, 64, 128, 256)
_LARGEST_STATE = 256  # no published Mamba-2 has a larger one


def ssd_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    D_skip: Tensor | None,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """As `ssd_reference`, but with the skip in y; the last state is float32."""
    kernels, _ = _load()
    assert kernels is not None
    dtype = _products_dtype(x, B_in, C_out)
    sequences = None
    if segment_ids is not None:
        # The kernels count a row's sequences from 0, and the initial state enters sequence 0.
        sequences = (segment_ids - segment_ids[:, :1]).to(torch.int32)  # (B, T)
    y, state = kernels(
        x.to(dtype),
        dt.float(),
        A.float(),
        B_in.to(dtype),
        C_out.to(dtype),
        _CHUNK if chunk_size is None else chunk_size,
        D=None if D_skip is None else D_skip.float(),
        initial_states=None if initial_state is None else initial_state.float(),
        seq_idx=sequences,
        return_final_states=True,  # of each row's last sequence
    )  # (B, T, H, P), (B, H, P, N)
    return y.to(x.dtype), state


def why_not_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    chunk_size: int | None,
) -> str | None:
    """None if the kernels can take the input, else the reason why not."""
    if torch.compiler.is_compiling():
        return "torch.compile does not trace its kernels"
    if reason := why_not_cuda(x):  # before the import, which is slow
        return reason
    if torch._C._are_functorch_transforms_active():
        return "its kernels have no rules for torch.func"
    if any(operand.dtype == torch.float64 for operand in (x, dt, A, B_in, C_out)):
        return "its kernels compute in float32, and an input is float64"
    if _products_dtype(x, B_in, C_out) == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "its kernels multiply float32 as TF32, which torch.set_float32_matmul_precision('high') would allow"
    if B_in.shape[3] > _LARGEST_STATE:
        return f"the state size is {B_in.shape[3]}, and its kernels are known to work up to {_LARGEST_STATE}"
    if chunk_size not in (None, *_CHUNKS):
        return f"chunk_size is {chunk_size}, and its kernels are known to work with {_CHUNKS}"
    return _load()[1]


def _products_dtype(x: Tensor, B_in: Tensor, C_out: Tensor) -> torch.dtype:
    """The kernels' products need operands of one dtype."""
    return torch.promote_types(x.dtype, torch.promote_types(B_in.dtype, C_out.dtype))


@cache
def _load() -> tuple[Callable | None, str | None]:
    """The kernels, or None and the reason."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception as error:  # anything, such as a binary that was built for another torch
        if isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm":
            return None, "mamba_ssm is not installed"
        return None, f"mamba_ssm cannot be imported: {error}"
    return mamba_chunk_scan_combined, None
