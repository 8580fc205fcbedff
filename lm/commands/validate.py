"""mixerlab validate: the validation losses of a trained run."""

import argparse
from collections.abc import Sequence

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_device, add_run, at_least


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab validate",
        description="Validate a trained run on the validation split of its own data.",
    )
    add_run(parser)
    add_checkpoint(parser)
    parser.add_argument("--batches", type=at_least(int, 1), help="per loader (default: as the recipe says)")
    add_device(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)

    from mixerlab.lm.run.folder import Run
    from mixerlab.lm.training.validation import validate_run

    run = Run.open(args.run, args.allow_plugins)
    for name, rates in validate_run(run, args.checkpoint, args.device, args.batches):
        shown = [f"{rate.replace('_', ' ')} {value:.4f}" for rate, value in rates.items()]
        print(f"{name}: {' · '.join(shown)}", flush=True)
    return 0
