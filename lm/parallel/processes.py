"""The processes of a run: agreeing on what one of them finds, and ending together.

One process per device. Rank 0 of all is the main process. `launch` starts or joins them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment
from torch import Tensor

from mixerlab.lm.parallel.interrupts import INTERRUPTED, Interrupts
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.options import UserError

Answer = TypeVar("Answer")


class LostProcessError(RuntimeError):
    """Another process of the run has failed, ended or hangs; the message is for the user."""


class Channel:
    """What ranks tell each other by way of torch's store: JSON, since whoever reaches the store's port can write.

    For one thread; all ranks call it in the same order.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int):
        self._store, self.rank, self.size = store, rank, size
        self._rounds = 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; what JSON can express."""
        if self._store is None:
            return [value]
        keys = [f"{self._rounds}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        wait_for(self._store, keys)
        values = [value_of(text) for text in self._store.multi_get(keys)]
        if self._rounds:  # whose values all have read who have come here
            self._store.delete_key(f"{self._rounds - 1}/{self.rank}")
        self._rounds += 1
        return values


def wait_for(store: dist.Store, keys: Sequence[str], limit: timedelta | None = None) -> None:
    """Returns when all keys are there. In naps, because signals are not heard within the store's own waiting.

    Without a `limit` the hang watch ends a waiting in vain. Raises LostProcessError, and TimeoutError at the limit.
    """
    began, nap = time.monotonic(), 0.001
    while not _there(store, keys):
        if limit is not None and time.monotonic() - began > limit.total_seconds():
            raise TimeoutError
        time.sleep(nap)
        nap = min(2 * nap, 0.2)


def _there(store: dist.Store, keys: Sequence[str]) -> bool:
    try:
        return store.check(list(keys))
    except RuntimeError:
        raise LostProcessError("rank 0, which all processes meet at, has ended") from None


def value_of(text: bytes, kind: type = object) -> Any:
    """What a rank has written into the store. Raises LostProcessError if it is not of that kind."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), kind):
            return value
    raise LostProcessError(
        "the store at which the processes meet holds what no process of this run has written"
    )


@dataclass
class World:
    """This process among all processes of the run."""

    rank: int = 0
    local_rank: int = 0
    devices: int = 1  # processes of this node
    nodes: int = 1
    environment: ClusterEnvironment | None = None  # for Lightning; None where there is one process
    store: Any = None  # torch's key-value store that the processes of this attempt share
    interrupts: Interrupts = field(default_factory=Interrupts)
    all_raised: bool = False
    """Whether the exception under way is raised on every rank, so that rank 0 alone should print it."""
    place: int = 0
    signs: int = 0
    doing: str = "starting"
    """What the hang watch publishes: how far this rank has come, how often it gave a sign of life, what it does."""
    advice: str = "The checkpoints are whole; continue with resume=auto"
    """What is said where another process was lost."""
    closing: bool = False
    children: list[subprocess.Popen] = field(default_factory=list)
    lasting_store: Any = None  # torchrun's, which outlives an attempt
    _questions: int = 0
    _channel: Channel | None = None

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    def moved(self, doing: str) -> None:
        """To be called before every thing that may take long, with what it is; by all ranks alike."""
        self.place += 1
        self.is_at(doing)

    def is_at(self, doing: str) -> None:
        """A sign of life from within such a thing, of any rank, with what it does now. Raises InterruptedRun."""
        if not self.interrupts.in_steps:
            self.interrupts.check()  # one may have come where it could not be raised
        self.signs += 1
        self.doing = doing

    def channel(self, name: str) -> Channel:
        """A connection of its own to the other ranks, for another thread."""
        if self.store is None:
            return Channel(None, 0, 1)
        return Channel(dist.PrefixStore(f"channel/{name}", self.store.clone()), self.rank, self.size)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; what JSON can express. For the main thread."""
        if self._channel is None:
            self._channel = self.channel("main")
        self.moved("waiting for the others")
        return self._channel.gather(value)

    def ask_main(self, question: Callable[[], Answer]) -> Answer:
        """Runs `question` on rank 0 alone; every rank returns its answer, which JSON must be able to express.

        If it fails every rank raises: rank 0 what was raised there, the others its text as a UserError where it is
        one, else as a LostProcessError.
        """
        if self.size == 1:
            return question()
        key = f"answer/{self._questions}"
        self._questions += 1
        if self.rank == 0:
            try:
                answer = question()
                reply = json.dumps({"answer": answer})
            except Exception as error:
                self.all_raised = True
                problem = str(error) if isinstance(error, UserError) else f"rank 0 failed: {error!r}"
                self.store.set(key, json.dumps({"problem": problem, "is_ours": isinstance(error, UserError)}))
                raise
            self.store.set(key, reply)
            self.moved(self.doing)
            return answer
        doing = self.doing
        self.moved("waiting for rank 0")
        wait_for(self.store, [key])
        self.is_at(doing)
        reply = value_of(self.store.get(key), dict)
        if "problem" in reply:
            self.all_raised = True
            raise (UserError if reply["is_ours"] else LostProcessError)(reply["problem"])
        return reply["answer"]

    def connect(self, device: torch.device, strategy: StrategyConfig) -> None:
        """Makes torch's process group, if it is needed: gloo for what lies on the CPU, NCCL for GPUs."""
        if dist.is_initialized() or (self.size == 1 and strategy.name != "fsdp"):
            return
        on_gpu = device.type == "cuda"
        if on_gpu:
            os.environ.setdefault(
                "TORCH_FR_BUFFER_SIZE", "2000"
            )  # what the hang watch writes of a hang in NCCL
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.HashStore() if self.size == 1 else dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.size,
            # The hang watch names the rank that hangs; it must come first.
            timeout=timedelta(seconds=strategy.timeout + 60),
            device_id=device if on_gpu else None,
        )

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

    @property
    def earlier_run(self) -> str | None:
        """The run folder that an earlier attempt under this torchrun opened, on rank 0."""
        if self.lasting_store is None or not self.lasting_store.check(["run"]):
            return None
        return self.lasting_store.get("run").decode()

    def note_run(self, path: str) -> None:
        """Has a restart by torchrun go on with this run folder. For rank 0."""
        if self.lasting_store is not None:
            self.lasting_store.set("run", path)

    def tell_end(self, code: int, why: str) -> None:
        """Ends all other ranks with `code`: this one has failed or was interrupted where they did not."""
        if self.store is not None and not self.all_raised:
            with suppress(RuntimeError):  # the store may have gone
                self.store.compare_set("end", "", json.dumps({"rank": self.rank, "code": code, "why": why}))

    def told_end(self, store: Any = None) -> dict[str, Any] | None:
        """What another rank said with `tell_end`: its "rank", "code" and "why"."""
        store = self.store if store is None else store
        if store is None or not store.check(["end"]):
            return None
        end = value_of(store.get("end"), dict)
        return end if end.get("rank") != self.rank else None

    def lost(self) -> str | None:
        """Which other process has failed or was killed, in words; waits a moment for the news."""
        for _ in range(20):
            with suppress(RuntimeError):
                if end := self.told_end():
                    return f"rank {end['rank']}: {end['why']}"
            if killed := self.killed():
                return killed
            time.sleep(0.1)
        return None

    def killed(self) -> str | None:
        """Which of the processes started here was killed or failed, in words."""
        for rank, child in enumerate(self.children, 1):
            if (code := child.poll()) not in (None, 0, *INTERRUPTED):
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return f"rank {rank} {how}"
        return None

    def close(self, failed: bool) -> None:
        """Leaves the process group and waits for the other processes; not long if it failed."""
        self.closing = True
        if self.store is not None and not failed:
            with suppress(RuntimeError, LostProcessError, TimeoutError):
                self.store.set(f"closing/{self.rank}", "")
                if self.rank == 0:  # the store ends with this process
                    keys = [f"closing/{rank}" for rank in range(self.size)]
                    wait_for(self.store, keys, timedelta(seconds=60))
        if dist.is_initialized() and not failed:
            dist.destroy_process_group()
        if failed and self.rank == 0 and self.nodes > 1 and self.lasting_store is None:
            time.sleep(3)  # the others read in the store, which ends with this process, why they end
        for child in self.children:
            try:
                child.wait(timeout=5 if failed else 60)
            except subprocess.TimeoutExpired:
                child.kill()
        self.children.clear()

    def end(self, code: int) -> None:
        """Ends this process and those that it started, at once; for threads."""
        for child in self.children:
            child.kill()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def say(text: str) -> None:
    """To the standard error, whatever has become of the console."""
    print(text, file=sys.stderr, flush=True)
