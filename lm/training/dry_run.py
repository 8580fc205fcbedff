"""What a recipe would cost, found by building it and running one batch of random tokens through it."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mixerlab.data import build_data
from mixerlab.lm.model.cost import si, size
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.parallel.launch import device_kind, local_devices
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.recipe.check import for_devices
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.folder import new_path
from mixerlab.lm.training.optim import build_optimizer
from mixerlab.lm.training.weights import find_weights


def dry_run(recipe: Recipe, console: Console, arguments: Sequence[str]) -> None:
    """Prints parameters by group, FLOPs per token, memory and the run folder. Touches no data, writes nothing."""
    wanted = recipe.strategy.devices
    each = local_devices(recipe.strategy) if wanted == "auto" else wanted
    recipe = for_devices(recipe, each * recipe.strategy.num_nodes)
    device, batch = "cpu", recipe.trainer.batch_size
    if recipe.strategy.accelerator == "gpu" and not torch.cuda.is_available():
        console.print("no GPU here: one row, uncompiled, on the CPU instead", highlight=False)
        recipe = replace(recipe, strategy=replace(recipe.strategy, compile=False))
        batch = 1
    elif device_kind(recipe.strategy) == "gpu":
        device = "cuda"
    if recipe.init_from is not None:
        find_weights(recipe.init_from)
    data = build_data(recipe.data, recipe.seed)
    decoder = make_decoder(recipe, data.vocab_size).to(device)
    low = recipe.trainer.precision != "32"
    if recipe.trainer.precision == "bf16-true":
        to_bf16(decoder)
    build_optimizer(decoder, recipe.optim)
    seq_len = data.seq_len

    ids = torch.randint(
        data.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(recipe.seed)
    )
    ids = ids.to(device)
    segment_ids = torch.zeros_like(ids[:, 1:]) if getattr(recipe.data.options, "pack", False) else None
    kept = _SavedBytes(decoder)
    with torch.autocast(device, torch.bfloat16, enabled=low), kept:
        nll, _ = decoder(ids[:, :-1], ids[:, 1:], segment_ids)
    nll.mean().backward()

    groups = decoder.parameter_groups()
    total = sum(groups.values())
    table = Table(
        "parameters",
        "number",
        "share",
        title=escape(f"{recipe.name}: dry run on {device}"),
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for group, number in groups.items():
        table.add_row(group, f"{number:,}", f"{number / total:.1%}")
    table.add_row("[bold]all", f"[bold]{total:,}", "")
    console.print(table)

    forward = decoder.flops(seq_len) / seq_len
    weights = sum(p.nbytes for p in decoder.parameters())
    rows = {
        "loss of random tokens": f"{nll.mean().item():.3f} nats (uniform: {math.log(data.vocab_size):.3f})",
        "FLOPs per token": f"forward {si(forward)}, training {si(3 * forward)}",
        "one step": f"{recipe.trainer.batch_size} x {recipe.trainer.accumulate} rows of {seq_len} tokens, "
        f"{si(3 * forward * recipe.trainer.batch_size * recipe.trainer.accumulate * seq_len)} FLOPs",
        "memory": f"weights {size(weights)}, gradients {size(weights)}, optimiser {size(2 * weights)}, "
        f"kept for the backward pass of {batch} rows {size(kept.bytes)}",
        "outputs would go to": str(new_path(recipe)),
        **launch_lines(recipe, arguments),
    }
    if device == "cuda":
        rows["peak on the GPU"] = size(torch.cuda.max_memory_allocated())
    for what, text in rows.items():
        console.print(f"[bold]{what}[/bold]: {escape(text)}", highlight=False, soft_wrap=True)


def launch_lines(recipe: Recipe, arguments: Sequence[str]) -> dict[str, str]:
    """How to start the run; `arguments` are those of `mixerlab train`, without --dry-run."""
    line, nodes = f"mixerlab train {shlex.join(arguments)}", recipe.strategy.num_nodes
    wanted = recipe.strategy.devices
    if nodes == 1:
        devices = local_devices(recipe.strategy) if wanted == "auto" else wanted
        torchrun = f"torchrun --standalone --nproc-per-node {devices} -m {line}"
        return {"start it with": line} | ({"with torchrun": torchrun} if devices > 1 else {})
    per_node, tasks = ("gpu", "GPUS") if wanted == "auto" else (wanted, wanted)
    return {
        "start it on every machine with": f"torchrun --nnodes {nodes} --nproc-per-node {per_node} "
        f"--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 -m {line}",
        "or under SLURM with": f"srun --kill-on-bad-exit=1 --nodes {nodes} --ntasks-per-node {tasks} "
        f"--gpus-per-node {tasks} {line}",
    }


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the forward pass keeps for the backward pass, each storage once, parameters apart."""

    def __init__(self, module: torch.nn.Module):
        self._seen = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.bytes = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)
