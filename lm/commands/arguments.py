"""Arguments that several commands take."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, runs/<recipe name>/<run>")


def add_allow_plugins(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-plugins",
        action="store_true",
        help="import the modules that the recipe of a run folder names as plug-ins: only if you trust who made it",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="last", help="which weights: last, best or a step (default: %(default)s)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="default: %(default)s")


def at_least(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite number of at least `least` and at most `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf or value > most:
            limit = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text}: expected at least {least}{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _device(text: str) -> str:
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if (
        device is None
        or device.type not in ("cpu", "cuda")
        or (device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()))
    ):
        raise argparse.ArgumentTypeError(f"{text}: expected cpu or cuda")
    return str(device)
