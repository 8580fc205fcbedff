"""The gated delta rule by a kernel of flash-linear-attention.

Letters: B batch, T time, H heads, K key width, P value width.
"""

from torch import Tensor

from mixerlab.kernels.fla import by_fla, products_dtype


def gated_delta_rule_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule_reference`; the last state is float32."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    dtype = products_dtype(q, k, v)
    sequences = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    sequences |= {"g": log_decay.float(), "beta": beta.float()}
    y, state = by_fla(chunk_gated_delta_rule, sequences, initial_state, segment_ids)
    return y.to(v.dtype), state
