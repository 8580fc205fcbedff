"""The Triton kernels for one new position. Their numbers are checked by feedback_decode_kernels.py, in a process of its
own.

Letters: B batch, H heads, L cached positions, K key width, P value width.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.feedback import feedback_attention
from kernels.feedback import fused as operators

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int64: "*i64"}


def test_numbers_agree_on_a_gpu_or_else_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    tests = Path(__file__).with_name("feedback_decode_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(tests)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    print(done.stdout)  # what was skipped, and why


class Recorder:
    """Stands for a kernel, and notes what it is launched with instead of running it."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            arguments = {name: named.pop(name) for name in self.kernel.arg_names}
            self.launches.append((self.kernel, grid, arguments, named))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with the launches (kernel, grid, arguments, options) of what runs in the test, on the CPU."""
    pytest.importorskip("triton")
    from kernels.feedback import decode

    recorded: list[tuple] = []
    monkeypatch.setattr(operators, "_INTERPRETED", True)
    for name in ("attend_kernel", "combine_kernel"):
        monkeypatch.setattr(decode, name, Recorder(getattr(decode, name), recorded))
    return recorded


def step(K=16, P=16, *, B=2, H=2, L=100, dtype=BF16, length=True, spread=1):
    """One new position; each number of the inputs has `spread` places in memory."""
    q, f, gamma, k_past, s_past = (
        torch.zeros(*shape, spread, dtype=dtype)[..., 0]
        for shape in ((B, H, 1, K), (B, H, 1, P), (B, H, 1), (B, H, L, K), (B, H, L, P))
    )
    past_length = torch.full((B,), L // 2) if length else None
    past = (k_past, s_past)
    feedback_attention(q, q, f, gamma.float(), past=past, past_length=past_length, backend="triton")


def specialised(parameter, value) -> bool:
    return isinstance(value, int) and not parameter.is_constexpr and not parameter.do_not_specialize


def test_two_launches_spread_over_positions_heads_and_rows(launches):
    step(1024, 1024, B=3, H=2, L=8192)
    assert [(kernel.fn.__name__, grid) for kernel, grid, *_ in launches] == [
        ("attend_kernel", (256, 6)),
        ("combine_kernel", (32, 6)),
    ]


def test_a_longer_cache_compiles_nothing(launches):
    def compiled(**options):
        """What the kernels are specialised on, beside dtypes."""
        launches.clear()
        step(64, 64, **options)
        return {
            (kernel.fn.__name__, p.name, arguments[p.name])
            if p.is_constexpr
            else (kernel.fn.__name__, p.name, arguments[p.name] == 1, arguments[p.name] % 16 == 0)
            for kernel, _, arguments, _ in launches
            for p in kernel.params
            if p.is_constexpr or specialised(p, arguments[p.name])
        }

    assert compiled(L=100) == compiled(L=101) == compiled(L=4096) == compiled(L=33, B=5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_compiles_ahead_of_time_without_spills(dtype, architecture, launches, monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    widths = (16, 32, 64, 128, 256, 1024, 4096, 100, 1000)  # all chunks that can be picked, and ragged ones
    for width in widths if dtype != FP16 else (64, 1024):  # which differs from bfloat16 in conversions alone
        step(width, width, dtype=dtype)
    step(16, 4096, dtype=dtype)
    step(4096, 16, dtype=dtype)
    step(1024, 1024, dtype=dtype, length=False)
    step(1024, 1024, dtype=dtype, spread=2)
    step(1024, 1024, dtype=dtype, B=1, H=1)
    loads_ahead = False
    for kernel, _, arguments, options in launches:
        constants, types, aligned = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            name, value = parameter.name, arguments[parameter.name]
            if parameter.is_constexpr or (specialised(parameter, value) and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name] = TYPES[value.dtype]
                aligned[(position,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                types[name] = "i32"
                if specialised(parameter, value) and value % 16 == 0:
                    aligned[(position,)] = [["tt.divisibility", 16]]
            else:
                types[name] = "fp32"
        compiled = triton.compile(
            ASTSource(kernel, types, constants, aligned),
            target=GPUTarget("cuda", architecture, 32),
            options=options,
        )
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
        resources = {name: int(value) for name, value in re.findall(r"(STACK|LOCAL):(\d+)", usage)}
        assert resources == {"STACK": 0, "LOCAL": 0}, f"registers spill: {constants}: {usage}"
        assert compiled.metadata.shared <= 80 * 1024, (
            f"{compiled.metadata.shared} bytes: {constants}"
        )  # two fit
        loads_ahead |= kernel.fn.__name__ == "attend_kernel" and "cp.async.cg" in compiled.asm["ptx"]
    assert loads_ahead
