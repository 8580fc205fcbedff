"""Which backend of an operator runs: the one place where that is decided."""

import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("mixerlab.kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run in its interpreter, on the CPU."""
_HAS_TRITON = find_spec("triton") is not None

# A plain global and not a contextvar: torch.compile can read it, and guards on its value.
_override = "auto"
_logged: set[tuple[str, str, str]] = set()


class BackendError(ValueError):
    """The backend asked for does not exist, or cannot take the input."""


def choose(
    operator: str,
    requested: str,
    backends: Mapping[str, Callable[[], str | None]],
    by_name_alone: Container[str] = (),
) -> str:
    """Name of the backend that runs.

    Args:
        operator: the operator's name, for messages.
        requested: a key of `backends`, or "auto": the first that can take the input.
        backends: name -> a function that returns None if that backend can take the input, else the
            reason why not; in order of preference.
        by_name_alone: those that "auto" passes over.

    Raises:
        BackendError: `requested` is unknown, or cannot take the input, or no backend can.
    """
    wanted = requested
    if requested == "auto" and _override is not None and _override in backends:
        wanted = _override
    if wanted != "auto" and wanted not in backends:
        raise BackendError(f"{operator}: unknown backend {wanted!r}, expected one of {['auto', *backends]}")
    refusals = {}
    for name in [b for b in backends if b not in by_name_alone] if wanted == "auto" else [wanted]:
        reason = backends[name]()
        if reason is None:
            _log_once(operator, requested, name)
            return name
        refusals[name] = reason
    able = [name for name in backends if name not in refusals and backends[name]() is None]
    why = "; ".join(f"backend {name!r} cannot take this input: {reason}" for name, reason in refusals.items())
    raise BackendError(f"{operator}: {why} (backends that can: {able if able else 'none'})")


def why_not_cuda(x: Tensor, capability: int = 0) -> str | None:
    """None if `x` is on a GPU of at least this compute capability (80 for 8.0), else the reason why not."""
    if not x.is_cuda:
        return f"it is on device {x.device}, and the kernels run on CUDA"
    if capability and (found := _capability(x.device.index)) < capability:
        return f"the GPU has compute capability {found / 10}, and the kernels need {capability / 10}"
    return None


def why_not_triton(x: Tensor, capability: int = 0) -> str | None:
    """None if Triton's kernels can run where `x` is, else the reason why not."""
    if not _HAS_TRITON:
        return "triton is not installed"
    return None if INTERPRETED and not x.is_cuda else why_not_cuda(x, capability)


@torch.compiler.assume_constant_result  # a number while torch.compile traces
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """What backend="auto" means inside this context, in all threads, of the operators that have one of that name.

    A forced backend stays forced.

    A backward pass that recomputes the forward pass (activation checkpointing) chooses again, so it
    belongs inside the context too.
    """
    global _override
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


@torch.compiler.assume_constant_result  # runs while torch.compile traces, and leaves nothing in the graph
def _log_once(operator: str, requested: str, chosen: str) -> None:
    if (operator, requested, chosen) not in _logged:
        _logged.add((operator, requested, chosen))
        logger.info("%s: backend %s (requested: %s)", operator, chosen, requested)
