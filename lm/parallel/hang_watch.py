"""A rank that stops is found and named, and the run ended, instead of all waiting for it."""

import faulthandler
import os
import sys
import threading
import time

import torch.distributed as dist

from mixerlab.lm.parallel.processes import World, end_all, say


class HangWatch:
    """Ends a run in which a rank has stopped, and says which.

    Every rank counts what it does with `moved`; a thread publishes the count. A rank whose count has stood still
    for `timeout` seconds looks up the others': those with the smallest have not come to where the others wait.
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self._count = 0
        self._doing = "starting"
        if world.size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A connection of its own: the main thread may wait in the other one.
            client = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._store = dist.PrefixStore("moved", client)
            self._store.set(str(world.rank), "0 starting")
            threading.Thread(target=self._watch, daemon=True).start()

    def moved(self, doing: str) -> None:
        """To be called before every thing that may take long, with what it is."""
        self._count += 1
        self._doing = doing

    def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        try:
            while True:
                count = self._count
                if count != seen:
                    seen, since = count, time.monotonic()
                    self._store.set(str(self.world.rank), f"{count} {self._doing}")
                elif time.monotonic() - since > self.timeout:
                    self._report()
                time.sleep(min(1.0, self.timeout / 20))
        except RuntimeError:  # the store has gone with rank 0
            if time.monotonic() - since > self.timeout:
                say(
                    f"error: no progress for {self.timeout:g} s, and rank 0 does not answer. Continue with resume=auto"
                )
                end_all(self.world, 1)

    def _report(self) -> None:
        ranks = [str(rank) for rank in range(self.world.size)]
        found = [
            self._store.get(rank).decode().split(" ", 1) if self._store.check([rank]) else ["-1", "starting"]
            for rank in ranks
        ]
        counts = [int(count) for count, _ in found]
        behind = [rank for rank, count in enumerate(counts) if count == min(counts)]
        me = self.world.rank
        if len(behind) < self.world.size:
            names = ", ".join(f"rank {rank} ({found[rank][1]})" for rank in behind)
            text = f"error: no progress for {self.timeout:g} s: the others wait for {names}"
        else:
            text = f"error: no progress for {self.timeout:g} s on any rank, all of them {self._doing}"
        if me == 0 or me in behind:
            say(
                f"{text}. Raise strategy.timeout if that can take so long; continue with resume=auto. "
                f"Where rank {me} stands:"
            )
            faulthandler.dump_traceback(file=sys.stderr)
        time.sleep(2)  # so that every rank gets to say its part
        end_all(self.world, 1)
