"""Time and memory of feedback attention: the chunked backend against the reference, on the CPU.

    python benchmarks/feedback.py [--help]

Time: float32, one head; the two backends take turns in one process, and the medians over the turns are
printed. Measure on an idle machine: a busy core stalls both threads of every small product, which costs the
chunked backend more than the reference. What it costs, benchmarks/busy.py measures.

Memory: each backend runs once, forward and backward, in a forked child of its own. Its peak extra memory
is how far the run raises the peak resident size of a child that already holds the inputs and has warmed
up on a short sequence. The children are forked before the parent has started any thread of its own.

Letters: B batch, T time, D width of queries, keys and values.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import torch

from mixerlab.kernels.feedback import feedback_attention

BACKENDS = ("reference", "chunked")


def make_inputs(B: int, T: int, D: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, f (B, 1, T, D) and gamma (B, 1, T), all with gradients; and a gradient for the output."""
    torch.manual_seed(0)
    q, k, f, ds = (torch.randn(B, 1, T, D) for _ in range(4))
    gamma = 0.999 * torch.tanh(1 + torch.randn(B, 1, T))
    return [x.requires_grad_() for x in (q, k, f, gamma)], ds


def run(backend: str, inputs: list[torch.Tensor], ds: torch.Tensor) -> tuple[float, float]:
    """Seconds of the forward pass, and of forward and backward together."""
    q, k, f, gamma = inputs
    start = time.perf_counter()
    s = feedback_attention(q, k, f, gamma, backend=backend)
    forward = time.perf_counter() - start
    torch.autograd.grad(s, inputs, ds)
    return forward, time.perf_counter() - start


def times(B: int, T: int, D: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Median milliseconds (forward, forward and backward) of each backend over at least 5 turns."""
    inputs, ds = make_inputs(B, T, D)
    turns: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS}
    for backend in BACKENDS:
        run(backend, inputs, ds)  # warm up
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns["chunked"]) < 5:
        for backend in BACKENDS:
            turns[backend].append(run(backend, inputs, ds))
    return {
        backend: (1e3 * statistics.median(t[0] for t in ts), 1e3 * statistics.median(t[1] for t in ts))
        for backend, ts in turns.items()
    }


def child(backend: str, B: int, T: int, D: int, answer) -> None:
    run(backend, *make_inputs(B, 256, D))
    inputs, ds = make_inputs(B, T, D)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(backend, inputs, ds)
    answer.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_extra_megabytes(backend: str, B: int, T: int, D: int) -> float:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(backend, B, T, D, send))
    process.start()
    send.close()
    units = receive.recv()
    process.join()
    return units / (2**20 if sys.platform == "darwin" else 2**10)


def progress(message: str) -> None:
    print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="B (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="D (default: %(default)s)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[256, 512, 1024, 2048, 4096],
        help="T (default: %(default)s)",
    )
    parser.add_argument("--memory-length", type=int, default=8192, help="T for memory (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per length (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    memory = {}
    for backend in BACKENDS:
        progress(f"memory of {backend} at T = {args.memory_length}")
        memory[backend] = peak_extra_megabytes(backend, args.batch, args.memory_length, args.width)
    rows = []
    for T in args.lengths:
        progress(f"time at T = {T}")
        rows.append((T, times(args.batch, T, args.width, args.seconds)))
    progress("")

    print(f"feedback attention, B = {args.batch}, D = {args.width}, one head, float32, CPU,", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':>6} | {'forward, ms':^29} | {'forward + backward, ms':^29}")
    print(f"{'T':>6} |" + f"{'reference':>10} {'chunked':>9} {'ratio':>8}  |" * 2)
    for T, result in rows:
        line = f"{T:>6} |"
        for i in range(2):
            reference, chunked = result["reference"][i], result["chunked"][i]
            line += f"{reference:>10.1f} {chunked:>9.1f} {reference / chunked:>7.2f}x  |"
        print(line)
    print(
        f"peak extra memory, forward + backward, T = {args.memory_length}: "
        f"reference {memory['reference']:.0f} MiB, chunked {memory['chunked']:.0f} MiB "
        f"({memory['reference'] / memory['chunked']:.1f}x less)"
    )


if __name__ == "__main__":
    main()
