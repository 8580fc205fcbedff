"""The processes of a run: started, connected, and agreeing on what one of them finds.

One process per device. Several on this machine are started here; on several machines torchrun or SLURM starts them,
and their environment variables say who is who. Rank 0 of all is the main process.
"""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import Tensor

from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.options import ConfigError

Answer = TypeVar("Answer")

INTERRUPTED = (75, 130)
"""Exit codes of a run that was asked to end and can be continued: EX_TEMPFAIL of sysexits.h, and Ctrl-C."""

FOREVER = timedelta(days=30)
"""How long the others wait for what only rank 0 does, such as tokenising the data: it has no time limit."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended or hangs; the message is for the user."""


@dataclass
class World:
    """This process among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    devices: int = 1  # processes of this node
    nodes: int = 1
    environment: ClusterEnvironment | None = None  # for Lightning; None where there is one process
    store: Any = None  # torch's key-value store that all processes see
    all_raised: bool = False
    """Whether the exception under way is raised on every rank, so that rank 0 alone should print it."""
    _questions: int = 0
    _closing: bool = False
    _children: list[subprocess.Popen] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    def ask_main(self, question: Callable[[], Answer]) -> Answer:
        """Runs `question` on rank 0 alone; every rank returns its answer, or raises its exception."""
        if self.size == 1:
            return question()
        key = f"answer/{self._questions}"
        self._questions += 1
        if self.rank == 0:
            answer: Any = None
            problem: Exception | None = None
            try:
                answer = question()
            except Exception as error:
                problem = error
            try:
                reply = pickle.dumps((answer, problem))
            except Exception as error:  # of some library, or a plug-in's, that cannot travel
                problem = problem or error
                reply = pickle.dumps((None, LostProcessError(f"rank 0 failed: {problem!r}")))
            self.store.set(key, reply)
        else:
            self.store.wait([key], FOREVER)
            answer, problem = pickle.loads(self.store.get(key))  # written by rank 0 of this very run
        if problem is not None:
            self.all_raised = True
            raise problem
        return answer

    def wait_for_all(self) -> None:
        """Returns when every rank has come here, however long that takes; to be called once."""
        if self.size > 1:
            keys = [f"here/{rank}" for rank in range(self.size)]
            self.store.set(keys[self.rank], "")
            self.store.wait(keys, FOREVER)

    def connect(self, device: torch.device, strategy: StrategyConfig) -> None:
        """Makes torch's process group, if it is needed: gloo for what lies on the CPU, NCCL for GPUs."""
        if dist.is_initialized() or (self.size == 1 and strategy.name != "fsdp"):
            return
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.HashStore() if self.size == 1 else dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
            # The hang watch names the rank that hangs; it must come first.
            timeout=timedelta(seconds=strategy.timeout + 60),
            device_id=device if on_gpu else None,
        )

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank; in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def max(self, *values: int) -> list[int]:
        """The largest of each value over all ranks, on every rank."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def killed(self) -> str | None:
        """Which of the processes started here was killed or failed, in words; waits a moment for the news."""
        for _ in range(20):
            for rank, child in enumerate(self._children, 1):
                if (code := child.poll()) not in (None, 0, *INTERRUPTED):
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    return f"rank {rank} {how}"
            if not self._children:
                return None
            time.sleep(0.1)
        return None

    def close(self, failed: bool) -> None:
        """Leaves the process group and waits for the processes that this one started; not long if it failed."""
        self._closing = True
        if dist.is_initialized() and not failed:
            dist.destroy_process_group()
        for child in self._children:
            try:
                child.wait(timeout=5 if failed else 60)
            except subprocess.TimeoutExpired:
                child.kill()
        self._children.clear()


def start(strategy: StrategyConfig, command: Sequence[str]) -> World:
    """Joins the processes that torchrun or SLURM started, or starts those that `strategy` asks for.

    Args:
        strategy: which devices, and how many.
        command: the command line that starts this very program, for its further processes on this machine.

    Raises:
        ConfigError: the devices are not there, or others than those that were started.
    """
    if dist.is_torchelastic_launched():
        return _join(
            strategy,
            TorchElasticEnvironment(),
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            size=int(os.environ["WORLD_SIZE"]),
            starter="torchrun",
        )
    if SLURMEnvironment.detect():
        size, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", 1))
        return _join(
            strategy, SLURMEnvironment(auto_requeue=False), devices=size // nodes, size=size, starter="SLURM"
        )
    if strategy.num_nodes > 1:
        raise ConfigError(
            f"strategy.num_nodes = {strategy.num_nodes}: on several machines torchrun or SLURM must start the "
            "processes; --dry-run prints the line"
        )
    devices = local_devices(strategy)
    if devices == 1:
        return World()
    children = []
    if "LOCAL_RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"WORLD_SIZE": str(devices), "RANK": "0", "LOCAL_RANK": "0"}
        for rank in range(1, devices):
            variables = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # of plug-ins, however found
            children.append(subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL))
    rank = int(os.environ["LOCAL_RANK"])
    world = World(rank, rank, devices, 1, LightningEnvironment(), _children=children)
    _open_store(world)
    if children:
        threading.Thread(target=_end_with_children, args=[world], daemon=True).start()
    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return world


def device_kind(strategy: StrategyConfig) -> str:
    """What to train on, "gpu" or "cpu". Raises ConfigError for a GPU that is not there."""
    if strategy.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "strategy.accelerator = 'gpu': no CUDA device is available here; expected auto or cpu"
        )
    return "gpu" if strategy.accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def local_devices(strategy: StrategyConfig) -> int:
    """Devices of this machine that the recipe asks for. Raises ConfigError for GPUs that are not there."""
    gpus = torch.cuda.device_count() if strategy.accelerator != "cpu" else 0
    if strategy.devices == "auto":
        return gpus or 1
    if gpus and strategy.devices > gpus:
        raise ConfigError(
            f"strategy.devices = {strategy.devices}: this machine has {gpus} GPU{'s' * (gpus > 1)}; "
            f"expected auto or at most {gpus}"
        )
    return strategy.devices


def _join(
    strategy: StrategyConfig, environment: ClusterEnvironment, devices: int, size: int, starter: str
) -> World:
    nodes = size // devices
    if strategy.devices not in ("auto", devices):
        raise ConfigError(
            f"strategy.devices = {strategy.devices}: {starter} started {devices} processes on this machine; "
            "make the two equal, or leave devices at auto"
        )
    if strategy.num_nodes not in (1, nodes):
        raise ConfigError(
            f"strategy.num_nodes = {strategy.num_nodes}: {starter} started processes on {nodes} machines"
        )
    if size == 1:
        return World()
    rank = environment.global_rank()
    world = World(rank, environment.local_rank(), devices, nodes, environment)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
    }
    _open_store(world)
    return world


def _open_store(world: World) -> None:
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    except Exception as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostProcessError(
            f"rank {world.rank}: cannot reach the other processes at {where}: {str(error).splitlines()[0]}"
        ) from None
    world.store = dist.PrefixStore("mixerlab", store)


def _end_with_children(world: World) -> None:
    """Ends this process where one that it started has failed: it would wait for it in vain."""
    while True:
        time.sleep(0.2)
        if any(child.poll() not in (None, 0, *INTERRUPTED) for child in list(world._children)):
            lost = world.killed()
            time.sleep(5)  # for this process to notice, and to say more
            if world._closing:
                return
            say(f"stopped: {lost}. The checkpoints are whole; continue with resume=auto")
            end_all(world, 1)


def _end_with_parent() -> None:
    """Ends this process where the one that started it has gone: nobody else would."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def end_all(world: World, code: int) -> None:
    """Ends this process and those that it started, at once."""
    for child in world._children:
        child.kill()
    sys.stdout.flush()
    os._exit(code)


def say(text: str) -> None:
    """To the standard error, whatever has become of the console."""
    print(text, file=sys.stderr, flush=True)
