"""What went wrong in a step: the module that produced the first number that is not finite, or the memory it took."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixerlab.kernels.backend import BackendError
from mixerlab.lm.parallel.processes import LostProcessError
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.options import UserError


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number: going on would destroy the weights."""


class OutOfMemoryError(RuntimeError):
    """A step needs more memory than there is; the message says what to change."""


PARAMETER = "the gradient of the parameter"


def first_non_finite(decoder: nn.Module, batches: list[dict[str, Tensor]], seeds: list[int]) -> str | None:
    """Runs micro-batches again; names the module that makes the first number that is not finite, or None.

    Args:
        decoder: with the weights of the failed step.
        batches: its micro-batches.
        seeds: the random seed of each, so that dropout is the same.

    A module is looked at after those inside it, so the name is the innermost. Gradients are looked at on their way back
    through the modules' outputs. The gradients that the parameters have are lost.
    """
    found: list[str] = []
    passed: list[str] = []

    def look(name: str, tensor: Tensor) -> None:
        if not found and not bool(torch.isfinite(tensor).all()):
            found.append(name)
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: look_back(name, gradient))

    def look_back(name: str, gradient: Tensor) -> None:
        if found:
            return
        if bool(torch.isfinite(gradient).all()):
            passed.append(name)
        else:  # made by the module whose own output had a finite gradient still
            by = f"the backward pass from {passed[-1]}" if passed else "the backward pass from the loss"
            found.append(f"the gradient of {name}, in {by}")

    decoder.zero_grad(set_to_none=True)
    # Every rank goes through all of it, whatever it finds: sharded models run in step.
    with _looking_at_outputs(decoder, look), torch.compiler.set_stance("force_eager"):
        for batch, seed in zip(batches, seeds, strict=True):
            passed.clear()
            torch.manual_seed(seed)
            nll, _ = decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
            look("the loss", nll)
            nll.sum().backward()
    for name, parameter in decoder.named_parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if not found and gradient is not None and not bool(torch.isfinite(gradient).all()):
            found.append(f"{PARAMETER} {name}")
    return found[0] if found else None


@contextmanager
def _looking_at_outputs(module: nn.Module, look: Any) -> Iterator[None]:
    """Calls look(what it is, tensor) with the floating-point outputs of every module inside, in order."""

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    look(name, tensor)

        return hook

    hooks = [
        child.register_forward_hook(hook_for(f"the output of {name} ({type(child).__name__})"))
        for name, child in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def explain(error: BaseException) -> str | None:
    """One line for a failure that the user can do something about; None for one that is a fault in the code."""
    text = str(error)
    last_line = (text.strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, (BackendError, UserError)):
        # One raised in a loading process comes with its traceback in the message.
        return last_line.partition("DataError: ")[2] or text
    if isinstance(error, (NonFiniteError, OutOfMemoryError, LostProcessError)):
        return text
    lost_worker = isinstance(error, RuntimeError) and "DataLoader worker" in text
    if lost_worker or isinstance(error, ConnectionResetError):  # the latter while it hands over a tensor
        first = text.strip().splitlines()[0]
        return f"a data loading process died (killed, or out of memory): {first} {GO_ON}, or trainer.num_workers=0"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error.filename or text}. Make room. {GO_ON}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. {GO_ON}"
    if isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and _LOST.search(text)):
        return f"{LOST}: {last_line}. {GO_ON}"
    if is_out_of_memory(error):
        return f"out of memory before training began: {last_line}. Try strategy=fsdp on several devices"
    return None


GO_ON = "The checkpoints are whole; continue with resume=auto"
LOST = "lost another process of the run"
_LOST = re.compile(r"gloo|Connection (reset|closed|refused)|Broken pipe|NCCL|Timed out|Socket", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def memory_advice(recipe: Recipe, step: int, error: BaseException) -> str:
    """What happened, with the numbers, and what to change."""
    trainer, strategy = recipe.trainer, recipe.strategy
    said = str(error).split(". ")
    numbers = next((s for s in said if "allocate" in s), said[0]).strip().splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        numbers += (
            f"; tensors hold {used / 2**30:.1f} GiB (at most {peak / 2**30:.1f}) of the device's "
            f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        )
    rows, accumulate = trainer.batch_size, trainer.accumulate
    changes = []
    if rows > 1:
        half = rows // 2 if rows % 2 == 0 else 1
        more = "" if trainer.rows_per_step else f" trainer.accumulate={accumulate * rows // half}"
        changes.append(f"trainer.batch_size={half}{more} (the same result)")
    if strategy.activation_checkpointing == "none":
        changes.append("strategy.activation_checkpointing=selective, then full")
    elif strategy.activation_checkpointing == "selective":
        changes.append("strategy.activation_checkpointing=full")
    if trainer.precision == "32":
        changes.append("trainer.precision=bf16-mixed")
    if strategy.name != "fsdp":
        changes.append("strategy=fsdp on several devices")
    elif accumulate > 1 and strategy.reduce_every == "step":
        changes.append("strategy.reduce_every=micro_batch")
    elif not strategy.cpu_offload:
        changes.append("strategy.cpu_offload=true")
    if (seq_len := getattr(recipe.data.options, "seq_len", None)) is not None:
        changes.append(f"a data.seq_len below {seq_len}")
    return (
        f"out of memory in step {step}, with {rows} rows a micro-batch: {numbers}. In this order: {'; '.join(changes)}"
        ". Continue with resume=auto"
    )
