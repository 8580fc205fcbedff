"""mixerlab attribute: which tokens of a text counted for the next one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixerlab.lm.commands.arguments import add_allow_plugins, add_checkpoint, add_device, add_run, at_least

if TYPE_CHECKING:
    from mixerlab.data import TextTokenizer
    from mixerlab.lm.model.decoder import Decoder
    from mixerlab.lm.run.folder import Run

EXAMPLES = """
examples:
  mixerlab attribute runs/quickstart/RUN --text "def area(width, height):"      of the likeliest next token
  mixerlab attribute runs/quickstart/RUN --text "for i in range(10):" --at 3    of the token after token 3, from 0
  mixerlab attribute runs/quickstart/RUN --text "import " --target os
  mixerlab attribute runs/quickstart/RUN --faithfulness                         do the methods find what matters?
"""

ROW = 64
"""Tokens of a row of validation text whose tokens are deleted."""
FEWEST = 8
"""Such rows: an interval from fewer says little."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mixerlab attribute",
        description="Show which tokens of a text counted for the next one: coloured, as a page of HTML and as CSV.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    about = parser.add_mutually_exclusive_group(required=True)
    about.add_argument("--text", help="the text itself")
    about.add_argument(
        "--faithfulness",
        nargs="?",
        const=32,
        type=at_least(int, FEWEST),
        metavar="ROWS",
        help="delete the most relevant tokens of rows of validation text, and random ones (default: %(const)s rows)",
    )
    parser.add_argument(
        "--at", type=int, metavar="N", help="the number, from 0, of the token before it (default: the last)"
    )
    parser.add_argument(
        "--target", metavar="TOKEN", help="default: the text's next token; at its end the likeliest"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=["gradient", "integrated", "lrp", "paths"],
        help="gradient times input, integrated gradients, MambaLRP (Mamba), path sums (Sessa); default: all that fit",
    )
    parser.add_argument(
        "--steps",
        type=at_least(int, 2, 4096),
        default=64,
        help="of integrated gradients (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="default: the folder `attribution` of the run")
    add_checkpoint(parser)
    add_device(parser)
    add_allow_plugins(parser)
    args = parser.parse_args(arguments)
    return _faithfulness(args) if args.text is None else _text(args)


def _text(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from mixerlab.lm.attribution import page
    from mixerlab.lm.attribution.explain import choose_methods, one_token, passages, tokens_of
    from mixerlab.lm.run.results import results_in
    from mixerlab.options import ConfigError

    run, decoder, tokenizer = _opened(args)
    methods = choose_methods(decoder, _names(run), args.method)
    ids = tokens_of(tokenizer, args.text)
    last = len(ids) - 1
    at = last if args.at is None else args.at
    if not 0 <= at <= last:
        raise ConfigError(f"--at {at}: the text has {len(ids)} tokens; expected 0 to {last}")
    input_ids = torch.tensor(ids[: at + 1], device=args.device)
    if args.target is not None:
        target, kind = one_token(tokenizer, args.target), "asked for"
    elif at < last:
        target, kind = ids[at + 1], "in the text"
    else:
        with torch.no_grad():
            target, kind = int(decoder(input_ids[None])[0, -1].argmax()), "the likeliest"
    folder = args.out or run.path / "attribution"
    with results_in(folder):  # before the work: it may not be writable
        pass

    found = passages(decoder, tokenizer, input_ids, target, methods, args.steps)
    rows = decoder.embedding.num_embeddings
    pieces = [*tokenizer.pieces, *[b""] * (rows - tokenizer.vocab_size)]  # an embedding may be padded
    words = page.words_of([pieces[i] for i in ids[: at + 1]])
    title = f"What counted for {page.quoted(page.shown(pieces[target]))}, {kind} after token {at}"
    tokens = [page.shown(pieces[i]) for i in ids[: at + 1]]
    with results_in(folder):
        (folder / "attribution.html").write_text(page.page(title, words, found), encoding="utf-8")
        (folder / "attribution.csv").write_text(page.table(tokens, found), encoding="utf-8", newline="")
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(title)
    for passage in found:
        if not passage.page_only:
            console.print(f"\n{passage.title}", style="bold")
            console.print(passage.sentence)
            if passage.warning:
                console.print(f"warning: {passage.warning}", style="bold yellow")
            console.print(passage.legend)
            console.print(page.coloured(words, passage))
            console.print(f"most: {page.strongest(words, passage)}")
    console.print(f"\n2 files in {folder}; open {folder / 'attribution.html'}")
    return 0


def _faithfulness(args: argparse.Namespace) -> int:
    import torch

    from mixerlab.lm.attribution.explain import METHODS, choose_methods, relevance_method
    from mixerlab.lm.attribution.faithfulness import DELETED, faithfulness
    from mixerlab.lm.memory.subject import run_subject
    from mixerlab.options import ConfigError

    for option in ("at", "target", "out"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--{option}: it is for --text; --faithfulness takes rows of validation text")
    if "paths" in (args.method or []):
        raise ConfigError(
            "--method paths: it says what reaches a layer's output, and not how relevant that is; with --faithfulness "
            "expected gradient, integrated or lrp"
        )
    run, decoder, tokenizer = _opened(args)
    looked_at = run_subject(
        run, length=ROW, sequences=args.faithfulness, checkpoint=args.checkpoint, device=args.device
    )
    rows = looked_at.tokens.to(args.device)
    n, T = rows.shape
    if n < FEWEST or T < 3:
        raise ConfigError(
            f"--faithfulness: the run's validation split has {n} rows of {T} tokens; expected {FEWEST} of 3"
        )
    print(
        f"{looked_at.label} ({n} x {T} tokens: {looked_at.about}): how far the likeliest next token's score falls when "
        f"{DELETED:.0%} of the tokens are deleted"
    )
    for name in choose_methods(decoder, _names(run), args.method):
        if name != "paths":
            method = relevance_method(name, tokenizer, args.steps)
            found = faithfulness(decoder, rows, method, torch.Generator().manual_seed(0))
            print(
                f"  {METHODS[name]}: {found.chosen:.3f} for the most relevant, {found.random:.3f} for random ones; "
                f"difference {found.difference:.3f} ± {found.error:.3f} (95%)"
            )
    return 0


def _names(run: Run) -> list[str]:
    """Of the mixers in the recipe."""
    from mixerlab.lm.recipe.check import mixers_of

    return [mixer.name for mixer in mixers_of(run.recipe)]


def _opened(args: argparse.Namespace) -> tuple[Run, Decoder, TextTokenizer]:
    """The run, its decoder in float64, since rounding would show in what must add up, and its tokenizer.

    Raises ConfigError.
    """
    from mixerlab.lm.run.folder import Run
    from mixerlab.options import ConfigError

    run = Run.open(args.run, args.allow_plugins)
    # Fused kernels, which the recipe may name, know neither a CPU nor float64.
    decoder = run.decoder(args.checkpoint, args.device, auto_backends=True).double()
    tokenizer, rows = run.tokenizer(), decoder.embedding.num_embeddings
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"run folder {run.path}: its tokenizer has {tokenizer.vocab_size} tokens, and its decoder {rows}; they are "
            "of different runs"
        )
    if not all(bool(weight.isfinite().all()) for weight in decoder.parameters()):
        raise ConfigError(
            f"--checkpoint {args.checkpoint}: not all weights of {run.path} are finite there, so nothing can be "
            "explained; expected another step"
        )
    return run, decoder, tokenizer
