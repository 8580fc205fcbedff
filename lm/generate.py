"""Text from a trained run: python -m lm.generate RUN --prompt "def " --max-new-tokens 200

Letters: B prompts, V vocabulary.
"""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lm.config import ConfigError
from lm.decoder import Decoder
from mixers import State


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Continues prompts of any lengths, one token each at a time.

    Args:
        decoder: in evaluation mode.
        prompts: B lists of at least one token id.
        max_new_tokens: how many tokens to add to each.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples from the smallest set of tokens whose probabilities sum to at least this.
        seed: of the sampling; the same seed and prompts give the same tokens.

    Yields:
        (B,) int64, the next token of each prompt.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    device = decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    max_len = max(len(prompt) for prompt in prompts) + max_new_tokens

    def extend(ids: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        # Entered anew for each token: a context held across a yield would leak into the caller.
        low = decoder.embedding.weight.dtype == torch.bfloat16
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits, states = decoder.extend(ids.to(device), states)
            return logits[:, -1], states  # (B, V)

    # Prompts of different lengths are read apart, so that none sees padding; then they go on together.
    read = [extend(torch.tensor([list(prompt)]), decoder.init_state(1, max_len)) for prompt in prompts]
    logits = torch.cat([last for last, _ in read])  # (B, V)
    states = [type(layer[0]).cat(layer) for layer in zip(*(states for _, states in read), strict=True)]
    for i in range(max_new_tokens):
        token = sample(logits, temperature, top_p, generator)  # (B,)
        yield token
        if i + 1 < max_new_tokens:
            logits, states = extend(token[:, None], states)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row: logits (B, V) -> (B,) int64 on the CPU. Nucleus sampling of arXiv 1904.09751."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot overflow
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)  # (B, V)
    before = probabilities.cumsum(-1) - probabilities  # the mass of likelier tokens: 0 for the first
    probabilities[before >= top_p] = 0
    choice = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return order.gather(-1, choice)[:, 0]


def stream_texts(decoder: Decoder, tokenizer, prompts: Sequence[str], **options) -> Iterator[tuple[int, str]]:
    """Generates for several text prompts at once; yields (prompt's number, new piece of text).

    A prompt ends at the end-of-document token. An empty prompt starts a new document. Pieces hold whole
    characters: bytes of one that is not complete yet wait for the rest.
    """
    ids = [tokenizer.encode(prompt) or [tokenizer.eod_id] for prompt in prompts]
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    running = [True] * len(prompts)
    for tokens in generate(decoder, ids, **options):
        for i, token in enumerate(tokens.tolist()):
            if running[i] and token == tokenizer.eod_id:
                running[i] = False
            elif running[i] and (text := decoders[i].decode(tokenizer.decode_bytes([token]))):
                yield i, text
        if not any(running):
            break
    for i, rest in enumerate(decoders):
        if text := rest.decode(b"", final=True):
            yield i, text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lm.generate", description="Generate text from a trained run."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, runs/<recipe name>/<run id>")
    parser.add_argument(
        "--prompt", action="append", help="text to continue; repeat for several (default: a new document)"
    )
    parser.add_argument("--max-new-tokens", type=_at_least(int, 1), default=200, help="default: %(default)s")
    parser.add_argument(
        "--temperature",
        type=_at_least(float, 0),
        default=0.8,
        help="0: always the likeliest (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p", type=_share, default=0.95, help="probability mass to sample from (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--checkpoint", default="last", help="which weights: last, best or a step (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        type=device_argument,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    args = parser.parse_args(arguments)

    from lm.run import load_decoder, load_run_tokenizer  # after --help: reading runs imports the data stack

    try:
        decoder, _ = load_decoder(args.run, args.device, args.checkpoint)
        tokenizer = load_run_tokenizer(args.run)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    prompts = args.prompt or [""]
    pieces = stream_texts(
        decoder,
        tokenizer,
        prompts,
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


def _at_least(kind: type, least: int):
    def parse(text: str):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {least}")
        return value

    parse.__name__ = kind.__name__
    return parse


def device_argument(text: str) -> str:
    try:
        return str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: expected cpu or cuda") from None


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected above 0 and at most 1")
    return value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
