"""The Triton kernels of feedback attention. Their numbers are checked by feedback_kernels.py, in a process of its own.

Letters: B batch, H heads, T new positions, L past positions, K key width, P value width.
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
from tests.kernels.test_feedback import peak_bytes

ROOT = Path(__file__).parents[2]
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


@pytest.mark.slow
def test_numbers_agree_on_a_gpu_or_else_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    file = str(Path(__file__).with_name("feedback_kernels.py"))
    # The interpreter runs on one core: two processes take about half the time.
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", part],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in ("textbook", "not textbook")
    ]
    reports = [run.communicate()[0] for run in runs]
    print(*reports)  # what was skipped, and why
    assert not any(run.returncode for run in runs), "".join(reports)


def test_without_a_gpu_the_backend_is_refused_with_the_reason():
    x, gamma = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match=r"'triton' cannot take this input: q is on device cpu.*chunked"):
        feedback_attention(x, x, x, gamma, backend="triton")


# ---- what is launched ----


class Recorder:
    """Stands for a kernel, and notes what it is launched with instead of running it."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            arguments = {name: named.pop(name) for name in self.kernel.arg_names}
            self.launches.append((self.kernel, arguments, named))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with the launches (kernel, arguments, options) of what runs in the test, on the CPU."""
    pytest.importorskip("triton")
    from kernels.feedback import triton as kernels

    recorded: list[tuple] = []
    monkeypatch.setattr(operators, "_INTERPRETED", True)
    for name in dir(kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), recorded))
    return recorded


def forward_and_backward(T, width=16, *, B=1, L=0, segments=False, dtype=torch.bfloat16, chunk_size=None):
    q, k, f = (torch.zeros(B, 1, T, width, dtype=dtype, requires_grad=True) for _ in range(3))
    gamma = torch.zeros(B, 1, T, requires_grad=True)
    past = (q.new_zeros(B, 1, L, width), q.new_zeros(B, 1, L, width)) if L else None
    ids = torch.zeros(B, T, dtype=torch.int64) if segments else None
    s = feedback_attention(
        q, k, f, gamma, past=past, segment_ids=ids, chunk_size=chunk_size, backend="triton"
    )
    s.sum().backward()


def test_memory_grows_linearly_and_the_panel_size_bounds_it(launches, tmp_path):
    def peak(T, chunk_size=None):
        return peak_bytes(lambda: forward_and_backward(T, chunk_size=chunk_size), tmp_path)

    assert peak(16384) < 2.02 * peak(8192) < 2.02**2 * peak(4096)
    assert peak(16384) < 16384 * 16384 * 2 / 10
    panel = 16384 * 2  # bytes of one row of a panel
    assert peak(16384, 512) - peak(16384, 128) > 0.9 * (512 - 128) * panel
    assert launches


def test_panels_shrink_where_many_sequences_would_make_them_large(launches):
    forward_and_backward(2048, B=200)
    sizes = {arguments["weights"].nbytes for _, arguments, _ in launches}
    assert max(sizes) <= 256 * 2**20


def test_a_new_length_compiles_nothing(launches):
    def compiled(T, **options):
        """What the kernels are specialised on, beside dtypes."""
        launches.clear()
        forward_and_backward(T, **options)
        keys = set()
        for kernel, arguments, launch_options in launches:
            key = [kernel.fn.__name__, *launch_options.items()]
            for parameter in kernel.params:
                value = arguments[parameter.name]
                if parameter.is_constexpr:
                    key.append((parameter.name, value))
                elif isinstance(value, int) and not parameter.do_not_specialize:
                    key.append((parameter.name, value == 1, value % 16 == 0))
            keys.add(tuple(key))
        return keys

    assert len(compiled(2048)) == 10
    assert compiled(2048) == compiled(2049) == compiled(3333)
    assert compiled(300) == compiled(1024)
    assert compiled(300, L=1) == compiled(600, L=129)


# ---- ahead of time ----


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "precision", "width"),
    [
        *((torch.bfloat16, "ieee", width) for width in (16, 32, 64, 100, 1024)),
        (torch.float16, "ieee", 1024),
        *((torch.float32, "ieee", width) for width in (16, 32, 100, 1024)),
        (torch.float32, "tf32", 1024),
    ],
    ids=str,
)
def test_compiles_ahead_of_time_without_spills(
    dtype, precision, width, architecture, launches, monkeypatch, tmp_path
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.feedback import triton as kernels

    monkeypatch.setattr(kernels, "product_precision", lambda: precision)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    forward_and_backward(600, width, dtype=dtype, segments=True)
    if width == 100:
        forward_and_backward(600, width, dtype=dtype)
        forward_and_backward(600, width, dtype=dtype, L=300)
    seen, matrix_units = set(), False
    for kernel, arguments, options in launches:
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
        types, aligned = dict.fromkeys(constants, "constexpr"), {}
        for position, (name, value) in enumerate(arguments.items()):
            if isinstance(value, torch.Tensor):
                types[name] = TYPES[value.dtype]
                aligned[(position,)] = [["tt.divisibility", 16]]
            elif name not in constants:
                types[name] = "i32" if isinstance(value, int) else "fp32"
        key = (kernel.fn.__name__, *types.items(), *constants.items(), *options.items())
        if key in seen:
            continue
        seen.add(key)
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
        assert resources == {"STACK": 0, "LOCAL": 0}, f"registers spill: {key}: {usage}"
        limit = {80: 163, 90: 227}[architecture] * 1024
        assert compiled.metadata.shared <= limit, f"{compiled.metadata.shared} bytes of shared memory: {key}"
        matrix_units |= "wgmma" in compiled.asm["ptx"]
    assert len({key[0] for key in seen}) == 9
    if architecture == 90 and dtype != torch.float32:
        assert matrix_units
