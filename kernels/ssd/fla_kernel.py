"""SSD by a kernel of flash-linear-attention: its gated linear attention with one decay per head is SSD by other names.

Letters: B batch, T time, H heads, G groups that share B_in and C_out, P head dim, N state size.
"""

from torch import Tensor

from mixerlab.kernels.fla import by_fla, products_dtype


def ssd_fla(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B_in: Tensor,
    C_out: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `ssd_reference`; the last state is float32."""
    from fla.ops.simple_gla import chunk_simple_gla

    dtype, share = products_dtype(x, B_in, C_out), x.shape[2] // B_in.shape[2]
    dt = dt.float()
    sequences = {
        "q": C_out.to(dtype).repeat_interleave(share, dim=2),  # (B, T, H, N)
        "k": B_in.to(dtype).repeat_interleave(share, dim=2),
        "v": (dt[..., None] * x).to(dtype),  # (B, T, H, P)
        "g": dt * A.float(),  # (B, T, H)
    }
    y, state = by_fla(chunk_simple_gla, sequences, initial_state, segment_ids)
    return y.to(x.dtype), state
