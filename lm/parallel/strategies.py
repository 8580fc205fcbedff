"""Lightning's side of one process, DDP and FSDP2: checkpoints of ours, and gradients that meet once a step."""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import read, save
from mixerlab.lm.run.shards import Pieces, shard_rows


def lightning_strategy(strategy: StrategyConfig, world: World, device: torch.device) -> Strategy:
    """Lightning's side of the recipe's strategy."""
    timeout = timedelta(seconds=strategy.timeout + 60)
    if strategy.name == "fsdp":
        return ShardedStrategy(world, data_parallel_size=world.size, tensor_parallel_size=1, timeout=timeout)
    if world.size > 1:
        return CopiedStrategy(
            world, checkpoint_io=CheckpointFolders(), timeout=timeout, gradient_as_bucket_view=True
        )
    return SingleDeviceStrategy(device, checkpoint_io=CheckpointFolders())


class CopiedStrategy(DDPStrategy):
    """DDP whose ranks all learn it when rank 0 cannot write a checkpoint."""

    def __init__(self, world: World, **options: Any):
        super().__init__(**options)
        self.world = world

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save(checkpoint, filepath, self.world.rank, self.world.gather)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with checkpoints of ours: a file per rank, checksummed, readable on any number of ranks."""

    def __init__(self, world: World, **options: Any):
        super().__init__(**options)
        self.world = world

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def model_to_device(self) -> None:
        """Moves the metrics; the shards are where they belong, which with cpu_offload is not the device."""
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not isinstance(child, FSDPModule):
                child.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        save(checkpoint, filepath, self.world.rank, self.world.gather)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read(checkpoint_path, whole=False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        saved = {
            name: _piece(value, name, self.lightning_module)
            for name, value in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(saved, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {key: _like(value, parameters[number]) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _piece(value: Any, name: str, module: nn.Module) -> Any:
    try:
        return _like(value, module.get_parameter(name))
    except AttributeError:  # a buffer
        return value


def _like(value: Any, parameter: Tensor) -> Any:
    """What of a saved tensor belongs into `parameter`'s shard, if it has the parameter's shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, (Tensor, Pieces)):
        return value
    if tuple(value.shape) != tuple(parameter.shape):
        return value
    first, last = shard_rows(parameter)
    rows = value.rows(first, last) if isinstance(value, Pieces) else value[first:last]
    local = rows.to(parameter.to_local().device, copy=True)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


class CheckpointFolders(CheckpointIO):
    """Lets Lightning write and read these folders where the model is whole on every rank."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(path)

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path)


def synchronise_gradients(strategy: Strategy, wanted: bool, in_shards: bool = False) -> None:
    """Whether the next backward pass brings the gradients of all ranks together, or adds them up on each rank.

    Both DDP and FSDP2 take the mean over the ranks. With `in_shards` FSDP2 adds up shards of them, which costs traffic
    and saves the memory of whole ones; only the copies of a shard (HSDP) wait for the last pass.
    """
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model.require_backward_grad_sync = wanted  # what its no_sync() sets
    elif strategy.lightning_module is not None:
        for module in strategy.lightning_module.children():
            if isinstance(module, FSDPModule):
                set_sync = module.set_requires_all_reduce if in_shards else module.set_requires_gradient_sync
                set_sync(wanted)
