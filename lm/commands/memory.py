"""mixerlab memory: how strongly outputs depend on inputs, as a function of the lag between them."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_device, at_least

EXAMPLES = """
examples:
  mixerlab memory quickstart                                      at its initial values
  mixerlab memory quickstart --mixers sessa attention mamba2      side by side
  mixerlab memory runs/quickstart/RUN                             trained, on its validation text
  mixerlab memory runs/quickstart/RUN --text poem.txt
  mixerlab memory runs/quickstart/RUN runs/quickstart/OTHER --measure decoder
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab memory",
        description="Measure how strongly the output at t depends on the input at tau, against the lag t - tau, and "
        "fit the laws of its tail. Writes pictures, CSV and report.html.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "subjects",
        nargs="+",
        metavar="RUN_OR_RECIPE",
        help="run folders and recipes; key=value changes recipes",
    )
    parser.add_argument("--mixers", nargs="+", default=[], metavar="MIXER", help="a recipe with each of them")
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=["routing", "blocks", "decoder"],
        help="routing: each layer, its routing held; blocks, decoder: norms of Jacobians (default: routing decoder)",
    )
    parser.add_argument(
        "--text", type=Path, help="a file of UTF-8 text (default: a run's validation text, random tokens)"
    )
    parser.add_argument(
        "--length", type=at_least(int, 2), metavar="T", help="default: that of the recipe's rows"
    )
    parser.add_argument("--sequences", type=at_least(int, 1), default=4, help="default: %(default)s")
    parser.add_argument(
        "--seeds", type=at_least(int, 1), default=3, help="initial values of a recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--projections",
        type=at_least(int, 2),
        default=8,
        help="random projections of each Jacobian; as many as it is wide are exact (default: %(default)s)",
    )
    parser.add_argument(
        "--tail-from", type=at_least(int, 1), metavar="LAG", help="default: 1/16 of the longest"
    )
    parser.add_argument("--out", type=Path, help="default: the folder `memory` of the one run, or here")
    add_checkpoint(parser)
    add_device(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)

    from rich.console import Console

    from mixerlab.lm.memory import report
    from mixerlab.lm.memory.fits import fit
    from mixerlab.lm.memory.measure import measure
    from mixerlab.lm.memory.subject import subject
    from mixerlab.lm.run.results import results_in

    # argparse gives all that follows --mixers to it.
    overrides = [word for word in [*args.subjects, *args.mixers] if "=" in word and not Path(word).exists()]
    names = [word for word in args.subjects if word not in overrides]
    mixers = [word for word in args.mixers if word not in overrides]
    if not names:
        parser.error("expected a run folder or a recipe")
    options = {
        "text": None if args.text is None else _read(args.text),
        **{key: getattr(args, key) for key in ("length", "sequences", "seeds", "checkpoint", "device")},
    }
    measured, folder, console = [], None, Console(stderr=True)
    labels: Counter[str] = Counter()
    with console.status("") as status:
        for name in names:
            for mixer in mixers or [""]:
                chosen = [*overrides, *([f"model.mixer={mixer}"] if mixer else [])]
                looked_at = subject(name, chosen, args.allow_plugins, **options)
                if folder is None:  # before the work: it may not be writable
                    alone = looked_at.run if len(names) * len(mixers or [""]) == 1 else None
                    folder = args.out or (Path("memory") if alone is None else alone.path / "memory")
                    with results_in(folder):
                        pass
                labels[looked_at.label] += 1
                if (n := labels[looked_at.label]) > 1:
                    looked_at = replace(looked_at, label=f"{looked_at.label} ({n})")
                measures = args.measure or ["routing", "decoder"]
                measured.append(measure(looked_at, measures, args.projections, status.update))
    fits = [fit(curve, args.tail_from) for one in measured for curve in one.curves]
    assert folder is not None
    with results_in(folder):
        files = report.write(folder, measured, fits)
    judged = iter(fits)
    for one in measured:
        n, T = one.subject.tokens.shape
        print(f"{one.subject.label} ({n} x {T} tokens: {one.subject.about})")
        for curve in one.curves:
            print(f"  {report.sentence(curve, next(judged))}")
        if one.without:
            print(f"  no routing to hold: {', '.join(one.without)}")
    print(f"{len(files)} files in {folder}; open {files[-1]}")
    return 0


def _read(path: Path) -> str:
    from mixerlab.options import ConfigError

    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--text {path}: it is not UTF-8; expected a file of text") from None
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}; expected a file of text") from None
