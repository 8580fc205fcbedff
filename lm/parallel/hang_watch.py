"""A rank that stops is found and named, and the run ended, instead of all waiting for it."""

import faulthandler
import json
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from mixerlab.lm.parallel.processes import World, say, value_of

NOTHING: list[Any] = [-1, 0, "starting"]
"""Of a rank that has published nothing yet."""


class HangWatch:
    """Ends a run in which no rank has moved for `timeout` seconds, or one has ended, and says which and why.

    Every rank counts how far it has come (`World.moved`); a thread publishes the count. Where all stand still, those
    with the smallest count have not come to where the others wait.
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self._pause = min(1.0, timeout / 20)
        # A connection of its own: the main thread may wait in the other one.
        self._store = world.store.clone()
        self._seen = [NOTHING] * world.size
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        said, moved = -1, time.monotonic()  # moved: when a rank was last seen to
        try:
            while not self.world.closing:
                if (signs := self.world.signs) != said:
                    said, moved = signs, time.monotonic()
                    now = [self.world.place, signs, self.world.doing]
                    self._store.set(f"moved/{self.world.rank}", json.dumps(now))
                elif time.monotonic() - moved > self.timeout / 4 and self._others_moved():
                    moved = time.monotonic()
                elif time.monotonic() - moved > self.timeout:
                    self._report()
                if end := self.world.told_end(self._store):
                    self._end_too(end)
                time.sleep(self._pause)
        except RuntimeError:  # the store has gone with rank 0
            self._end_without_main()

    def _others_moved(self) -> bool:
        """Whether a rank has given a sign of life since the last look."""
        keys = [f"moved/{rank}" for rank in range(self.world.size)]
        there = [key for key in keys if self._store.check([key])]
        values = dict(zip(there, self._store.multi_get(there), strict=True))
        before = self._seen
        self._seen = [value_of(values[key], list) if key in values else NOTHING for key in keys]
        return self._seen != before

    def _report(self) -> None:
        places = [place for place, _, _ in self._seen]
        behind = [rank for rank, place in enumerate(places) if place == min(places)]
        me = self.world.rank
        if len(behind) < self.world.size:
            names = ", ".join(f"rank {rank} ({self._seen[rank][2]})" for rank in behind)
            text = f"error: no progress for {self.timeout:g} s: the others wait for {names}"
        else:
            text = f"error: no progress for {self.timeout:g} s on any rank, all of them {self._seen[me][2]}"
        try:
            if me == 0 or me in behind:
                say(
                    f"{text}. Raise strategy.timeout if that can take so long; continue with resume=auto. "
                    f"Where rank {me} stands:"
                )
                faulthandler.dump_traceback(file=2)
                _say_what_nccl_waits_for()
        finally:
            time.sleep(2)  # so that every rank gets to say its part
            self.world.end(1)

    def _end_too(self, end: dict[str, Any]) -> None:
        time.sleep(2)  # for this rank to notice, and to say more
        if not self.world.closing:
            if self.world.rank == 0:
                say(f"stopped: rank {end.get('rank')}: {end.get('why')}")
            self.world.end(int(end.get("code", 1)))

    def _end_without_main(self) -> None:
        time.sleep(5)  # as above
        if not self.world.closing:
            say(f"rank {self.world.rank}: stopped: rank 0 has ended. Continue with resume=auto")
            self.world.end(1)


def _say_what_nccl_waits_for() -> None:
    """The flight recorder's collectives that have not finished."""
    bindings = torch._C._distributed_c10d
    names = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    dump = next((getattr(bindings, name) for name in names if hasattr(bindings, name)), None)
    if dump is not None and dist.is_initialized() and dist.get_backend() != "gloo":
        say(f"NCCL: {dump(includeCollectives=True, onlyActive=True).decode(errors='replace')}")
