"""The optimiser and its learning-rate schedule."""

import math

import torch
from torch import nn

from mixerlab.lm.model.decoder import spared_parameters
from mixerlab.lm.recipe.schema import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: with weight decay, and without for norms, biases and the mixers' own."""
    spared = spared_parameters(model, "no_decay")
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name not in spared], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name in spared], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def lr_factor(step: int, total: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `step` out of `total`, as a share of the peak.

    Linear warm-up; then cosine down to `final_lr_ratio`, or constant, or constant with a linear fall in the
    last `decay_fraction` of the steps (wsd).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.final_lr_ratio
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd":
        falling = max(1, round(config.decay_fraction * total))
        return floor + (1 - floor) * min(1.0, max(0, total - step) / falling)
    return 1.0
