"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, and compiled ahead of time.

Letters: B batch, T time, D channels, N state size per channel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahead_of_time import compile_kernel
from mixerlab.kernels.selective_scan import selective_scan

ROOT = Path(__file__).parents[2]


def worst_difference(shape, dtype, backend, device="cpu", packed=True) -> float:
    """Largest relative difference to the float64 recurrence, over outputs, last state and all gradients."""
    B, T, D, N = shape
    torch.manual_seed(0)
    x, dt = torch.randn(B, T, D), torch.rand(B, T, D) / 2
    A, D_skip = -torch.rand(D, N) * 3 - 0.1, torch.randn(D)
    B_in, C_out = torch.randn(2, B, T, N)
    h = torch.randn(B, D, N)
    ids = (torch.arange(T) // 5).expand(B, T) if packed else None
    weights = torch.randn(B, T, D)
    results = []
    for name, precision in ((backend, dtype), ("reference", torch.float64)):
        # x, B_in and C_out hold numbers that `dtype` can; the rest is float32 at least.
        low = [y.to(dtype).to(device, precision) for y in (x, B_in, C_out)]
        wide = torch.promote_types(precision, torch.float32)
        high = [y.to(device, wide) for y in (dt, A, D_skip, h)]
        leaves = [y.requires_grad_() for y in (*low, *high)]
        (x_, B_, C_), (dt_, A_, D_, h_) = low, high
        y, state = selective_scan(
            x_,
            dt_,
            A_,
            B_,
            C_,
            D_,
            initial_state=h_,
            segment_ids=None if ids is None else ids.to(device),
            return_state=True,
            backend=name,
        )
        loss = (y * weights.to(device)).sum() + state.square().sum()
        results.append([y, state, *torch.autograd.grad(loss, leaves)])
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def interpreted() -> None:
    """Runs in a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    from mixerlab.kernels.selective_scan import triton as kernels

    kernels.chunk_length = lambda D, N, device: 4  # several chunks, the last one ragged
    for packed in (False, True):
        for shape in ((1, 1, 3, 4), (2, 2, 17, 5), (2, 11, 20, 4)):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3)):
                difference = worst_difference(shape, dtype, "triton", packed=packed)
                assert difference < tolerance, f"{shape}, {dtype}, packed: {packed}: {difference:.3g}"


def test_equals_the_recurrence_with_all_gradients_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "tests" / "helpers")}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
@pytest.mark.parametrize("shape", [(2, 1, 48, 16), (2, 333, 48, 16), (1, 200, 40, 128)])
def test_equals_the_recurrence_with_all_gradients_on_a_gpu(shape, backend, dtype, tolerance, packed):
    assert worst_difference(shape, dtype, backend, "cuda", packed) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("N", [16, 64, 128])
@pytest.mark.parametrize("low", ["fp32", "bf16"])
def test_compiles_ahead_of_time_without_spills(name, N, low, architecture, tmp_path):
    pytest.importorskip("triton")
    from mixerlab.kernels.selective_scan import triton as kernels

    kernel = getattr(kernels, name)
    options = kernels.launch_options(N)
    constants = {"N": N, "M": 64, "BD": options["BD"], "BN": options["BN"], "HAS_RESETS": True}
    types = {"T": "i32", "D": "i32", "resets": "*u8"}
    types |= dict.fromkeys(("x", "B_in", "C_out"), f"*{low}") | dict.fromkeys(constants, "constexpr")
    signature = {a: types.get(a, "*fp32") for a in kernel.arg_names}
    binary = compile_kernel(
        kernel, signature, constants, architecture, {"num_warps": options["num_warps"]}, tmp_path
    )
    assert binary.spilled == 0
    assert binary.shared <= 48 * 1024  # of any GPU, for several programs


if __name__ == "__main__":
    interpreted()
