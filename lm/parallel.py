"""What is done to a decoder for speed and memory, without its knowing."""

from __future__ import annotations

from lm.config import TrainerConfig
from lm.decoder import Decoder


def parallelize(decoder: Decoder, config: TrainerConfig) -> None:
    """Applies activation checkpointing and compilation to each block, in place.

    In place keeps the names in the state dict; a wrapper would add `_orig_mod` to them.
    """
    decoder.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        for block in decoder.blocks:
            block.compile()
