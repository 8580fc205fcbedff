"""mixerlab evaluate: a run's scores on tasks of lm-evaluation-harness."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_device, add_run, at_least
from mixerlab.lm.parallel.interrupts import end_with_parent

EXAMPLES = """
examples:
  mixerlab evaluate runs/fineweb-125m/RUN --tasks hellaswag,lambada_openai,wikitext
  mixerlab evaluate runs/quickstart/RUN --tasks mine --include-path tasks      mine.yaml is in that folder
  mixerlab evaluate runs/fineweb-125m/RUN --tasks 'mmlu_*' --num-fewshot 5 --devices 8
  torchrun --nproc-per-node 8 -m mixerlab evaluate runs/fineweb-125m/RUN --tasks hellaswag
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab evaluate",
        description="Score a trained run on tasks of lm-evaluation-harness, or on your own of the same form. "
        "The scores go to the folder `evaluation` of the run, as JSON and for TensorBoard, and to reports of sweeps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument(
        "--tasks", type=_names, required=True, metavar="NAME,...", help="tasks, groups or tags; * fits any"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="a folder with tasks of your own")
    parser.add_argument(
        "--num-fewshot",
        type=at_least(int, 0),
        metavar="N",
        help="examples before each question, where the task leaves that open",
    )
    parser.add_argument(
        "--limit", type=at_least(int, 1), metavar="N", help="the first N documents of each task, for a try"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(int, 1),
        default=16,
        metavar="N",
        help="texts at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=at_least(int, 1),
        metavar="N",
        help="tokens that are read at once; what is longer loses its beginning (default: a row of the training)",
    )
    add_checkpoint(parser)
    add_device(parser)
    parser.add_argument(
        "--devices",
        type=_devices,
        default="auto",
        metavar="N",
        help="processes that share the texts, a device each (default: every GPU, or one CPU process)",
    )
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)
    end_with_parent()

    from mixerlab.lm.parallel.launch import launch
    from mixerlab.lm.run.folder import Run
    from mixerlab.options import UserError, first_line

    run = Run.open(args.run, args.allow_plugins)
    _check_extra()
    world = launch(_strategy(args), [sys.executable, "-P", "-m", "mixerlab", "evaluate", *arguments])
    world.advice = "Nothing was written; evaluate again"
    failed = True
    try:
        _evaluate(run, args, world)
        failed = False
    except Exception as error:
        world.tell_end(2 if isinstance(error, UserError) else 1, first_line(error))
        if world.rank and isinstance(error, UserError):
            return 2  # rank 0 says it
        raise
    finally:
        world.close(failed)
    return 0


def _evaluate(run: Any, args: argparse.Namespace, world: Any) -> None:
    import pandas as pd
    from rich.console import Console

    from mixerlab.lm.evaluation.evaluate import evaluate
    from mixerlab.lm.run.scores import FOLDER
    from mixerlab.lm.sweep.report import print_table
    from mixerlab.lm.training.loggers import TensorBoard

    found = evaluate(
        run,
        args.tasks,
        checkpoint=args.checkpoint,
        device=_device(args.device, world),
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        max_length=args.max_length,
        world=world,
    )
    if found is None:
        return
    board = TensorBoard(run.path / FOLDER, 0)
    board.log_metrics(found.metrics, found.step)
    board.finalize("success")
    rows = [
        {
            "task": task,
            "metric": metric,
            "score": f"{value:.4f}",
            "standard error": f"{noted['errors'][metric]:.4f}" if metric in noted["errors"] else "",
            "better": "higher" if noted["higher_is_better"][metric] else "lower",
            "examples": str(noted["num_fewshot"] or 0),
            "documents": str(noted["documents"] or ""),
        }
        for task, noted in found.tasks.items()
        for metric, value in noted["scores"].items()
    ]
    print_table(pd.DataFrame(rows), Console(emoji=False))
    if found.cut:
        print(
            f"{found.cut} of {found.requests} texts had more than {found.max_length} tokens and lost their beginning; "
            "--max-length says how many are read"
        )
    print(f"step {found.step}: {found.file}")


def _check_extra() -> None:
    from mixerlab.options import ConfigError

    if find_spec("lm_eval") is None:
        raise ConfigError(
            "mixerlab evaluate: No module named 'lm_eval'; expected it installed: pip install 'mixerlab[eval]'"
        )


def _strategy(args: argparse.Namespace) -> Any:
    """How many processes, on what. Raises ConfigError."""
    from mixerlab.lm.recipe.schema import StrategyConfig
    from mixerlab.options import ConfigError

    kind, _, number = args.device.partition(":")
    if number and args.devices not in ("auto", 1):
        raise ConfigError(
            f"--device {args.device}: it is one, but --devices is {args.devices}; expected cuda"
        )
    devices = 1 if number else args.devices
    # Others wait while the first downloads, of which nothing is heard.
    return StrategyConfig(accelerator="gpu" if kind == "cuda" else "cpu", devices=devices, timeout=4 * 3600.0)


def _device(asked: str, world: Any) -> str:
    """That of this process, made ready. Raises ConfigError."""
    import os

    import torch

    from mixerlab.options import ConfigError

    if world.size == 1:
        return asked
    if asked == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.devices))
        return asked
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {world.rank}: it should have GPU {world.local_rank} of its machine, but sees "
            f"{torch.cuda.device_count()}; start as many processes a machine as it has GPUs"
        )
    torch.cuda.set_device(world.local_rank)  # for kernels, which run on the current one
    return f"cuda:{world.local_rank}"


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected names with commas between them")
    return names


def _devices(text: str) -> str | int:
    return text if text == "auto" else int(at_least(int, 1)(text))
