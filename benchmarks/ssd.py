"""Time of Mamba-2 on the CPU: the SSD operator against its recurrence, the mixer against transformers' layer.

    python benchmarks/ssd.py [--help]

Everything is float32 and in one process; those compared take turns, and the medians over the turns are
printed. Both mixers have the same weights, and their outputs and gradients are compared before they are timed.
Measure on an idle machine. Needs transformers, which `pip install -e ".[dev]"` brings.

Letters: B batch, T time, D model width, H heads of width P, N state size.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.utils import logging

from mixerlab.kernels.ssd import ssd
from mixerlab.lm.parallel.sharding import keep_freed_memory
from mixerlab.mixers import build_mixer

Run = Callable[[], tuple[float, float]]
"""Runs once; returns the seconds of the forward pass, and of forward and backward together."""


def timed(forward: Callable[[], Tensor], wanted: list[Tensor], gradient: Tensor) -> Run:
    def run() -> tuple[float, float]:
        start = time.perf_counter()
        y = forward()
        between = time.perf_counter()
        torch.autograd.grad(y, wanted, gradient)
        return between - start, time.perf_counter() - start

    return run


def medians(runs: Mapping[str, Run], turns: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds (forward, forward and backward) of each, taking turns after one to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            progress(f"turn {turn} of {turns}: {name}")
            seconds = run()
            if turn:
                taken[name].append(seconds)
    progress("")
    return {
        name: (1e3 * statistics.median(t[0] for t in ts), 1e3 * statistics.median(t[1] for t in ts))
        for name, ts in taken.items()
    }


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def operator_runs(args: argparse.Namespace, T: int) -> dict[str, Run]:
    """The SSD operator at length T in each backend, one group."""
    torch.manual_seed(0)
    B, H, P, N = args.batch, args.heads, args.head_dim, args.state
    x, gradient = torch.randn(B, T, H, P), torch.randn(B, T, H, P)
    dt = torch.empty(B, T, H).uniform_(1e-3, 0.1)
    A = -torch.empty(H).uniform_(1, 16)
    B_in, C_out = torch.randn(B, T, 1, N), torch.randn(B, T, 1, N)
    wanted = [y.requires_grad_() for y in (x, dt, A, B_in, C_out)]
    return {
        backend: timed(partial(ssd, *wanted, backend=backend), wanted, gradient)
        for backend in ("reference", "chunked")
    }


def mixer_runs(args: argparse.Namespace, T: int, chunks: list[int]) -> dict[str, Run]:
    """Our mixer at length T, and transformers' with each size of chunks, all of the same weights."""
    torch.manual_seed(0)
    options = {"name": "mamba2", "d_state": args.state, "head_dim": args.head_dim}
    ours = build_mixer(options, args.width)
    mixers: dict[str, nn.Module] = {"ours": ours}
    for chunk in chunks:
        config = Mamba2Config(
            hidden_size=args.width,
            num_heads=args.heads,
            head_dim=args.head_dim,
            state_size=args.state,
            n_groups=1,
            chunk_size=chunk,
        )
        mixers[f"transformers, chunks of {chunk}"] = Mamba2Mixer(config, layer_idx=0)
    x, gradient = torch.randn(args.batch, T, args.width), torch.randn(args.batch, T, args.width)
    x.requires_grad_()
    expected: list[Tensor] = []
    runs = {}
    for name, mixer in mixers.items():
        mixer.load_state_dict(ours.state_dict())
        wanted = [x, *(parameter for _, parameter in sorted(mixer.named_parameters()))]
        y = mixer(x)
        found = [y.detach(), *torch.autograd.grad(y, wanted, gradient)]
        expected = expected or found
        for a, b in zip(expected, found, strict=True):
            error = ((a - b).norm() / a.norm()).item()
            assert error < 1e-4, f"{name} computes something else: relative error {error:.2g}"
        runs[name] = timed(partial(mixer, x), wanted, gradient)
    return runs


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="B (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="D (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="P (default: %(default)s)")
    parser.add_argument("--state", type=int, default=64, help="N (default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="T of the operator's table"
    )
    parser.add_argument("--mixer-length", type=int, default=2048, help="T of the comparison of mixers")
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=[32, 64, 128, Mamba2Config().chunk_size],
        help="transformers' chunk sizes, its default last (default: %(default)s)",
    )
    parser.add_argument(
        "--growth", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="T of the table of growth"
    )
    parser.add_argument("--turns", type=int, default=9, help="runs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.heads = 2 * args.width // args.head_dim
    logging.set_verbosity_error()  # that the fused kernels are not installed

    print(
        f"B = {args.batch}, D = {args.width}, {args.heads} heads of {args.head_dim}, state {args.state},",
        end=" ",
    )
    print(f"float32, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}\n")

    print("the SSD operator: its recurrence, step by step, and by chunks")
    print(f"{'':>6} | {'forward, ms':^29} | {'forward + backward, ms':^29}")
    print(f"{'T':>6} |" + f"{'recurrence':>10} {'chunked':>9} {'ratio':>8}  |" * 2)
    for T in args.lengths:
        result = medians(operator_runs(args, T), args.turns)
        line = f"{T:>6} |"
        for i in range(2):
            reference, chunked = result["reference"][i], result["chunked"][i]
            line += f"{reference:>10.1f} {chunked:>9.1f} {reference / chunked:>7.2f}x  |"
        print(line)

    print(f"\nthe whole mixer, T = {args.mixer_length}")
    print(f"{'':>28} | {'forward, ms':>11} {'ratio':>7} | {'forward + backward, ms':>22} {'ratio':>7}")
    result = medians(mixer_runs(args, args.mixer_length, args.chunks), args.turns)
    for name, (forward, both) in result.items():
        ratios = forward / result["ours"][0], both / result["ours"][1]
        print(f"{name:>28} | {forward:>11.1f} {ratios[0]:>6.2f}x | {both:>22.1f} {ratios[1]:>6.2f}x")

    keep_freed_memory()  # as training does; before, both mixers ran with the allocator's defaults
    print("\ngrowth of our mixer with T, forward and backward")
    print(f"{'T':>6} | {'ms':>8} {'us per position':>16}")
    runs = {str(T): mixer_runs(args, T, [])["ours"] for T in args.growth}
    for length, (_, both) in medians(runs, args.turns).items():
        print(f"{length:>6} | {both:>8.1f} {1e3 * both / int(length) / args.batch:>16.1f}")


if __name__ == "__main__":
    main()
