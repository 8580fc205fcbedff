"""Time and memory of feedback attention on a GPU: the operator, one step of decoding, a whole training step.

    python benchmarks/feedback_gpu.py [--help]

Everything runs in one process. Times are medians over many runs, by CUDA events, each run from a cold cache; the
backward pass directly follows the forward pass. Peak memory of the operator is what a pass
allocates at most beside its inputs, for the backward pass including what the forward pass kept; of a training step it
is everything. Without a GPU the script says so and exits with 2.

Rows of the operator (one feedback head as wide as the model, bf16 unless named otherwise):

    this operator            feedback_attention with its default backend
    textbook, float32        the T x T matrices of softmax and triangular solve (backend "reference")
    textbook, bf16 autocast  the same under autocast: logits in bf16; softmax and solve in float32
    chunked                  the backend that runs everywhere
    attention                causal scaled_dot_product_attention of the same width, the fastest of torch's backends
    matrix products          (N, D) x (D, columns) products of the same FLOPs: the floor

FLOPs per sequence are 2 T^2 D forward and 5 T^2 D backward, of each row. The share is that of the rate of the
matrix products of the same table and length.

Rows of decoding, one new position, replayed as a CUDA graph: this operator; and gathering the cached positions,
softmax and einsum, as the released layer does. Bytes are the keys and states of the cached positions, once; the
share is that of the rate at which the device copies (read and written bytes).

Letters: B batch, T time, N = B * T positions, D width of queries, keys and values, L cached positions.
"""

import argparse
import gc
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixerlab.kernels.feedback import feedback_attention

PASSES = {"forward": 2, "backward": 5, "forward + backward": 7}
"""What is measured, and its FLOPs in units of T^2 D per sequence."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # T
    tokens: int = 32768  # N, or T where that is more
    width: int = 1024  # D
    head_dim: int = 128  # of attention
    caches: tuple[tuple[int, int], ...] = ((1, 1024), (1, 8192), (8, 8192), (32, 8192), (1, 65536))  # (B, L)
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

    def measure(self, name: str, make: Callable[[], Contestant]) -> Measured | str:
        """Builds and measures a contestant; where that fails, what is to be printed instead."""
        progress(name)
        try:
            return self._measure(make)
        except torch.OutOfMemoryError:
            problem = "out of memory"
        except RuntimeError as error:
            problem = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:60]}"
        finally:
            progress("")
            if self.on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
        return problem

    def _measure(self, make: Callable[[], Contestant]) -> Measured:
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


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


# ---- the operator ----


def differentiated(function: Callable[..., Tensor], inputs: list[Tensor]) -> Contestant:
    for x in inputs:
        x.requires_grad_()
    gradient = torch.randn_like(inputs[2])
    return Contestant(lambda: function(*inputs), lambda y: torch.autograd.grad(y, inputs, gradient))


def feedback(bench: Bench, T: int, backend: str, dtype: torch.dtype) -> Contestant:
    D = bench.sizes.width
    torch.manual_seed(0)
    B = bench.sizes.batch(T)
    inputs = [torch.randn(B, 1, T, D, device=bench.device, dtype=dtype) for _ in range(3)]
    gamma = 0.999 * torch.tanh(1 + torch.randn(B, 1, T, device=bench.device))
    return differentiated(partial(feedback_attention, backend=backend), [*inputs, gamma])


def autocast_textbook(bench: Bench, T: int) -> Contestant:
    contestant = feedback(bench, T, "reference", torch.bfloat16)

    def forward() -> Tensor:
        with torch.autocast(bench.device, torch.bfloat16):
            return contestant.forward()

    return Contestant(forward, contestant.backward)


def attention(bench: Bench, T: int, backend: SDPBackend) -> Contestant:
    sizes = bench.sizes
    shape = (sizes.batch(T), sizes.width // sizes.head_dim, T, sizes.head_dim)
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return differentiated(function, inputs)


def products(bench: Bench, T: int) -> Contestant:
    """2 N D FLOPs per column: T columns make the forward pass's 2 T^2 D per sequence, 2.5 T the backward pass's."""
    N, D, most = bench.sizes.batch(T) * T, bench.sizes.width, 8192
    left = torch.randn(N, D, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(D, most, device=bench.device, dtype=torch.bfloat16)
    out = torch.empty(N * most, device=bench.device, dtype=torch.bfloat16)

    def multiply(columns: int) -> None:
        for lo in range(0, columns, most):
            width = min(most, columns - lo)
            torch.mm(left, right[:, :width], out=out[: N * width].view(N, width))

    return Contestant(lambda: multiply(T), lambda _: multiply(5 * T // 2))


def operator_rows(bench: Bench, T: int) -> dict[str, Measured | str]:
    contestants: dict[str, Callable[[], Contestant]] = {
        "this operator": partial(feedback, bench, T, "auto", torch.bfloat16),
        "textbook, float32": partial(feedback, bench, T, "reference", torch.float32),
        "textbook, bf16 autocast": partial(autocast_textbook, bench, T),
        "chunked": partial(feedback, bench, T, "chunked", torch.bfloat16),
    }
    rows = {name: bench.measure(f"T = {T}: {name}", make) for name, make in contestants.items()}
    tried = {
        f"attention ({name})": bench.measure(
            f"T = {T}: attention, {name}", partial(attention, bench, T, kind)
        )
        for name, kind in SDPA.items()
    }
    ran = {name: result.milliseconds[2] for name, result in tried.items() if isinstance(result, Measured)}
    fastest = min(ran, key=lambda name: ran[name], default=next(iter(tried)))
    rows[fastest] = tried[fastest]
    rows["matrix products"] = bench.measure(f"T = {T}: matrix products", partial(products, bench, T))
    return rows


def print_operator(bench: Bench) -> None:
    sizes = bench.sizes
    results = {T: operator_rows(bench, T) for T in sizes.lengths}
    for i, (name, flops) in enumerate(PASSES.items()):
        print(f"\nfeedback attention, {name}, D = {sizes.width}, N = {sizes.tokens} or T if more, one head")
        print(f"{'T':>6} {'':>24} {'ms':>10} {'tokens/s':>10} {'TFLOP/s':>8} {'share':>6} {'peak, MiB':>10}")
        for T, rows in results.items():
            N = sizes.batch(T) * T
            floor = rows["matrix products"]
            for row, result in rows.items():
                if isinstance(result, str):
                    print(f"{T:>6} {row:>24} {result}")
                    continue
                ms = result.milliseconds[i]
                share = f"{floor.milliseconds[i] / ms:.1%}" if isinstance(floor, Measured) else "-"
                rate = flops * N * T * sizes.width / ms / 1e9
                print(
                    f"{T:>6} {row:>24} {ms:>10.3f} {1e3 * N / ms:>10.3g} {rate:>8.3g} {share:>6} "
                    f"{mebibytes(bench, result.peaks[i]):>10}"
                )


def mebibytes(bench: Bench, size: int) -> str:
    return f"{size / 2**20:.0f}" if bench.on_gpu else "-"


# ---- decoding ----


def our_step(q: Tensor, f: Tensor, gamma: Tensor, k: Tensor, s: Tensor, length: Tensor) -> Tensor:
    return feedback_attention(q, q, f, gamma, past=(k, s), past_length=length)


def gathered_step(q: Tensor, f: Tensor, gamma: Tensor, k: Tensor, s: Tensor, length: Tensor) -> Tensor:
    index = torch.arange(k.shape[2], device=q.device)[:, None].expand(k.shape)
    keys, states = k.gather(2, index), s.gather(2, index)
    logits = torch.einsum("bhtk,bhlk->bhtl", q, keys) * q.shape[-1] ** -0.5
    alpha = logits.softmax(-1, dtype=torch.float32).to(states.dtype)
    return f + (gamma[..., None] * torch.einsum("bhtl,bhlp->bhtp", alpha, states)).to(f.dtype)


def decoding(bench: Bench, B: int, L: int, step: Callable[..., Tensor]) -> Contestant:
    D = bench.sizes.width
    torch.manual_seed(0)
    shapes = ((B, 1, 1, D), (B, 1, 1, D), (B, 1, 1), (B, 1, L, D), (B, 1, L, D))
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes]
    length = torch.full((B,), L, device=bench.device)
    found = step(*inputs, length).float()
    truth = our_step(*[x.float() for x in inputs], length)  # type: ignore[call-arg]
    error = ((found - truth).norm() / truth.norm()).item()
    assert error < 2e-2, f"{step.__name__} computes something else: relative error {error:.2g}"
    return bench.replayed(partial(step, *inputs, length))


def copying(bench: Bench) -> Contestant:
    source = torch.zeros(bench.sizes.copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return Contestant(lambda: target.copy_(source))


@torch.no_grad()
def print_decoding(bench: Bench) -> None:
    D = bench.sizes.width
    copied = bench.measure("copying", partial(copying, bench))
    copy_rate = 0.0
    if isinstance(copied, Measured):
        copy_rate = 2 * bench.sizes.copied / copied.milliseconds[0] * 1e3
    print(f"\ndecoding one position, D = {D}, one head, bf16; copying runs at {copy_rate / 1e9:.4g} GB/s")
    print(f"{'B':>4} {'L':>6} {'':>24} {'us':>10} {'tokens/s':>10} {'GB/s':>8} {'share':>6}")
    for B, L in bench.sizes.caches:
        for name, step in (("this operator", our_step), ("gather, softmax, einsum", gathered_step)):
            result = bench.measure(f"decoding: {name}", partial(decoding, bench, B, L, step))
            if isinstance(result, str):
                print(f"{B:>4} {L:>6} {name:>24} {result}")
                continue
            ms = result.milliseconds[0]
            rate = 2 * B * L * D * torch.bfloat16.itemsize / ms * 1e3
            share = f"{rate / copy_rate:.0%}" if copy_rate else "-"
            print(
                f"{B:>4} {L:>6} {name:>24} {1e3 * ms:>10.1f} {1e3 * B / ms:>10.3g} {rate / 1e9:>8.4g} {share:>6}"
            )


# ---- training ----


def training(bench: Bench, mixer: str, T: int) -> tuple[Contestant, int]:
    """A step of optimisation, and the number of parameters."""
    sizes = bench.sizes
    # Here, so that the kernels alone need nothing but torch and triton.
    from mixerlab.lm.model.decoder import Decoder
    from mixerlab.lm.recipe.schema import OptimConfig
    from mixerlab.lm.training.optim import build_optimizer

    decoder = Decoder(sizes.vocab_size, d_model=sizes.d_model, n_layers=sizes.n_layers, mixer=mixer)
    decoder.initialize(0)
    decoder.to(bench.device)
    if bench.on_gpu:
        torch._dynamo.reset()
        for block in decoder.blocks:
            block.compile()
    optimizer = build_optimizer(decoder, OptimConfig())
    ids = torch.randint(sizes.vocab_size, (sizes.batch(T), T + 1), device=bench.device)

    def step() -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            nll, _ = decoder(ids[:, :-1], ids[:, 1:])
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(step), sum(p.numel() for p in decoder.parameters())


def print_training(bench: Bench) -> None:
    sizes = bench.sizes
    print(
        f"\na training step, {sizes.n_layers} gated blocks, D = {sizes.d_model}, bf16 autocast, AdamW,",
        end=" ",
    )
    print(f"N = {sizes.tokens}, {'compiled' if bench.on_gpu else 'not compiled'}")
    print(f"{'T':>6} {'mixer':>10} {'parameters':>11} {'ms':>10} {'tokens/s':>10} {'peak, MiB':>10}")
    for T in sizes.training_lengths:
        for mixer in ("sessa", "attention", "mamba2"):
            parameters = 0

            def make(mixer: str = mixer, T: int = T) -> Contestant:
                nonlocal parameters
                contestant, parameters = training(bench, mixer, T)
                return contestant

            result = bench.measure(f"training {mixer}, T = {T}", make)
            if isinstance(result, str):
                print(f"{T:>6} {mixer:>10} {result}")
                continue
            ms, N = result.milliseconds[0], sizes.batch(T) * T
            peak = mebibytes(bench, result.held + result.peaks[0])
            print(f"{T:>6} {mixer:>10} {parameters:>11,} {ms:>10.2f} {1e3 * N / ms:>10.3g} {peak:>10}")


PARTS = {"operator": print_operator, "decoding": print_decoding, "training": print_training}


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="T of the operator (default: 512 to 65536)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="run on the CPU, at sizes that say nothing")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print(
            "feedback_gpu.py needs a CUDA device, and torch sees none (--smoke runs without)", file=sys.stderr
        )
        sys.exit(2)
    sizes = SMOKE if args.smoke else Sizes()
    if args.lengths:
        sizes = replace(sizes, lengths=tuple(args.lengths))
    device = "cpu" if args.smoke else "cuda"
    name = platform.machine() if args.smoke else torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}", end=", "
    )
    print(f"{date.today()}\n{shlex.join(['python', 'benchmarks/feedback_gpu.py', *sys.argv[1:]])}")
    bench = Bench(device, sizes, args.seconds)
    for part in args.parts:
        PARTS[part](bench)


if __name__ == "__main__":
    main()
