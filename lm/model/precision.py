"""Training in low precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

from mixerlab.lm.model.decoder import spared_parameters


class BF16Mixed(MixedPrecision):
    """bf16-mixed: products in bf16, weights in float32. The step enters `forward_context` around forward passes."""

    def __init__(self, device_type: str):
        super().__init__("bf16-mixed", device_type)

    def train_step_context(self) -> AbstractContextManager:
        """Nothing: a step here holds backward passes and the optimiser too, which autocast must not reach."""
        return nullcontext()


class BF16Weights(BF16Mixed):
    """bf16-true: weights, gradients and optimiser state in bf16, but for the small sensitive parameters.

    Norms, biases, gains and decays (`keep_float32` of a mixer) stay in float32: their updates are often smaller
    than bf16 can resolve. Autocast brings both kinds together in each product.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        to_bf16(module)
        return module


def precision_plugin(precision: str, device_type: str) -> Precision:
    """Lightning's side of the recipe's `trainer.precision`."""
    kinds = {"bf16-mixed": BF16Mixed, "bf16-true": BF16Weights}
    return kinds[precision](device_type) if precision in kinds else Precision()


def to_bf16(module: nn.Module) -> None:
    """Casts the parameters of `module` to bf16 in place, the sensitive ones excepted."""
    kept = spared_parameters(module, "keep_float32")
    for name, parameter in module.named_parameters():
        if name not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
