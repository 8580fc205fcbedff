"""How one row is measured, and rows one after another in processes that may die.

Letters: B batch, T time, N = B * T positions, D width of queries, keys and values, L cached positions.
"""

import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # T
    tokens: int = 32768  # N, or T where that is more
    width: int = 1024  # D
    head_dim: int = 128  # of attention
    caches: tuple[tuple[int, int], ...] = ((1, 1024), (1, 8192), (8, 8192), (32, 8192), (1, 65536))  # (B, L)
    profiled: tuple[int, int] = (4096, 512)  # T, and the rows of a panel there
    copied: int = 2**30  # bytes, for the rate of copying
    cold: int = 2**28  # bytes written before each run, more than any cache holds
    d_model: int = 768
    n_layers: int = 19
    vocab_size: int = 32768
    training_lengths: tuple[int, ...] = (2048, 8192)
    runs: int = 100  # at most
    fewest: int = 5

    def batch(self, T: int) -> int:
        return max(1, self.tokens // T)


SMOKE = Sizes(
    lengths=(16, 32),
    tokens=32,
    width=32,
    head_dim=16,
    caches=((2, 20),),
    profiled=(16, 8),
    copied=2**10,
    cold=2**10,
    d_model=64,
    n_layers=1,
    vocab_size=50,
    training_lengths=(16,),
    runs=1,
    fewest=1,
)


@dataclass(frozen=True)
class Contestant:
    """`forward()` returns what `backward` takes; both do their work and nothing else."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] = lambda _: None


@dataclass(frozen=True)
class Measured:
    """Times and most extra bytes of forward pass, backward pass and both; and the bytes held between runs."""

    milliseconds: tuple[float, ...]
    peaks: tuple[int, ...]
    held: int


class Bench:
    """Measures on one device."""

    def __init__(self, device: str, sizes: Sizes, seconds: float):
        self.device, self.sizes, self.seconds = device, sizes, seconds
        self.on_gpu = device == "cuda"
        self.cold = torch.empty(sizes.cold, dtype=torch.uint8, device=device)

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.on_gpu else 0  # on a CPU torch does not count

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """What `run` returns, and the most memory allocated meanwhile."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = run()
        self.synchronize()
        return result, torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def measure(self, make: Callable[[], Contestant]) -> Measured:
        empty = self.allocated()
        contestant = make()
        contestant.backward(contestant.forward())  # compiles
        before = self.allocated()
        between, forward_peak = self.peak(contestant.forward)
        _, backward_peak = self.peak(partial(contestant.backward, between))
        del between
        peaks = [peak - before for peak in (forward_peak, backward_peak, max(forward_peak, backward_peak))]
        times: list[tuple[float, ...]] = []
        end = time.perf_counter() + self.seconds
        while len(times) < self.sizes.fewest or (len(times) < self.sizes.runs and time.perf_counter() < end):
            self.cold.zero_()
            start = self.mark()
            result = contestant.forward()
            middle = self.mark()
            contestant.backward(result)
            stop = self.mark()
            self.synchronize()
            spans = ((start, middle), (middle, stop), (start, stop))
            times.append(tuple(self.milliseconds(*span) for span in spans))
            del result
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        return Measured(tuple(medians), tuple(peaks), before - empty)

    def replayed(self, step: Callable[[], Any]) -> Contestant:
        """Without what the host does between launches."""
        if not self.on_gpu:
            return Contestant(step)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return Contestant(graph.replay)

    def mebibytes(self, size: int) -> str:
        return f"{size / 2**20:.0f}" if self.on_gpu else "-"


@dataclass(frozen=True)
class Row:
    name: str  # of the columns' width
    measure: Callable[[Bench], str]
    """Returns what is printed behind the name."""


@dataclass(frozen=True)
class Part:
    heading: Callable[[Bench], str]
    rows: Callable[[Sizes], list[Row]]
    """The same in every process: rows are known by their numbers."""
    guess: float
    """Seconds of a row beside those of measuring, for compiling and the like."""


def run_rows(
    parts: Sequence[tuple[str, Part]], device: str, sizes: Sizes, seconds: float, first: int, at: Any
):
    """Measures the rows of all parts from number `first` on; `at.value` says which one is at hand."""
    bench = Bench(device, sizes, seconds)
    number = 0
    for name, part in parts:
        rows, start = part.rows(sizes), time.perf_counter()
        if first < number + len(rows):
            print("\n" + part.heading(bench), flush=True)
        for row in rows:
            if number >= first:
                at.value = number
                print(row.name, end=" ", flush=True)
                _run_row(bench, row)
            number += 1
        if first < number:
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def _run_row(bench: Bench, row: Row) -> None:
    start = time.perf_counter()
    try:
        text = row.measure(bench)
    except torch.OutOfMemoryError:
        text = "out of memory"
    except Exception as error:
        text = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
    print(f"{text} {time.perf_counter() - start:>6.1f} s", flush=True)
    gc.collect()
    try:
        bench.synchronize()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    except RuntimeError:
        sys.exit("an error of the device that outlives its row")


def run_all(parts: Sequence[tuple[str, Part]], device: str, sizes: Sizes, seconds: float) -> None:
    """Every row, in order; where the process of a row dies, those behind it run in a new one."""
    counts = {name: len(part.rows(sizes)) for name, part in parts}
    guesses = [f"{name} {counts[name] * (part.guess + seconds):.0f} s" for name, part in parts]
    print(f"guessed times: {', '.join(guesses)}", flush=True)
    context = multiprocessing.get_context("spawn")
    at = context.Value("i", 0)
    first = 0
    while first < sum(counts.values()):
        at.value = first
        worker = context.Process(target=run_rows, args=(parts, device, sizes, seconds, first, at))
        worker.start()
        worker.join()
        if worker.exitcode == 0:
            return
        print(f"died: code {worker.exitcode}; on with the next row in a new process", flush=True)
        first = at.value + 1
