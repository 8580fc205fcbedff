"""What test_feedback_accuracy.py runs in a process of its own: the kernels' errors where roundings add up.

With gains of both signs and routing that differs from row to row, errors cancel. Here gains are constant and close to
their bound, and rows attend alike: each block of rows adds to the same error. On a GPU, else in Triton's interpreter.

Letters: T positions, W width of keys and values.
"""

import math
import os
import statistics
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from mixerlab.kernels.feedback import feedback_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TF32_EPS = 2**-10
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
    """Products of float32 numbers without TF32, in every kernel launched."""
    kind = InterpretedFunction if INTERPRETED else JITFunction
    launch, precisions = kind.run, []

    def run(kernel, *args, **options):
        if "PRECISION" in options:
            precisions.append(options["PRECISION"])
            options["PRECISION"] = "ieee"
        return launch(kernel, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", run)
        yield
    assert precisions  # else nothing was exact


def medians(routing, gain: float, T: int, dtype: torch.dtype, *, seeds=5, others=True) -> list[list[float]]:
    """For each of NAMES, the RMS error relative to float64 of the kernels, median over seeds; and, as `others`, of the
    kernels with exact products and of the textbook composition (which rounds logits to the inputs' dtype).
    """
    errors = []  # (seed, one of the three, name)
    for seed in range(seeds):
        inputs = make_inputs(routing, gain, T, dtype, seed)
        truth = results([x.double() for x in inputs], "reference")
        runs = [results(inputs, "triton")]
        if others:
            with exact_products():
                runs.append(results(inputs, "triton"))
            runs.append(results(inputs, "reference"))
        errors.append(
            [
                [float((a.double() - b).norm() / b.norm()) for a, b in zip(run, truth, strict=True)]
                for run in runs
            ]
        )
    return [[statistics.median(x) for x in zip(*of_run, strict=True)] for of_run in zip(*errors, strict=True)]


@pytest.fixture
def tf32_allowed():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


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


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize(
    ("routing", "gain"),
    [
        (previous, 0.999),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(previous, -0.999), (recent, 0.999)]),
    ],
)
def test_error_of_float32_inputs_where_tf32_is_allowed(routing, gain):
    [ours] = medians(routing, gain, 256, FP32, seeds=3, others=False)  # slow to interpret
    assert max(ours) <= 8 * TF32_EPS, dict(zip(NAMES, ours, strict=True))
