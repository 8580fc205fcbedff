"""Tokens and text from a decoder, one position at a time.

Letters: B prompts, V vocabulary.
"""

import codecs
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.replay import ReplayedStep
from mixerlab.mixers import State


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
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}, temperature = {temperature}, top_p = {top_p}: expected at least 1, at "
            "least 0, and above 0 and at most 1"
        )
    device = decoder.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    max_len = max(len(prompt) for prompt in prompts) + max_new_tokens

    def extend(ids: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        # Entered anew for each token: a context held across a yield would leak into the caller.
        low = decoder.embedding.weight.dtype == torch.bfloat16
        # Nothing that autocast casts is kept from step to step: a CUDA graph must hold its own.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False)
        with torch.inference_mode(), autocast:
            logits, states = decoder.extend(ids.to(device), states)
            return logits[:, -1], states  # (B, V)

    # Prompts of different lengths are read apart, so that none sees padding; then they go on together.
    read = [extend(torch.tensor([list(prompt)]), decoder.init_state(1, max_len)) for prompt in prompts]
    logits = torch.cat([last for last, _ in read])  # (B, V)
    states = [type(layer[0]).cat(layer) for layer in zip(*(states for _, states in read), strict=True)]
    replayed = ReplayedStep(extend, states, max_len) if device.type == "cuda" else None
    for i in range(max_new_tokens):
        token = sample(logits, temperature, top_p, generator)  # (B,)
        yield token
        if i + 1 < max_new_tokens and replayed is not None:
            logits = replayed(token)
        elif i + 1 < max_new_tokens:
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
