"""What is done to a decoder for speed and memory."""

from __future__ import annotations

import torch
import torch._dynamo

from lm.config import TrainerConfig
from lm.decoder import Decoder


def parallelize(decoder: Decoder, config: TrainerConfig) -> None:
    """Applies activation checkpointing and compilation to each block, in place.

    In place keeps the names in the state dict; a wrapper would add `_orig_mod` to them.
    """
    decoder.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        # Every kind of mixer, and training and validation, is a graph of its own of the blocks' one method.
        kinds = len({type(block.mixer) for block in decoder.layers})
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * kinds)
        for block in decoder.blocks:
            block.compile()
