"""The operator, forward and backward, beside what else computes it or costs as much."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.timing import Bench, Contestant, Measured, Part, Row, Sizes
from mixerlab.kernels.feedback import feedback_attention

FLOPS = {"forward": 2, "backward": 5, "both": 7}
"""In units of T^2 D per sequence."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def differentiated(function: Callable[..., Tensor], inputs: list[Tensor]) -> Contestant:
    for x in inputs:
        x.requires_grad_()
    gradient = torch.randn_like(inputs[2])
    return Contestant(lambda: function(*inputs), lambda y: torch.autograd.grad(y, inputs, gradient))


def feedback(bench: Bench, T: int, backend: str = "auto", dtype: torch.dtype = torch.bfloat16) -> Contestant:
    D = bench.sizes.width
    torch.manual_seed(0)
    B = bench.sizes.batch(T)
    inputs = [torch.randn(B, 1, T, D, device=bench.device, dtype=dtype) for _ in range(3)]
    gamma = 0.999 * torch.tanh(1 + torch.randn(B, 1, T, device=bench.device))
    return differentiated(partial(feedback_attention, backend=backend), [*inputs, gamma])


def configured(bench: Bench, T: int, **configuration: Any) -> Contestant:
    """The operator with other values of what kernels/feedback/triton/tiles.py leaves a GPU to choose."""
    from mixerlab.kernels.feedback.triton import tiles  # here: triton need not be installed

    contestant = feedback(bench, T, "triton")

    def forward() -> Tensor:
        with patch.multiple(tiles, **configuration):
            return contestant.forward()

    def backward(y: Tensor) -> Any:
        with patch.multiple(tiles, **configuration):
            return contestant.backward(y)

    return Contestant(forward, backward)


def other_configurations(T: int) -> dict[str, Callable[[Bench], Contestant]]:
    from mixerlab.kernels.feedback.triton import tiles

    return {
        "tiles of 128 x 256": partial(configured, T=T, HALF=tiles.WIDE),
        "dq of 2 panels at once": partial(configured, T=T, DQ_PANELS=2),
    }


def autocast_textbook(bench: Bench, T: int) -> Contestant:
    contestant = feedback(bench, T, "reference")

    def forward() -> Tensor:
        with torch.autocast(bench.device, torch.bfloat16):
            return contestant.forward()

    return Contestant(forward, contestant.backward)


def attention(bench: Bench, T: int, backend: SDPBackend) -> Contestant:
    sizes = bench.sizes
    shape = (sizes.batch(T), sizes.width // sizes.head_dim, T, sizes.head_dim)
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return differentiated(function, inputs)


def products(bench: Bench, T: int) -> Contestant:
    """2 N D FLOPs per column: T columns make the forward pass's 2 T^2 D per sequence, 2.5 T the backward pass's."""
    N, D, most = bench.sizes.batch(T) * T, bench.sizes.width, 8192
    left = torch.randn(N, D, device=bench.device, dtype=torch.bfloat16)
    right = torch.randn(D, most, device=bench.device, dtype=torch.bfloat16)
    out = torch.empty(N * most, device=bench.device, dtype=torch.bfloat16)

    def multiply(columns: int) -> None:
        for lo in range(0, columns, most):
            width = min(most, columns - lo)
            torch.mm(left, right[:, :width], out=out[: N * width].view(N, width))

    return Contestant(lambda: multiply(T), lambda _: multiply(5 * T // 2))


# ---- DeltaFormer (arXiv 2505.19488): u_t = v_t - beta_t * sum_{j<t} alpha_tj u_j is this operator, gamma = -beta ----


def our_heads(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    """All (B, T, H, ...), as the package has them."""
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    return feedback_attention(q, k, v, -beta).transpose(1, 2)


def their_heads(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.deltaformer.parallel import ParallelDeltaformerFunction

    return ParallelDeltaformerFunction.apply(q, k, v, beta, 512, None)


def deltaformer(bench: Bench, T: int, function: Callable[..., Tensor]) -> Contestant:
    sizes = bench.sizes
    torch.manual_seed(0)
    shape = (sizes.batch(T), T, sizes.width // sizes.head_dim, sizes.head_dim)
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3)]
    inputs.append(torch.rand(shape[:3], device=bench.device, dtype=torch.bfloat16))  # beta
    with torch.no_grad():
        found, expected = function(*inputs).float(), our_heads(*inputs).float()
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 3e-2, f"it computes something else: relative error {error:.2g}"
    return differentiated(function, inputs)


# ---- rows ----


def heading(bench: Bench) -> str:
    sizes = bench.sizes
    columns = "".join(f" | {name:>10}, ms {'TFLOP/s':>8} {'share':>6}" for name in FLOPS)
    return (
        f"feedback attention, D = {sizes.width}, N = {sizes.tokens} or T if more, one head; share of matrix products\n"
        f"{'T':>6} {'':>24}{columns} | {'tokens/s':>9} | peak, MiB: forward, backward"
    )


def line(bench: Bench, T: int, result: Measured, floor: Measured | None) -> str:
    N = bench.sizes.batch(T) * T
    text = ""
    for i, flops in enumerate(FLOPS.values()):
        ms = result.milliseconds[i]
        share = f"{floor.milliseconds[i] / ms:.1%}" if floor else "-"
        text += f"| {ms:>14.3f} {flops * N * T * bench.sizes.width / ms / 1e9:>8.3g} {share:>6} "
    peaks = [bench.mebibytes(peak) for peak in result.peaks[:2]]
    return text + f"| {1e3 * N / result.milliseconds[2]:>9.3g} | {peaks[0]:>18} {peaks[1]:>9}"


def rows(sizes: Sizes) -> list[Row]:
    found = []
    for T in sizes.lengths:
        contestants: dict[str, Callable[[Bench], Contestant]] = {
            "matrix products": partial(products, T=T),
            "this operator": partial(feedback, T=T),
            **{f"attention ({name})": partial(attention, T=T, backend=kind) for name, kind in SDPA.items()},
            "chunked": partial(feedback, T=T, backend="chunked"),
            "textbook, bf16 autocast": partial(autocast_textbook, T=T),
            "textbook, float32": partial(feedback, T=T, backend="reference", dtype=torch.float32),
        }
        if torch.cuda.is_available():
            contestants |= other_configurations(T)
        if torch.cuda.is_available() and find_spec("fla") is not None:
            heads = f"{sizes.width // sizes.head_dim} heads"
            contestants[f"this operator, {heads}"] = partial(deltaformer, T=T, function=our_heads)
            contestants[f"DeltaFormer, {heads}"] = partial(deltaformer, T=T, function=their_heads)
        floor: list[Measured] = []

        def measure(
            bench: Bench,
            make: Callable[[Bench], Contestant],
            is_floor: bool,
            T: int = T,
            floor: list[Measured] = floor,
        ) -> str:
            result = bench.measure(partial(make, bench))
            if is_floor:
                floor.append(result)
            return line(bench, T, result, floor[0] if floor else None)

        for name, make in contestants.items():
            found.append(
                Row(f"{T:>6} {name:>24}", partial(measure, make=make, is_floor=name == "matrix products"))
            )
    return found


PART = Part(heading, rows, guess=4)
