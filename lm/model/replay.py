"""One new token for each row by a CUDA graph: the device runs a step's launches without waiting for the host.

Letters: B rows, V vocabulary.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mixerlab.mixers import State

logger = logging.getLogger("mixerlab.replay")

Extend = Callable[[Tensor, list[State]], tuple[Tensor, list[State]]]
"""(B, T) tokens and the States of all layers -> logits (B, V) of the last position and the States after it."""


class FixedStep:
    """`extend` by one token, every time with the same shapes, on the same tensors, which it writes to.

    The shapes in a mixer's `extend` depend on `State.longest`, so that is held at the most that it can be. Attention
    then reads its whole cache and masks what is not filled; what a mixer returns anew is copied into the old State.
    """

    def __init__(self, extend: Extend, states: list[State], max_len: int):
        """`states` are used up; they were made for `max_len` positions."""
        self.extend = extend
        self.states = [state.bounded(max_len - 1) for state in states]
        self.left = max_len - max(state.longest for state in states)
        length = states[0].length
        self.ids = torch.zeros(len(length), 1, dtype=torch.int64, device=length.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B,) tokens -> logits (B, V) of what follows them. Raises ValueError where there is no room."""
        if self.left < 1:
            raise ValueError("the states are full")
        self.left -= 1
        self.ids.copy_(tokens[:, None])
        return self.run()

    def run(self) -> Tensor:
        with torch.inference_mode():
            logits, after = self.extend(self.ids, self.states)
            for state, new in zip(self.states, after, strict=True):
                state.assign(new)
        return logits


class ReplayedStep(FixedStep):
    """The first step runs as any, which compiles what there is to compile; the second is captured and replayed.

    Where capturing fails, the log says why and steps run as any. The logits are overwritten by the next step.
    """

    graph: torch.cuda.CUDAGraph | None = None
    logits: Tensor
    first, failed = True, False

    def run(self) -> Tensor:
        if self.first:
            self.first = False
            return self._run_aside()
        if self.graph is None and not self.failed:
            try:
                self._capture()
            except RuntimeError as error:
                self.failed = True
                logger.warning("generating without a CUDA graph, which could not be captured: %s", error)
        if self.graph is None:
            return super().run()
        self.graph.replay()
        return self.logits

    def _run_aside(self) -> Tensor:
        # On the stream of the capture, so that what libraries set up for a stream is there.
        self.stream = torch.cuda.Stream(self.ids.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(self.stream):
            logits = super().run()
        torch.cuda.current_stream(self.ids.device).wait_stream(self.stream)
        return logits

    def _capture(self) -> None:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.ids.device)
        try:
            # Other threads, such as those that watch over NCCL, may call CUDA meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.logits = super().run()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        self.graph = graph
