"""The relevance rules of MambaLRP (Jafari et al., arXiv 2406.07592), for decoders whose mixers are all Mamba.

The forward pass is written anew, with the same values and another gradient: gradient times input is then the relevance,
and what goes into each operation comes out of it. Held, that is without a gradient, are the gates inside activations
(SiLU is x sigmoid(x)), the scales of norms, and the steps, B and C of the scan; of a product each factor gets one half.
What is left is linear in the embedded tokens and the biases together, so that their relevances add up to the score.

Letters: B batch, T time, D model width, E inner width of Mamba.
"""

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor, nn

from mixerlab.kernels.selective_scan import selective_scan
from mixerlab.lm.attribution.relevance import Relevance, direction
from mixerlab.lm.model.blocks import Block, GatedBlock, SwiGLU, TransformerBlock
from mixerlab.lm.model.decoder import Decoder
from mixerlab.mixers.convolution import causal_conv
from mixerlab.mixers.mamba import Mamba


@torch.enable_grad()
def mamba_lrp(decoder: Decoder, input_ids: Tensor, target: int) -> Relevance:
    """The relevance of each of the tokens (T,) for the score of `target` after them; the rest is the biases'.

    All mixers must be Mamba (`other_mixers`).
    """
    x = decoder.embedding(input_ids[None]).detach().requires_grad_()  # (1, T, D)
    y = x
    for block in decoder.layers:
        y = _block(block, y)
    value = _norm(decoder.norm, y)[0, -1] @ direction(decoder, target)
    biases = [p for name, p in decoder.named_parameters() if name.endswith(".bias")]
    gradient, *of_biases = torch.autograd.grad(value, [x, *biases], allow_unused=True)  # steps are held
    rest = sum(
        float((g * bias.detach()).sum()) for g, bias in zip(of_biases, biases, strict=True) if g is not None
    )
    return Relevance((gradient * x).sum(-1)[0].detach(), rest, value.item())


def other_mixers(decoder: Decoder, names: Sequence[str]) -> list[str]:
    """Of the mixers in the layers those that these rules do not know, by name.

    `names` are the recipe's, repeated over depth. A class derived from Mamba may have another forward pass.
    """
    layers = zip(decoder.layers, cycle(names), strict=False)
    return sorted({name for block, name in layers if type(block.mixer) is not Mamba})


def _block(block: Block, x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D)."""
    if isinstance(block, GatedBlock):
        a, g = block.in_proj(_norm(block.norm, x)).chunk(2, dim=-1)  # (B, T, D) each
        return x + block.out_proj(_product(_mix(block, _activation(a, torch.special.ndtr)), g))
    assert isinstance(block, TransformerBlock)
    x = x + block.out_proj(_mix(block, _norm(block.norm, x)))
    if block.mlp is None or block.mlp_norm is None:
        return x
    y = _norm(block.mlp_norm, x)
    if isinstance(block.mlp, SwiGLU):
        return x + block.mlp.down(_product(_activation(block.mlp.gate(y), torch.sigmoid), block.mlp.up(y)))
    return x + block.mlp.down(_activation(block.mlp.up(y), torch.special.ndtr))


def _mix(block: Block, x: Tensor) -> Tensor:
    """`Mamba.forward`, (B, T, D) -> (B, T, D)."""
    mixer = block.mixer
    assert isinstance(mixer, Mamba)
    x, z = mixer.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
    tail = mixer._no_tail(x)
    with torch.no_grad():
        _, selected, _ = mixer._select(x, tail, None)
    x = _activation(causal_conv(torch.cat((tail, x), dim=1), mixer.conv1d), torch.sigmoid)
    y = selective_scan(x, *selected, mixer.D, backend=mixer.config.backend)  # (B, T, E)
    return mixer.out_proj(_product(y, _activation(z, torch.sigmoid)))


def _activation(x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """SiLU with the gate `sigmoid`, GELU with that of the normal distribution."""
    return x * gate(x).detach()


def _product(a: Tensor, b: Tensor) -> Tensor:
    half = a * b / 2
    return half + half.detach()


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    assert norm.eps is not None
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps).detach()
    y = x * scale * norm.weight
    return y + norm.bias if isinstance(norm, nn.LayerNorm) else y
