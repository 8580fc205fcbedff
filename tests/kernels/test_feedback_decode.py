"""The Triton kernels for one new position. Their numbers are checked by feedback_decode_kernels.py, in a process of its
own.

Letters: B batch, H heads, L cached positions, K key width, P value width.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahead_of_time import compile_launch, distinct, record
from mixerlab.kernels import backend
from mixerlab.kernels.feedback import feedback_attention

ROOT = Path(__file__).parents[2]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_numbers_agree_on_a_gpu_or_else_in_the_interpreter():
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    tests = Path(__file__).with_name("feedback_decode_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(tests)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    print(done.stdout)  # what was skipped, and why


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with the launches of what runs in the test, on the CPU."""
    pytest.importorskip("triton")
    from mixerlab.kernels.feedback.triton import decode

    monkeypatch.setattr(backend, "INTERPRETED", True)
    return record(decode, monkeypatch)


def step(K=16, P=16, *, B=2, H=2, L=100, dtype=BF16, length=True, spread=1):
    """One new position; each number of the inputs has `spread` places in memory."""
    q, f, gamma, k_past, s_past = (
        torch.zeros(*shape, spread, dtype=dtype)[..., 0]
        for shape in ((B, H, 1, K), (B, H, 1, P), (B, H, 1), (B, H, L, K), (B, H, L, P))
    )
    past_length = torch.full((B,), L // 2) if length else None
    past = (k_past, s_past)
    feedback_attention(q, q, f, gamma.float(), past=past, past_length=past_length, backend="triton")


def test_two_launches_spread_over_positions_heads_and_rows(launches):
    step(1024, 1024, B=3, H=2, L=8192)
    assert [(launch.name, launch.grid) for launch in launches] == [
        ("attend_kernel", (256, 6)),
        ("combine_kernel", (32, 6)),
    ]


@pytest.mark.parametrize(
    ("L", "blocks", "size"),
    [
        (1, 1, 32),
        (16384, 512, 32),
        (16385, 257, 64),
        (65536, 512, 128),
        (200_000, 391, 512),
        (262_144, 512, 512),
        (262_145, 513, 512),
    ],
)
def test_blocks_grow_with_the_cache(L, blocks, size, launches):
    step(16, 16, B=1, H=1, L=L)
    assert launches[0].grid == (blocks, 1)
    assert [launch.arguments["BLOCK"] for launch in launches] == [size, size]


def test_a_longer_cache_of_as_large_blocks_compiles_nothing(launches):
    def compiled(**options):
        launches.clear()
        step(64, 64, **options)
        return {repr(launch.compiled_in()) for launch in launches}

    assert compiled(L=100) == compiled(L=101) == compiled(L=16384) == compiled(L=33, B=5)
    assert compiled(L=16385) == compiled(L=32768) != compiled(L=16384)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_compiles_ahead_of_time_without_spills(dtype, architecture, launches, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    widths = (
        16,
        32,
        64,
        128,
        256,
        1024,
        4096,
        100,
        300,
        1000,
    )  # all chunks that can be picked, and ragged ones
    for width in widths if dtype != FP16 else (64, 1024):  # which differs from bfloat16 in conversions alone
        step(width, width, dtype=dtype)
    step(16, 4096, dtype=dtype)
    step(4096, 16, dtype=dtype)
    step(1024, 1024, dtype=dtype, length=False)
    step(1024, 1024, dtype=dtype, spread=2)
    step(1024, 1024, dtype=dtype, B=1, H=1)
    for L in (32768, 65536, 131_072, 262_144) if dtype != FP16 else ():  # the other sizes of blocks
        for width in (64, 1024, 100):
            step(width, width, dtype=dtype, B=1, H=1, L=L)
        step(256, 256, dtype=dtype, B=1, H=1, L=L, spread=2)
    loads_ahead = False
    for launch in distinct(launches):
        binary = compile_launch(launch, architecture, tmp_path)
        assert binary.spilled == 0, f"{binary.spilled} bytes of registers spill: {launch.compiled_in()}"
        assert binary.shared <= 80 * 1024, f"{binary.shared} bytes: {launch.compiled_in()}"  # two fit
        loads_ahead |= launch.name == "attend_kernel" and "cp.async.cg" in binary.ptx
    assert loads_ahead
