"""One step of decoding beside what the released layer does."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu.timing import Bench, Contestant, Part, Row, Sizes
from mixerlab.kernels.feedback import feedback_attention


def our_step(q: Tensor, f: Tensor, gamma: Tensor, k: Tensor, s: Tensor, length: Tensor) -> Tensor:
    return feedback_attention(q, q, f, gamma, past=(k, s), past_length=length)


def gathered_step(q: Tensor, f: Tensor, gamma: Tensor, k: Tensor, s: Tensor, length: Tensor) -> Tensor:
    index = torch.arange(k.shape[2], device=q.device)[:, None].expand(k.shape)
    keys, states = k.gather(2, index), s.gather(2, index)
    logits = torch.einsum("bhtk,bhlk->bhtl", q, keys) * q.shape[-1] ** -0.5
    alpha = logits.softmax(-1, dtype=torch.float32).to(states.dtype)
    return f + (gamma[..., None] * torch.einsum("bhtl,bhlp->bhtp", alpha, states)).to(f.dtype)


def decoding(bench: Bench, B: int, L: int, step: Callable[..., Tensor]) -> Contestant:
    D = bench.sizes.width
    torch.manual_seed(0)
    shapes = ((B, 1, 1, D), (B, 1, 1, D), (B, 1, 1), (B, 1, L, D), (B, 1, L, D))
    inputs = [torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for shape in shapes]
    length = torch.full((B,), L, device=bench.device)
    found = step(*inputs, length).float()
    truth = our_step(*[x.float() for x in inputs], length)  # type: ignore[call-arg]
    error = ((found - truth).norm() / truth.norm()).item()
    assert error < 2e-2, f"{step.__name__} computes something else: relative error {error:.2g}"
    return bench.replayed(partial(step, *inputs, length))


def copying(bench: Bench) -> Contestant:
    source = torch.zeros(bench.sizes.copied, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return Contestant(lambda: target.copy_(source))


def heading(bench: Bench) -> str:
    return (
        f"decoding one position, D = {bench.sizes.width}, one head, bf16; share of the rate of copying\n"
        f"{'B':>4} {'L':>6} {'':>24} {'us':>10} {'tokens/s':>10} {'GB/s':>8} {'share':>6}"
    )


def rows(sizes: Sizes) -> list[Row]:
    copied: list[float] = []  # bytes per second, read and written

    def copy(bench: Bench) -> str:
        ms = bench.measure(partial(copying, bench)).milliseconds[0]
        copied.append(2e3 * sizes.copied / ms)
        return f"{1e3 * ms:>10.1f} {'':>10} {copied[0] / 1e9:>8.4g} {'':>6}"

    @torch.no_grad()
    def measure(bench: Bench, B: int, L: int, step: Callable[..., Tensor]) -> str:
        ms = bench.measure(partial(decoding, bench, B, L, step)).milliseconds[0]
        rate = 2e3 * B * L * sizes.width * torch.bfloat16.itemsize / ms
        share = f"{rate / copied[0]:.0%}" if copied else "-"
        return f"{1e3 * ms:>10.1f} {1e3 * B / ms:>10.3g} {rate / 1e9:>8.4g} {share:>6}"

    steps = {"this operator": our_step, "gather, softmax, einsum": gathered_step}
    return [Row(f"{'':>4} {'':>6} {'copying':>24}", copy)] + [
        Row(f"{B:>4} {L:>6} {name:>24}", partial(measure, B=B, L=L, step=step))
        for B, L in sizes.caches
        for name, step in steps.items()
    ]


PART = Part(heading, rows, guess=3)
