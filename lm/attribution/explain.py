"""A text and one of its output tokens, explained by the methods asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

from torch import Tensor

from mixerlab.data import TextTokenizer
from mixerlab.lm.attribution.mamba_lrp import mamba_lrp, other_mixers
from mixerlab.lm.attribution.page import Passage, quoted, shown
from mixerlab.lm.attribution.paths import influence_by_hops, shares
from mixerlab.lm.attribution.relevance import Relevance, gradient_times_input, integrated_gradients
from mixerlab.lm.memory.influence import mixer_inputs
from mixerlab.lm.model.decoder import Decoder
from mixerlab.mixers import Mixer
from mixerlab.mixers.sessa import Sessa
from mixerlab.options import ConfigError, show

METHODS = {
    "gradient": "gradient times input",
    "integrated": "integrated gradients",
    "lrp": "relevance by MambaLRP",
    "paths": "paths through Sessa's feedback",
}
MOST_TOKENS = 2048
"""Of a text: path sums take memory that grows with the square of the length."""
HOPS = 4
"""Numbers of hops, from 0, that are shown one by one."""
MOST_MISSING = 0.01
"""Of the score less the baseline's: integrated gradients that lack more come with a warning."""
RELEVANCE = "red: for the token; blue: against it"
INFLUENCE = "the redder, the more of it reaches the last position"


def choose_methods(decoder: Decoder, names: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    """Those asked for, or all that the decoder's mixers have. Raises ConfigError where they have not what is asked.

    `names` are those of the mixers in the recipe, repeated over depth.
    """
    others = other_mixers(decoder, names)
    has_paths = any(_has_paths(block.mixer) for block in decoder.layers)
    if asked is None:
        return ["gradient", "integrated", *(["lrp"] if not others else []), *(["paths"] if has_paths else [])]
    if "lrp" in asked and others:
        raise ConfigError(
            f"--method lrp: its rules are Mamba's, and the run has {', '.join(others)}; expected gradient or "
            "integrated, which work for every mixer"
        )
    if "paths" in asked and not has_paths:
        raise ConfigError(
            "--method paths: the run has no layer of Sessa with feedback; expected gradient or integrated, which work "
            "for every mixer"
        )
    return list(dict.fromkeys(asked))


def relevance_method(
    name: str, tokenizer: TextTokenizer, steps: int
) -> Callable[[Decoder, Tensor, int], Relevance]:
    """What gives each token its relevance, by the name of the method; "paths" does not."""
    if name == "integrated":
        return partial(integrated_gradients, baseline=tokenizer.eod_id, steps=steps)
    return {"gradient": gradient_times_input, "lrp": mamba_lrp}[name]


def tokens_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    """The token ids of a text. Raises ConfigError."""
    ids = _encoded(tokenizer, "--text", text)
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise ConfigError(
            f"--text: it has {len(ids)} {'token' if len(ids) == 1 else 'tokens'}; expected 2 to {MOST_TOKENS}"
        )
    return ids


def one_token(tokenizer: TextTokenizer, text: str) -> int:
    """The token that a text is. Raises ConfigError where it is several, or none."""
    ids = _encoded(tokenizer, "--target", text)
    if len(ids) != 1:
        pieces = ", ".join(quoted(shown(tokenizer.pieces[i])) for i in ids)
        raise ConfigError(f"--target {show(text)}: it is {len(ids)} tokens ({pieces}); expected one")
    return ids[0]


def _encoded(tokenizer: TextTokenizer, option: str, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line's bytes, as Python keeps those that are no text
        raise ConfigError(f"{option} {show(text)}: it is not UTF-8; expected text") from None
    return tokenizer.encode(text)


def passages(
    decoder: Decoder,
    tokenizer: TextTokenizer,
    input_ids: Tensor,
    target: int,
    methods: Sequence[str],
    steps: int,
) -> list[Passage]:
    """What each method says of the token `target` after input_ids (T,)."""
    found: list[Passage] = []
    for name in methods:
        if name == "paths":
            found += _paths(decoder, input_ids)
            continue
        relevance = relevance_method(name, tokenizer, steps)(decoder, input_ids, target)
        rest = {
            "gradient": "which they need not add up to",
            "integrated": f"a text of nothing but ends of documents {relevance.rest:.4g}, missing {relevance.gap:.2g}",
            "lrp": f"the biases {relevance.rest:.4g}, missing {relevance.gap:.2g}",
        }[name]
        sentence = f"score {relevance.score:.4g}: tokens {float(relevance.tokens.sum()):.4g}, {rest}"
        warning = ""
        if name == "integrated" and abs(relevance.gap) > MOST_MISSING * abs(relevance.score - relevance.rest):
            warning = (
                f"what is missing is more than {MOST_MISSING:.0%} of what the tokens should add up to, so do not trust "
                f"them; expected a larger --steps than {steps}"
            )
        found.append(Passage(METHODS[name], sentence, RELEVANCE, relevance.tokens.tolist(), warning))
    return found


def _paths(decoder: Decoder, input_ids: Tensor) -> list[Passage]:
    """For each layer of Sessa, what reaches the last position; on the page also by number of hops."""
    found = []
    inputs = mixer_inputs(decoder, input_ids[None])
    for layer, (block, x) in enumerate(zip(decoder.layers, inputs, strict=True), 1):
        if not _has_paths(block.mixer):
            continue
        by_hops = influence_by_hops(block.mixer, x[0])  # (K, H, T)
        share = shares(by_hops).tolist()
        several = ", ".join(f"{k}: {part:.0%}" for k, part in enumerate(share[:HOPS]))
        mean = sum(k * part for k, part in enumerate(share))
        sentence = f"hops through feedback {several}, more: {sum(share[HOPS:]):.0%}; on average {mean:.2f}"
        title = f"layer {layer} sessa, influence on the last position, routing held"
        found.append(Passage(title, sentence, INFLUENCE, by_hops.sum(0).abs().mean(0).tolist()))
        for k, one in enumerate(by_hops[:HOPS]):
            about = f"{share[k]:.1%} of the influence"
            values = one.abs().mean(0).tolist()
            found.append(Passage(f"layer {layer} sessa, hops: {k}", about, INFLUENCE, values, page_only=True))
    return found


def _has_paths(mixer: Mixer) -> TypeGuard[Sessa]:
    """Of a class derived from Sessa it is not known."""
    return type(mixer) is Sessa and mixer.sessa.feedback
