"""mixerlab export: a run as a folder of transformers."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_run

DESCRIPTION = """\
Write a run's weights and tokenizer as a folder that transformers reads, and whatever reads its folders.

Where transformers has the architecture (Llama, Mistral, Qwen2, Qwen3, Mamba, Mamba-2, Bamba), the folder needs nothing
else; any other decoder goes with a modeling file that imports mixerlab. Before the folder has its name, transformers
has read it and given the same logits and tokens."""

EXAMPLES = """
examples:
  mixerlab export runs/quickstart/RUN --to exported
  mixerlab export runs/quickstart/RUN --to exported --format native    or say which option prevents it
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="the folder to write, new or empty"
    )
    parser.add_argument(
        "--format",
        choices=["auto", "native", "remote"],
        default="auto",
        help="native: an architecture of transformers; remote: code that imports mixerlab; auto: native if it can be",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="bytes of a file of weights, such as 500MB; what is more goes into several (default: %(default)s)",
    )
    add_checkpoint(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)

    from mixerlab.lm.exchange.export import export
    from mixerlab.lm.run.folder import Run

    run = Run.open(args.run, args.allow_plugins)
    print(export(run, args.to, args.format, args.checkpoint, args.max_shard_size))
    return 0


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 500MB or 5GB")
    return text
