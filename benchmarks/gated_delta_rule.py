"""Time of Gated DeltaNet on the CPU: the gated delta rule against its recurrence and transformers' form; the mixer.

    python benchmarks/gated_delta_rule.py [--help]

Everything is float32 and in one process; those compared take turns, and the medians over the turns are
printed. Outputs are compared before they are timed. Measure on an idle machine. Needs transformers, which
`pip install -e ".[dev]"` brings.

Letters: B batch, T time, D model width, H heads, K key width, P value width.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from mixerlab.kernels.gated_delta_rule import gated_delta_rule
from mixerlab.lm.parallel.sharding import keep_freed_memory
from mixerlab.mixers import build_mixer
from ssd import Run, medians, timed


def published(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """transformers' chunked form without kernels, which divides queries by the root of K."""
    return torch_chunk_gated_delta_rule(q * q.shape[-1] ** 0.5, k, v, log_decay, beta)[0]


def operator_runs(args: argparse.Namespace, T: int) -> dict[str, Run]:
    """The operator at length T: our two backends, and transformers' form."""
    torch.manual_seed(0)
    B, H, K, P = args.batch, args.heads, args.key, args.value
    q, k = (normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    v, gradient = torch.randn(B, T, H, P), torch.randn(B, T, H, P)
    log_decay = -torch.empty(B, T, H).uniform_(1e-3, 1.0)
    wanted = [x.requires_grad_() for x in (q, k, v, log_decay, torch.rand(B, T, H))]
    forms: dict[str, Callable[..., Tensor]] = {
        "recurrence": partial(gated_delta_rule, backend="reference"),
        "chunked": partial(gated_delta_rule, backend="chunked"),
        "transformers": published,
    }
    expected = None
    for name, form in forms.items():
        y = form(*wanted).detach()
        expected = y if expected is None else expected
        error = ((y - expected).norm() / expected.norm()).item()
        assert error < 1e-4, f"{name} computes something else: relative error {error:.2g}"
    return {name: timed(partial(form, *wanted), wanted, gradient) for name, form in forms.items()}


def mixer_run(args: argparse.Namespace, T: int) -> Run:
    """The whole mixer at length T, its sizes the defaults for the width."""
    torch.manual_seed(0)
    mixer = build_mixer("gated_deltanet", args.width)
    x, gradient = torch.randn(2, args.batch, T, args.width)
    wanted = [x.requires_grad_(), *mixer.parameters()]
    return timed(partial(mixer, x), wanted, gradient)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="B (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=3, help="H of the operator (default: %(default)s)")
    parser.add_argument("--key", type=int, default=64, help="K of the operator (default: %(default)s)")
    parser.add_argument("--value", type=int, default=128, help="P of the operator (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="D of the mixer (default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="T of the operator's table"
    )
    parser.add_argument(
        "--growth", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="T of the table of growth"
    )
    parser.add_argument("--turns", type=int, default=9, help="runs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    print(
        f"B = {args.batch}, {args.heads} heads with keys of {args.key} and values of {args.value},", end=" "
    )
    print(f"float32, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}\n")

    print("the gated delta rule: its recurrence, step by step, by chunks, and transformers' chunks")
    print(f"{'':>6} | {'forward, ms':^43} | {'forward + backward, ms':^43}")
    print(f"{'T':>6} |" + f"{'recurrence':>10} {'chunked':>9} {'ratio':>8} {'transformers':>13}  |" * 2)
    for T in args.lengths:
        result = medians(operator_runs(args, T), args.turns)
        line = f"{T:>6} |"
        for i in range(2):
            slow, ours, theirs = (result[name][i] for name in ("recurrence", "chunked", "transformers"))
            line += f"{slow:>10.1f} {ours:>9.1f} {slow / ours:>7.2f}x {theirs:>13.1f}  |"
        print(line)

    keep_freed_memory()  # as training does; before, all ran with the allocator's defaults
    print(f"\ngrowth of the mixer with T, D = {args.width}, forward and backward")
    print(f"{'T':>6} | {'ms':>8} {'us per position':>16}")
    runs = {str(T): mixer_run(args, T) for T in args.growth}
    for length, (_, both) in medians(runs, args.turns).items():
        print(f"{length:>6} | {both:>8.1f} {1e3 * both / int(length) / args.batch:>16.1f}")


if __name__ == "__main__":
    main()
