"""mixerlab checkpoints: a run's checkpoints listed, checked, and rewritten as one file or as shards."""

import argparse
from collections.abc import Sequence

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_run, at_least

EXAMPLES = """
examples:
  mixerlab checkpoints runs/quickstart/RUN                            list them, and check every byte
  mixerlab checkpoints runs/quickstart/RUN --to one-file              join the shards of the last
  mixerlab checkpoints runs/quickstart/RUN --to sharded --shards 4    cut it into four

Every command reads either kind, on any number of processes; rewriting is for tools of your own.
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab checkpoints",
        description="List and check a run's checkpoints, or rewrite one as one file or as shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--to", choices=["one-file", "sharded"], help="rewrite in place (default: only list)")
    parser.add_argument("--shards", type=at_least(int, 1), default=2, help="default: %(default)s")
    add_checkpoint(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)

    from mixerlab.lm.run.checkpoint import find_damage, read_meta, reshard
    from mixerlab.lm.run.folder import Run
    from mixerlab.sealed import noted_damage

    run = Run.open(args.run, args.allow_plugins)
    checkpoints = run.checkpoints
    if args.to is not None:
        with run.lock():
            checkpoints.clear()
            reshard(checkpoints.named(args.checkpoint), args.shards if args.to == "sharded" else None)
    best, damaged = checkpoints.best(), 0
    for noted in noted_damage(run.path):
        print(f"damaged: {noted}")
        damaged = 1
    for folder in checkpoints.all():
        if (problem := find_damage(folder)) is not None:
            print(f"{folder}: damaged: {problem}")
            damaged = 1
            continue
        meta = read_meta(folder)
        megabytes = sum(size for size, _ in meta["files"].values()) / 1e6
        loss = "" if meta.get("valid_loss") is None else f", validation loss {meta['valid_loss']:.4f}"
        kind = "one file" if list(meta["files"]) == ["state.ckpt"] else f"{len(meta['files'])} shards"
        print(f"{folder}: {kind}, {megabytes:.1f} MB, whole{loss}{', the best' if folder == best else ''}")
    return damaged
