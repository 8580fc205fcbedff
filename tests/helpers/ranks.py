"""Several ranks as threads of one process, for what they agree on."""

import json
import threading
from typing import Any


class Ranks:
    """Runs a function on so many threads; `gather` of each is as that of a world, JSON included."""

    def __init__(self, size):
        self.size = size
        self._values = [""] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def gather_of(self, rank):
        def gather(value):
            self._values[rank] = json.dumps(value)
            self._barrier.wait()
            values = [json.loads(text) for text in self._values]
            self._barrier.wait()
            return values

        return gather

    def run(self, work):
        """`work(rank, gather)` on all ranks; what each returned or raised."""
        results: list[Any] = [None] * self.size

        def on(rank):
            try:
                results[rank] = work(rank, self.gather_of(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=on, args=[rank]) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
