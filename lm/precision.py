"""Training with bf16 weights."""

from __future__ import annotations

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lm.decoder import no_decay_parameters


class BF16Weights(MixedPrecision):
    """bf16-true: weights, gradients and optimiser state in bf16, but for the small sensitive parameters.

    Norms, biases, gains and decays (see `no_decay_parameters`) stay in float32: their updates are often smaller
    than bf16 can resolve. Autocast brings both kinds together in each product.
    """

    def __init__(self, device_type: str):
        super().__init__("bf16-mixed", device_type)

    def convert_module(self, module: nn.Module) -> nn.Module:
        to_bf16(module)
        return module


def to_bf16(module: nn.Module) -> None:
    """Casts the parameters of `module` to bf16 in place, the sensitive ones excepted."""
    kept = no_decay_parameters(module)
    for name, parameter in module.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
