"""What a save costs the training loop, and a resume its start, for a state of so many gigabytes.

    python benchmarks/checkpoints.py [--gigabytes 2] [--ranks 2] [--rounds 5] [--strategies ddp fsdp]

The state is that of AdamW: float32 weights and two averages, 12 bytes a parameter. Each way of saving is tried in turn,
in the same processes: while training waits (trainer.async_checkpoint=false), and in the background. So is each way of
verifying: all files by rank 0 while the others wait, and by every rank its own. Medians of the rounds; the first save
is told apart, and so is taking the memory for it, which a thread does while training takes its second step. Files come
from the page cache, but in one row.

Last it computes from the rates what larger models would take on 64 ranks, if each had such a disk and core to itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from mixerlab.lm.parallel.launch import launch
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.sharding import keep_freed_memory, make_mesh
from mixerlab.lm.parallel.strategies import lightning_strategy
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import Checkpoints
from mixerlab.lm.run.writer import Buffers, Writer
from mixerlab.sealed import Summed, xxh3

WIDTH = 1024
BYTES = 12  # a parameter


class Bench:
    """One rank, its part of a model that has done a step, and what is done to it."""

    def __init__(self, name: str, gigabytes: float, world: World, folder: Path):
        self.world, self.checkpoints = world, Checkpoints(folder / name)
        config = StrategyConfig(name=name, accelerator="cpu", devices=world.size)  # type: ignore[arg-type]
        layers = max(1, round(gigabytes * 1e9 / BYTES / WIDTH**2))
        module = L.LightningModule()
        module.decoder = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        if (mesh := make_mesh(config, world, "cpu")) is not None:
            fully_shard(module.decoder, mesh=mesh)
        self.strategy = lightning_strategy(config, world, torch.device("cpu"))
        self.strategy.connect(module)
        self.strategy._lightning_module = module
        self.module, self.optimizer = module, torch.optim.AdamW(module.parameters())
        self.strategy.optimizers = [self.optimizer]
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.bytes = BYTES * layers * WIDTH**2

    def seconds(self, work: Callable[[], Any]) -> float:
        """From when all ranks begin to when all have done it."""
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - began

    def save(self, writer: Writer, step: int) -> None:
        notes = {
            "global_step": step,
            "epoch": 0,
            "pytorch-lightning_version": L.__version__,
            "lr_schedulers": [],
        }
        self.strategy.save_checkpoint({**notes, **self.state()}, self.checkpoints.at(step), writer)

    def state(self) -> dict[str, Any]:
        return {
            "state_dict": self.strategy.lightning_module_state_dict(),
            "optimizer_states": [self.strategy.optimizer_state(self.optimizer)],
        }

    def make_room(self, writer: Writer) -> None:
        writer.make_room(self.state())
        writer.wait()

    def verify(self, by_each: bool) -> None:
        if by_each:
            self.checkpoints.last(self.world.rank, self.world.size, self.world.gather)
        else:
            self.world.ask_main(lambda: self.checkpoints.last() and None)

    def load(self) -> None:
        saved = self.strategy.load_checkpoint(self.checkpoints.all()[-1])
        self.strategy.load_model_state_dict(saved)
        self.strategy.load_optimizer_state_dict(saved)

    def forget_files(self) -> None:
        dist.barrier()
        for path in self.checkpoints.all()[-1].iterdir():
            forget(path)

    def saves(self, rounds: int) -> dict[str, float]:
        """Seconds for which training waits, and until the checkpoint is there."""
        channel = self.world.channel(f"bench/{self.checkpoints.folder.name}")
        writers = {
            kind: Writer(self.world.rank, self.world.size, channel.gather, background=kind == "background")
            for kind in ("waiting", "background")
        }
        found: dict[str, list[float]] = {}
        found["taking memory, meanwhile"] = [self.seconds(lambda: self.make_room(writers["background"]))]
        for step in range(1, rounds + 2):
            for kind, writer in writers.items():
                blocked = self.seconds(lambda w=writer, s=step: self.save(w, s))  # type: ignore[misc]
                rest = self.seconds(writer.wait)
                when = "first, " if step == 1 else ""
                found.setdefault(f"{when}{kind}", []).append(blocked)
                found.setdefault(f"{when}{kind}, until it is there", []).append(blocked + rest)
                if self.world.rank == 0:
                    for folder in self.checkpoints.all()[:-1]:
                        shutil.rmtree(folder)
        return {kind: statistics.median(seconds) for kind, seconds in found.items()}

    def resumes(self, rounds: int) -> dict[str, float]:
        """Seconds from the first byte verified to the last loaded."""
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for kind in ("by rank 0", "by each rank"):
                verify = self.seconds(lambda k=kind: self.verify(k == "by each rank"))  # type: ignore[misc]
                load = self.seconds(self.load)
                found.setdefault(f"verified {kind}", []).append(verify)
                found.setdefault(f"verified {kind}, and loaded", []).append(verify + load)
        self.forget_files()
        cold = self.seconds(lambda: self.verify(by_each=True)) + self.seconds(self.load)
        medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
        return {**medians, "verified by each rank, and loaded, from the disk": cold}


def forget(path: Path) -> None:
    """Has the next read come from the disk, where the system can be asked for that."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(folder: Path, rounds: int) -> dict[str, float]:
    """GB/s of one process alone: copies, writing, checksums."""
    state = [torch.randn(4 << 20) for _ in range(32)]
    size = sum(tensor.nbytes for tensor in state)
    path = folder / "rate"
    buffers = Buffers()

    def copy() -> None:
        for n, tensor in enumerate(state):
            buffers.copy((n,), tensor)

    def write() -> None:
        with Summed(path) as file:
            torch.save(state, file)  # type: ignore[arg-type]
            file.size_and_checksum()

    def verify_from_the_disk() -> None:
        forget(path)
        xxh3(path)

    def rate(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return size / 1e9 / (time.perf_counter() - began)

    first = rate(copy)
    works = {
        "copy": copy,
        "write and sync": write,
        "verify": lambda: xxh3(path),
        "verify, from the disk": verify_from_the_disk,
    }
    found = {what: [rate(work)] for what, work in works.items()}
    for _ in range(rounds - 1):
        for what, work in works.items():
            found[what].append(rate(work))
    path.unlink()
    return {"copy, first": first, **{what: statistics.median(values) for what, values in found.items()}}


def report(title: str, rows: dict[str, float], against: str | None, unit: str = "s") -> None:
    print(f"\n{title}")
    for what, value in rows.items():
        ratio = f"{rows[against] / value:8.2f}x" if against in rows else ""
        print(f"  {what:52}{value:9.3f} {unit}{ratio}")
    sys.stdout.flush()


def computed(rate: dict[str, float], ranks: int = 64) -> None:
    """Prints the seconds of each rank: to load is to copy into memory that is touched for the first time."""
    print(f"\ncomputed from these rates, {BYTES} bytes a parameter over {ranks} ranks, each with such a disk")
    print("  parameters   state    a rank   training waits   until it is there   resume   and from the disk")
    for name, parameters in (("1.3B", 1.3e9), ("7B", 7e9)):
        total = parameters * BYTES / 1e9
        part = total / ranks
        wait, write = part / rate["copy"], part / rate["write and sync"]
        load = part / rate["copy, first"]
        warm, cold = part / rate["verify"] + load, part / rate["verify, from the disk"] + load
        print(
            f"  {name:10}{total:6.1f} GB{part:7.2f} GB{wait:13.2f} s{wait + write:18.2f} s{warm:11.2f} s"
            f"{cold:15.2f} s"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"], choices=["ddp", "fsdp"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    args = parser.parse_args(arguments)
    if args.ranks < 2:
        parser.error("--ranks must be at least 2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does on a CPU
    config = StrategyConfig(accelerator="cpu", devices=args.ranks)
    world = launch(config, [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)])
    made = world.ask_main(lambda: tempfile.mkdtemp(prefix="checkpoints-", dir=args.folder))
    try:
        world.connect(torch.device("cpu"), config)
        rate = rates(Path(made), args.rounds) if world.rank == 0 else {}
        if rate:
            report("rates of one process", rate, None, "GB/s")
        dist.barrier()
        for name in args.strategies:
            bench = Bench(name, args.gigabytes, world, Path(made))
            saves, resumes = bench.saves(args.rounds), bench.resumes(args.rounds)
            if world.rank == 0:
                size = f"{bench.bytes / 1e9:.2f} GB on {world.size} ranks, {name}"
                report(f"a save of {size}", saves, "waiting")
                report(f"a resume of {size}", resumes, "verified by rank 0, and loaded")
            del bench
        if rate:
            computed(rate)
        dist.barrier()
    finally:
        if world.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
    world.close(failed=False)


if __name__ == "__main__":
    main()
