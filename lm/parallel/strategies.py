"""Lightning's side of one process, DDP and FSDP2: checkpoints of ours, and gradients that meet once a step."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import read
from mixerlab.lm.run.shards import Pieces, shard_rows
from mixerlab.lm.run.writer import CheckpointError, Writer


def lightning_strategy(strategy: StrategyConfig, world: World, device: torch.device) -> Strategy:
    """Lightning's side of the recipe's strategy."""
    timeout = timedelta(seconds=strategy.timeout + 60)
    if strategy.name == "fsdp":
        return ShardedStrategy(
            world=world, data_parallel_size=world.size, tensor_parallel_size=1, timeout=timeout
        )
    if world.size > 1:
        return CopiedStrategy(world=world, timeout=timeout, gradient_as_bucket_view=True)
    return WholeStrategy(world=world, device=device)


class CheckpointFolders(Strategy):
    """Mixed into a strategy of Lightning's: checkpoints are folders of ours, of any number of ranks.

    Raises CheckpointError, in one line, for what does not fit.
    """

    whole = True
    """Whether a rank reads the tensors whole, and not its rows of them."""

    def __init__(self, world: World, **options: Any):
        super().__init__(**options)
        self.world = world
        self._read_from: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """`storage_options`: the Writer to write with; None: one that has written when this returns."""
        writer = storage_options or Writer(self.world.rank, self.world.size, self.world.gather)
        writer.save(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        def load() -> dict[str, Any]:
            state = read(checkpoint_path, whole=self.whole)
            for key, kind in TRAINING.items():
                if not isinstance(state.get(key), kind):
                    raise ValueError(f"{key} = {state[key]!r}" if key in state else f"it has no {key}")
            return state

        self._read_from = checkpoint_path
        return self._together(load)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None

        def load() -> None:
            saved = {name: piece(value, name, module) for name, value in checkpoint["state_dict"].items()}
            module.load_state_dict(saved, strict=strict)

        self._together(load)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        def load() -> None:
            for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
                _load_optimizer(optimizer, saved)

        self._together(load)

    def _together(self, load: Callable[[], Any]) -> Any:
        """All ranks do it; where one cannot, all raise the same."""
        loaded = problem = None
        try:
            loaded = load()
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # the files may hold anything
            lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
            # Of names torch lists every one, below a heading.
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(lines[:2])
            problem = f"checkpoint {self._read_from} does not fit this run: {reason}"
        if any(self.world.max(int(problem is not None))):
            self.world.all_raised = True
            raise CheckpointError(next(filter(None, self.world.gather(problem))))
        return loaded


TRAINING: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "pytorch-lightning_version": str,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""What Lightning needs to train further, beyond what `read` checks."""


class WholeStrategy(CheckpointFolders, SingleDeviceStrategy):
    """One process with checkpoints of ours."""


class CopiedStrategy(CheckpointFolders, DDPStrategy):
    """DDP with checkpoints of ours, of which every rank writes a part."""


class ShardedStrategy(CheckpointFolders, ModelParallelStrategy):
    """FSDP2 with checkpoints of ours: each rank writes and reads its shard."""

    whole = False

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


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raises what it may where the state is none of this AdamW's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        if lacking := sorted(own.keys() - group.keys() - {"params"}):
            raise ValueError(f"no {lacking[0]} in the optimiser's param_groups")
    state = {}
    for number, values in saved["state"].items():
        parameter = parameters[number]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            expected = [] if key == "step" else list(parameter.shape)
            if list(values[key].shape) != expected:
                raise ValueError(f"{key} has the shape {list(values[key].shape)}; expected {expected}")
        state[number] = {key: _like(value, parameter, in_memory=True) for key, value in values.items()}
    optimizer.load_state_dict({**saved, "state": state})


def piece(value: Any, name: str, module: nn.Module) -> Any:
    try:
        return _like(value, module.get_parameter(name))
    except AttributeError:  # a buffer
        return value


def _like(value: Any, parameter: Tensor, in_memory: bool = False) -> Any:
    """What of a saved tensor belongs into `parameter`'s shard, if it has the parameter's shape.

    On the CPU it may be a view of the file; what of a shard shall be `in_memory` is a copy.
    """
    if not isinstance(value, (Tensor, Pieces)):
        return value
    if not isinstance(parameter, DTensor) or tuple(value.shape) != tuple(parameter.shape):
        return value.rows(0, value.shape[0]) if isinstance(value, Pieces) else value
    first, last = shard_rows(parameter)
    rows = value.rows(first, last) if isinstance(value, Pieces) else value[first:last]
    return DTensor.from_local(
        rows.to(parameter.to_local().device, copy=in_memory),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


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
