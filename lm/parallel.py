"""What is done to a decoder for speed and memory."""

from __future__ import annotations

import ctypes
import sys

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


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next tensor; for training on a CPU.

    By default it gives tensors of 32 MiB and more back to the kernel at once, which then clears every page of the
    next one (docs/benchmarks.md, growth of Mamba-2). Does nothing where there is no glibc.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)
