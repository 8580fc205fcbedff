"""How the processes of a run come about, and find each other.

Several on this machine are started here; on several machines torchrun or SLURM starts them, and their environment
variables say who is who. Torch's own launcher in this process would be a third way with other rules: it takes over the
signals, and kills after 30 seconds what should write a checkpoint.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from mixerlab.lm.parallel.hang_watch import HangWatch
from mixerlab.lm.parallel.interrupts import PARENT, Interrupts
from mixerlab.lm.parallel.processes import LostProcessError, World, say, wait_for
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.options import ConfigError

MEETING = timedelta(minutes=10)
"""How long the processes wait for each other to start."""

WHO = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
"""Environment variables that say which of the processes this is."""


def launch(strategy: StrategyConfig, command: Sequence[str], interrupts: Interrupts | None = None) -> World:
    """Joins the processes that torchrun or SLURM started, or starts those that `strategy` asks for.

    Args:
        strategy: which devices, and how many.
        command: the command line that starts this very program, for its further processes on this machine.
        interrupts: of this process.

    Raises:
        ConfigError: the devices are not there, or others than those that were started.
        LostProcessError: the other processes do not come.
    """
    world = _found(strategy, command)
    world.interrupts = interrupts or world.interrupts
    world.interrupts.speaks = world.rank == 0
    if world.store is not None:
        HangWatch(world, strategy.timeout)
    return world


def _found(strategy: StrategyConfig, command: Sequence[str]) -> World:
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
        if size > 1 and "SLURM_STEP_ID" not in os.environ:
            raise ConfigError(
                f"SLURM has given this job {size} tasks, and srun has not started this one: put srun "
                "--kill-on-bad-exit=1 before the command, or ask for one task to train on this machine alone"
            )
        return _join(
            strategy, SLURMEnvironment(auto_requeue=False), devices=size // nodes, size=size, starter="SLURM"
        )
    if strategy.num_nodes > 1:
        raise ConfigError(
            f"strategy.num_nodes = {strategy.num_nodes}: on several machines torchrun or SLURM must start the "
            "processes; --dry-run prints the line"
        )
    if PARENT in os.environ:
        return _further_process(int(os.environ["WORLD_SIZE"]))
    for name in WHO:
        os.environ.pop(name, None)  # of something else; Lightning would take it for this run's
    devices = local_devices(strategy)
    return World() if devices == 1 else _main_process(devices, command)


def _main_process(devices: int, command: Sequence[str]) -> World:
    """Rank 0, once it has started the others. The store is within reach of this machine alone."""
    store = _local_store()
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(devices)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    world = World(0, 0, devices, 1, LightningEnvironment())
    for rank in range(1, devices):
        variables = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # of plug-ins, however found
        world.children.append(subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL))
    threading.Thread(target=_end_with_children, args=[world], daemon=True).start()
    _meet(world, store)
    return world


def _local_store(port: int = 0) -> dist.TCPStore:
    """A store that takes connections from this machine alone; port 0 is a free one."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _further_process(devices: int) -> World:
    rank = int(os.environ["RANK"])
    world = World(rank, rank, devices, 1, LightningEnvironment())
    _meet(world, _connection(world))
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
    world = World()
    if size > 1:
        rank = environment.global_rank()
        world = World(rank, environment.local_rank(), devices, nodes, environment)
        address = "127.0.0.1" if starter == "SLURM" and nodes == 1 else environment.main_address
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(environment.main_port)}
    elif starter == "SLURM":
        return world
    is_local = starter == "SLURM" and nodes == 1 and world.rank == 0
    store = _local_store(environment.main_port) if is_local else _connection(world)
    if starter == "torchrun":
        world.lasting_store = dist.PrefixStore("mixerlab", store)
    if size > 1:
        _meet(world, store)
    return world


def _connection(world: World) -> dist.Store:
    try:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=MEETING))
    except Exception as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostProcessError(
            f"rank {world.rank}: cannot reach the other processes at {where}: {str(error).splitlines()[0]}"
        ) from None
    return store


def _meet(world: World, store: dist.Store) -> None:
    """Gives the processes of this attempt a part of the store that is theirs alone.

    Torchrun's store outlives the processes that it restarts, with all that they wrote. So each process says a word that
    nobody has said before, and goes on only when rank 0 has answered to that word.
    """
    store = dist.PrefixStore("mixerlab", store)
    word = uuid.uuid4().hex
    try:
        if world.rank:
            store.set(f"hello/{world.rank}", word)
            wait_for(store, [f"welcome/{word}"], MEETING)
            attempt = store.get(f"welcome/{word}").decode()
            store.set(f"{attempt}/{world.rank}", "")
        else:
            attempt = word
            _welcome_all(store, attempt, range(1, world.size))
    except TimeoutError:
        raise LostProcessError(
            f"rank {world.rank}: the other processes have not started within {MEETING.seconds} s"
        ) from None
    world.store = dist.PrefixStore(attempt, store)


def _welcome_all(store: dist.Store, attempt: str, others: Sequence[int]) -> None:
    began = time.monotonic()
    while not store.check([f"{attempt}/{rank}" for rank in others]):
        for rank in others:  # again and again, for the word may be that of an earlier attempt
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode(errors='replace')}", attempt)
        if time.monotonic() - began > MEETING.total_seconds():
            raise TimeoutError
        time.sleep(0.05)


def _end_with_children(world: World) -> None:
    """Ends this process where one that it started has failed: it would wait for it in vain."""
    while not world.closing:
        time.sleep(0.2)
        if lost := world.killed():
            time.sleep(5)  # for this process to notice, and to say more
            if not world.closing:
                say(f"stopped: {lost}. {world.advice}")
                world.end(1)
