"""From a checkpoint to a decoder that it fits. The state may be a stranger's: of any shape, and none of it trusted."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixerlab.data import TextTokenizer
from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.recipe.load import differing_keys
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.options import ConfigError, first_line, plain

PREFIX = "decoder."


def decoder_of(recipe: Recipe, state: dict[str, Any], folder: Path) -> Decoder:
    """The recipe's decoder with the weights of the checkpoint in `folder`. Raises ConfigError if they do not fit."""
    found = state.get("state_dict")
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in (found if isinstance(found, dict) else {}).items()
        if isinstance(name, str) and name.startswith(PREFIX) and isinstance(value, Tensor)
    }
    embedding = weights.get("embedding.weight")
    if embedding is None or embedding.ndim != 2:
        raise ConfigError(f"checkpoint {folder}: it holds no weights of a decoder")
    try:
        # Compared without memory first, for the recipe may ask for any amount; and the depth before that, for each
        # block takes time.
        if recipe.model.n_layers > len(weights):
            raise RuntimeError(
                f"model.n_layers = {recipe.model.n_layers} needs more than its {len(weights)} tensors"
            )
        with torch.device("meta"):
            build_decoder(recipe, len(embedding)).load_state_dict(weights, assign=True)
        decoder = build_decoder(recipe, len(embedding))
        if recipe.trainer.precision == "bf16-true":
            to_bf16(decoder)
        decoder.load_state_dict(weights)
    except RuntimeError as error:  # torch lists every name; the first is enough
        lines = [line.strip() for line in str(error).splitlines()]
        problem = lines[1] if len(lines) > 1 else first_line(error)
        raise ConfigError(f"checkpoint {folder} does not fit the recipe's decoder: {problem}") from None
    return decoder


def check_model(checkpoint: Path, recipe: Recipe) -> None:
    """Raises ConfigError where a checkpoint is of another model than the recipe's, as one copied by mistake."""
    saved = read_meta(checkpoint).get("recipe")
    if saved is None:
        return
    if not isinstance(saved, dict) or "model" not in saved:
        raise ConfigError(f"checkpoint {checkpoint}: its meta.json names no model in its recipe")
    now = _as_far_as(saved["model"], plain(recipe)["model"])
    differing = list(differing_keys(saved["model"], now, "model"))
    if differing:
        listed = "; ".join(f"{key} is {a!r} there and {b!r} in the recipe" for key, a, b in differing)
        raise ConfigError(f"checkpoint {checkpoint} is of another recipe: {listed}. Remove it from this run")


def _as_far_as(known: Any, tree: Any) -> Any:
    """The part of `tree` that an older version, which had fewer options, knew."""
    if isinstance(known, dict) and isinstance(tree, dict):
        return {key: _as_far_as(value, tree.get(key)) for key, value in known.items()}
    if isinstance(known, list) and isinstance(tree, list) and len(known) == len(tree):
        return [_as_far_as(a, b) for a, b in zip(known, tree, strict=True)]
    return tree


def check_tokens(path: Path, tokenizer: TextTokenizer, decoder: Decoder) -> None:
    """Raises ConfigError where a run's tokenizer has tokens that its decoder has no row for."""
    rows = decoder.embedding.num_embeddings
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"run folder {path}: its tokenizer has {tokenizer.vocab_size} tokens, and its decoder {rows}; "
            "they are of different runs"
        )
