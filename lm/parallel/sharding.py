"""What is done to a decoder for speed, memory and many devices."""

import ctypes
import functools
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import Recipe, StrategyConfig
from mixerlab.options import ConfigError


def make_decoder(recipe: Recipe, vocab_size: int, mesh: DeviceMesh | None = None) -> Decoder:
    """The recipe's decoder, initialised, and checkpointed, compiled and sharded as the recipe says."""
    with torch.device("meta") if mesh is not None else nullcontext():
        decoder = build_decoder(recipe, vocab_size)
    parallelize(decoder, mesh, recipe.strategy, recipe.seed)
    return decoder


def parallelize(decoder: Decoder, mesh: DeviceMesh | None, strategy: StrategyConfig, seed: int) -> None:
    """Applies activation checkpointing, compilation and sharding, in place, and draws the initial weights.

    In place keeps the names in the state dict; wrappers would add to them.

    Args:
        decoder: not yet initialised; on the meta device if there is a mesh.
        mesh: the devices to shard over, ("shard",) or ("replicate", "shard"); None: the decoder stays whole.
            With it only one block at a time is ever whole on a rank.
        strategy: what to apply.
        seed: of the initial weights, which are the same on any mesh.
    """
    if strategy.activation_checkpointing != "none":
        for block in decoder.layers:
            _recompute(block, selective=strategy.activation_checkpointing == "selective")
    if strategy.compile:
        # Every kind of mixer, and training and validation, is a graph of its own of the blocks' one method.
        kinds = len({type(block.mixer) for block in decoder.layers})
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * kinds)
        for block in decoder.layers:
            block.compile()
    if mesh is None:
        decoder.initialize(seed)
    else:
        _shard(decoder, mesh, strategy, seed)


def _shard(decoder: Decoder, mesh: DeviceMesh, strategy: StrategyConfig, seed: int) -> None:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    shard = functools.partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=dtypes[strategy.param_dtype], reduce_dtype=dtypes[strategy.reduce_dtype]
        ),
        offload_policy=CPUOffloadPolicy() if strategy.cpu_offload else OffloadPolicy(),
    )
    in_blocks = set(decoder.blocks.modules())
    around = [module for module in decoder.modules() if module not in in_blocks]
    parts: list[tuple[nn.Module, list[nn.Module]]] = [
        (block, list(block.modules())) for block in decoder.layers
    ]
    for part, modules in [*parts, (decoder, around)]:
        for module in modules:
            if buffers := [name for name, _ in module.named_buffers(recurse=False)]:
                raise ConfigError(
                    f"strategy.name = fsdp: {type(module).__name__} has the buffer {buffers[0]!r}, whose values would "
                    "be lost; make it in forward, or a parameter that reset_parameters() fills"
                )
            # Drawn on the CPU, so that the values are the same on every device.
            module.to_empty(device="cpu", recurse=False)
        decoder.initialize(seed, set(modules))
        shard(part)
    # Generating text calls these without going through forward.
    register_fsdp_forward_method(decoder, "extend")
    for block in decoder.layers:
        register_fsdp_forward_method(block, "extend")


_KEPT_NAMESPACES = ("mixerlab",)
_KEPT_NAMES = ("scaled_dot_product", "flex_attention")


def _recompute(block: nn.Module, selective: bool) -> None:
    """Makes `block` keep its input alone for the backward pass, and perhaps the outputs of what mixes over time."""
    forward = block.forward

    def keep_what_mixes(ctx, operator, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = getattr(operator, "__name__", "") or str(operator)
        own = getattr(operator, "namespace", None) in _KEPT_NAMESPACES
        kept = own or any(part in name for part in _KEPT_NAMES)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_what_mixes)

    def recomputed(x: Tensor, segment_ids: Tensor | None = None, diagnose: bool = False) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, segment_ids, diagnose)
        return checkpoint(forward, x, segment_ids, diagnose, **options)

    block.forward = recomputed


def make_mesh(strategy: StrategyConfig, world: World, device_type: str) -> DeviceMesh | None:
    """The devices that fsdp shards over; None for every other strategy. Raises ConfigError."""
    if strategy.name != "fsdp":
        return None
    if world.size % strategy.replicate:
        raise ConfigError(
            f"strategy.replicate = {strategy.replicate}: it must divide the number of devices, {world.size}"
        )
    if strategy.replicate == 1:
        return init_device_mesh(device_type, (world.size,), mesh_dim_names=("shard",))
    shape = (strategy.replicate, world.size // strategy.replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor; for training on a CPU.

    By default it gives tensors of 32 MiB and more back to the kernel at once, which then clears every page of the
    next one (docs/benchmarks.md, growth of Mamba-2). Does nothing where there is no glibc.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)
