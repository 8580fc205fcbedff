"""Time and memory of feedback attention on a GPU: the operator, one step of decoding, a whole training step.

    python benchmarks/feedback_gpu.py [--help]

Times are medians over many runs, by CUDA events, each run from a cold cache; the
backward pass directly follows the forward pass. Peak memory of the operator is what a pass
allocates at most beside its inputs, for the backward pass including what the forward pass kept; of a training step it
is everything. Each row is printed when it is known, and ends with the seconds that it took. All rows run in one
process; a row that kills it is followed by the others in a new one. All but the training needs torch, triton and
mixerlab.kernels alone. Without a GPU the script says so and exits with 2.

Rows of the operator (one feedback head as wide as the model, bf16 unless named otherwise):

    matrix products          (N, D) x (D, columns) products of the same FLOPs: the floor
    this operator            feedback_attention with its default backend
    attention                causal scaled_dot_product_attention of the same width, by each of torch's backends
    chunked                  the backend that runs everywhere
    textbook, bf16 autocast  the T x T matrices of softmax and triangular solve (backend "reference"), logits in bf16
    textbook, float32        the same in float32
    DeltaFormer              where flash-linear-attention is installed: its kernel of the same recursion, with as many
                             heads as attention, and this operator on the same work

FLOPs per sequence are 2 T^2 D forward and 5 T^2 D backward, of each row. The share is that of the rate of the
matrix products of the same length.

Rows of decoding, one new position, replayed as a CUDA graph: this operator; and gathering the cached positions,
softmax and einsum, as the released layer does. Bytes are the keys and states of the cached positions, once; the
share is that of the rate at which the device copies (read and written bytes).

Rows of the profile: both passes of the operator, as they are and as one CUDA graph; torch.baddbmm on the shapes of
the panel product and of dq, all panels of a pass; and torch.profiler's table of one forward and one backward pass.

Letters: B batch, T time, N = B * T positions, D width of queries, keys and values, L cached positions.
"""

import argparse
import platform
import shlex
import sys
from dataclasses import replace
from datetime import date

import torch
import triton

from gpu import decoding_part, operator_part, profile_part, training_part
from gpu.timing import SMOKE, Sizes, run_all

PARTS = {
    "profile": profile_part.PART,
    "operator": operator_part.PART,
    "decoding": decoding_part.PART,
    "training": training_part.PART,
}


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="T of the operator (default: 512 to 65536)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row (default: %(default)s)")
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
    name = platform.machine() if args.smoke else torch.cuda.get_device_name()
    print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}, {date.today()}"
    )
    print(shlex.join(["python", "benchmarks/feedback_gpu.py", *sys.argv[1:]]), flush=True)
    parts = [(part, PARTS[part]) for part in args.parts]
    run_all(parts, "cpu" if args.smoke else "cuda", sizes, args.seconds)


if __name__ == "__main__":
    main()
