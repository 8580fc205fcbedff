"""What test_feedback_accuracy.py runs in a process of its own: the kernels' errors where roundings add up.

With gains of both signs and routing that differs from row to row, errors cancel. Here gains are constant and close to
their bound, and rows attend alike: each block of rows adds to the same error. On a GPU, else in Triton's interpreter.

Letters: T positions, W width of keys and values.
"""

import math
import os
import statistics
from contextlib import contextmanager, nullcontext

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mixerlab.kernels.feedback import feedback_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16 = torch.bfloat16, torch.float16
NAMES = ["s", "dq", "dk", "df", "dgamma"]

if INTERPRETED:
    import interpreter

    interpreter.mend()


# ---- routing: q and k (T, W) ----


def recent(T: int, W: int) -> tuple[Tensor, Tensor]:
    """Most weight on the last few positions: logits 16 * mean of cos(frequency * lag)."""
    frequencies = 0.5 ** torch.linspace(0, math.log2(T), W // 2)
    angles = torch.arange(T)[:, None] * frequencies
    waves = torch.cat(
        [angles.cos(), angles.sin()], dim=1
    )  # of which rows t and j have the sum of cos((t - j) * f)
    return 16 * W**0.5 / (W // 2) * waves, waves


def previous(T: int, W: int) -> tuple[Tensor, Tensor]:
    """Nearly all weight on the position before: the same, 3 times as sharp."""
    q, k = recent(T, W)
    return 3 * q, k


def prefix(T: int, W: int) -> tuple[Tensor, Tensor]:
    """Most weight on the first 4 positions, noise elsewhere."""
    q, k = 0.3 * torch.randn(2, T, W)
    q[:, 0], k[:, 0] = 6 * W**0.5, 0
    k[:4, 0] = 1
    return q, k


def repeated(T: int, W: int) -> tuple[Tensor, Tensor]:
    """8 keys in random order: a row's logits have 8 values, whose roundings are the same in many columns."""
    keys = torch.nn.functional.normalize(torch.randn(8, W), dim=1)
    return 4 * W**0.5 * keys[torch.randint(8, (T,))], keys[torch.randint(8, (T,))]


ROUTINGS = [recent, previous, prefix, repeated]


# ---- errors ----


def make_inputs(routing, gain: float, T: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """q, k, f (1, 1, T, 32), gamma (1, 1, T), and weights of s in a loss."""
    torch.manual_seed(seed)
    q, k = routing(T, 32)
    f, weights = torch.randn(2, T, 32)
    q, k, f, weights = (x[None, None].to(DEVICE, dtype) for x in (q, k, f, weights))
    return [q, k, f, torch.full((1, 1, T), gain, device=DEVICE), weights]


def results(inputs: list[Tensor], backend: str) -> list[Tensor]:
    """s and the gradients of <s, weights> by q, k, f, gamma."""
    *leaves, weights = (x.detach().requires_grad_() for x in inputs)
    s = feedback_attention(*leaves, backend=backend)
    return [s.detach(), *torch.autograd.grad((s * weights).sum(), leaves)]


@contextmanager
def exact_products():
    """Of float32 numbers, whatever a kernel asks for; only in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "truncate_to_tf32", lambda x: x)
        yield


def medians(routing, gain: float, T: int, dtype: torch.dtype, *, seeds=5) -> list[list[float]]:
    """For each of NAMES, the RMS error relative to float64, median over seeds: of the kernels, of the kernels with
    exact products (on a GPU, the same), and of the textbook composition, which rounds logits to the inputs' dtype.
    """
    errors = []  # (seed, one of the three, name)
    for seed in range(seeds):
        inputs = make_inputs(routing, gain, T, dtype, seed)
        truth = results([x.double() for x in inputs], "reference")
        with exact_products() if INTERPRETED else nullcontext():
            exact = results(inputs, "triton")
        runs = [results(inputs, "triton"), exact, results(inputs, "reference")]
        errors.append(
            [
                [float((a.double() - b).norm() / b.norm()) for a, b in zip(run, truth, strict=True)]
                for run in runs
            ]
        )
    return [[statistics.median(x) for x in zip(*of_run, strict=True)] for of_run in zip(*errors, strict=True)]


# ---- the bars ----


def cases():
    """Where errors are largest comes first; the rest is slow."""
    for routing in ROUTINGS:
        for gain in (0.999, -0.999, 0.99, -0.99):
            yield pytest.param(routing, gain, 512, BF16, marks=() if abs(gain) == 0.999 else pytest.mark.slow)
    for routing in (recent, previous):
        yield pytest.param(routing, 0.999, 1024, BF16, marks=pytest.mark.slow)
        for gain in (0.999, -0.999):
            yield pytest.param(routing, gain, 512, FP16, marks=pytest.mark.slow)


@pytest.mark.parametrize(("routing", "gain", "T", "dtype"), list(cases()))
def test_error_is_near_that_of_exact_products_and_of_the_textbook(routing, gain, T, dtype):
    eps = torch.finfo(dtype).eps
    for name, our, exact, textbook in zip(NAMES, *medians(routing, gain, T, dtype), strict=True):
        report = f"{name}: {our:.2g}, with exact products {exact:.2g}, the textbook's {textbook:.2g}"
        assert our <= max(1.5 * exact, eps / 2), report
        assert our <= max(1.2 * textbook, 4 * eps), report


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_cuts_operands_of_tf32_as_a_tensor_core_does():
    x = torch.full((16, 16), 1 + 2**-10 + 2**-11)
    products = {}
    for precision in ("ieee", "tf32"):
        y = torch.empty(16, 16)
        square_kernel[(1,)](x, y, PRECISION=precision)
        products[precision] = float(y[0, 0])
    expected = {"ieee": 16 * (1 + 2**-10 + 2**-11) ** 2, "tf32": 16 * (1 + 2**-10) ** 2}
    assert products == pytest.approx(expected, rel=1e-6)


@triton.jit
def square_kernel(x, y, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    numbers = tl.load(x + at)
    tl.store(y + at, tl.dot(numbers, numbers, input_precision=PRECISION))
