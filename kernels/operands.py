"""What an operator is given: shapes, dtypes and devices, checked before any of its backends sees them."""

from collections.abc import Iterable

import torch
from torch import Tensor


def check_operands(expected: Iterable[tuple[str, Tensor | None, tuple[int, ...], str]]) -> None:
    """Raises ValueError, naming the operand, what it is and what would be right.

    Args:
        expected: (name, operand or None where it is left out, its shape, the shape in letters). All must be on the
            first one's device; `segment_ids` is int64 and the others are of floating point.
    """
    given = [entry for entry in expected if entry[1] is not None]
    first_name, first = given[0][:2]
    assert first is not None
    for name, operand, shape, letters in given:
        assert operand is not None
        if tuple(operand.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(operand.shape)}, expected {letters}: {shape}")
        if operand.device != first.device:
            raise ValueError(
                f"{name} is on device {operand.device}, expected {first.device}, as {first_name}"
            )
        if operand.dtype != torch.int64 if name == "segment_ids" else not operand.is_floating_point():
            kind = "torch.int64" if name == "segment_ids" else "a floating-point type"
            raise ValueError(f"{name} has dtype {operand.dtype}, expected {kind}")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError unless it is None or positions."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected None or at least 1")
