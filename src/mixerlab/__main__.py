"""The command line: mixerlab VERB ..., or python -m mixerlab VERB ..."""

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

if "OMP_WAIT_POLICY" not in os.environ:
    # Where torch brings GNU OpenMP, a thread that waits keeps its core busy for a millisecond; beside other work, the
    # thread that it waits for may need that core. Read when torch is loaded, here and in the processes started here.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

VERBS = {
    "train": "train a model from a recipe",
    "sweep": "train a recipe with every combination of some values",
    "report": "compare the runs of a sweep: tables, a picture and a page of HTML",
    "generate": "generate text from a trained run",
    "validate": "validate a trained run on its own data",
    "evaluate": "score a trained run on tasks of lm-evaluation-harness",
    "describe": "what a recipe costs: parameters, FLOPs, decoding state",
    "convert": "make a run folder from a published checkpoint",
    "export": "make a folder for transformers from a trained run",
    "memory": "how far back a run or a recipe remembers: influence against lag",
    "attribute": "which tokens of a text counted for the next one",
    "checkpoints": "list, check and rewrite a run's checkpoints",
    "keys": "list every key of a recipe",
}
"""A file of lm/commands each."""


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {about}" for verb, about in VERBS.items()]
    first = ["usage: mixerlab VERB ...", "", "Train decoders whose token mixer is one word in a recipe.", ""]
    return "\n".join([*first, *lines, "", "mixerlab VERB --help says more of each."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code. What the user can mend is said in one line, with exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    verb, *rest = given or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb == "--version":
        print(f"mixerlab {version('mixerlab')}")
        return 0
    if verb not in VERBS:
        from mixerlab.options import one_of

        print(f"error: no verb {verb!r}; {one_of(verb, VERBS)}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"mixerlab.lm.commands.{verb}").main, rest)


def run(command, *arguments) -> int:
    """A command's exit code, its errors made messages."""
    from mixerlab.options import UserError

    try:
        code = command(*arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 128 + signal.SIGPIPE
    except ValueError as error:
        from mixerlab.kernels.backend import BackendError

        if not isinstance(error, (UserError, BackendError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
