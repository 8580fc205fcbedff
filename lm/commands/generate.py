"""mixerlab generate: text from a trained run."""

import argparse
from collections.abc import Iterator, Sequence

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_device, add_run, at_least


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab generate", description="Generate text from a trained run."
    )
    add_run(parser)
    parser.add_argument(
        "--prompt", action="append", help="text to continue; repeat for several (default: a new document)"
    )
    parser.add_argument("--max-new-tokens", type=at_least(int, 1), default=200, help="default: %(default)s")
    parser.add_argument(
        "--temperature",
        type=at_least(float, 0),
        default=0.8,
        help="0: always the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p", type=_share, default=0.95, help="probability mass to sample from (default: %(default)s)"
    )
    parser.add_argument("--seed", type=at_least(int, 0, 2**63 - 1), default=0, help="default: %(default)s")
    add_checkpoint(parser)
    add_device(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)

    from mixerlab.lm.run.folder import Run

    run = Run.open(args.run, args.allow_plugins)
    prompts = args.prompt or [""]
    pieces = run.texts(
        prompts,
        args.checkpoint,
        args.device,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    _print_in_order(prompts, pieces)
    return 0


def _print_in_order(prompts: Sequence[str], pieces: Iterator[tuple[int, str]]) -> None:
    """Prints the first text as it grows; the others, which grow at the same time, after it."""
    waiting = [""] * len(prompts)

    def begin(i: int) -> None:
        if len(prompts) > 1:
            print(f"--- prompt {i + 1} of {len(prompts)}")
        print(prompts[i], end="", flush=True)

    begin(0)
    for i, text in pieces:
        if i == 0:
            print(text, end="", flush=True)
        else:
            waiting[i] += text
    print()
    for i in range(1, len(prompts)):
        begin(i)
        print(waiting[i])


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected above 0 and at most 1")
    return value
