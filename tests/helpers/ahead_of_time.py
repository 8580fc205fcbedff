"""What a Triton operator launches, and what its kernels compile to, on a machine without a GPU."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def specialised(self) -> list[str]:
        """The integer arguments of which triton compiles in whether they are 1 or multiples of 16."""
        return [
            p.name
            for p in self.kernel.params
            if isinstance(self.arguments[p.name], int) and not (p.is_constexpr or p.do_not_specialize)
        ]

    def compiled_in(self) -> dict[str, Any]:
        """What a compiled kernel depends on, beside the types of its arguments."""
        constants = {
            p.name: self.arguments[p.name]
            for p in self.kernel.params
            if p.is_constexpr or self.arguments[p.name] is None
        }
        integers = {name: self.arguments[name] for name in self.specialised()}
        hints = {name: (value == 1, value % 16 == 0) for name, value in integers.items()}
        return {"kernel": self.name, **constants, **hints, **self.options}


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            arguments = {name: named.pop(name) for name in self.kernel.arg_names}
            self.launches.append(Launch(self.kernel, grid, arguments, named))

        return launch


def record(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """A list that fills with the launches of the module's kernels, which no longer run."""
    launches: list[Launch] = []
    for name in dir(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, _Recorder(getattr(module, name), launches))
    return launches


class _Nothing:
    def __init__(self, kernel: Any):
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def leave_out(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's kernels no longer run, and what they were to be given is not kept as `record` keeps it."""
    for name in dir(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, _Nothing(getattr(module, name)))


@dataclass(frozen=True)
class Binary:
    shared: int  # bytes of shared memory
    spilled: int  # bytes of a thread's registers that lie in memory
    ptx: str


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    options: dict[str, Any],
    folder: Path,
    aligned: tuple[int, ...] = (),
) -> Binary:
    """Compiles for compute capability `architecture`; `aligned` are the positions of multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hints = {(position,): [["tt.divisibility", 16]] for position in aligned}
    source = ASTSource(kernel, types, constants, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(size) for name, size in re.findall(r"(STACK|LOCAL|SHARED):(\d+)", usage)}
    return Binary(
        shared=max(found["SHARED"], compiled.metadata.shared),
        spilled=found["STACK"] + found["LOCAL"],
        ptx=compiled.asm["ptx"],
    )


def compile_launch(launch: Launch, architecture: int, folder: Path) -> Binary:
    """As triton would for the launch, whose tensors begin at multiples of 16 bytes."""
    types, constants, aligned = {}, {}, []
    specialised = launch.specialised()
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (name in specialised and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        else:
            types[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (name in specialised and value % 16 == 0):
            aligned.append(position)
    return compile_kernel(
        launch.kernel, types, constants, architecture, launch.options, folder, tuple(aligned)
    )


def distinct(launches: list[Launch]) -> list[Launch]:
    """One of the launches that share a compiled kernel, each."""
    found: dict[str, Launch] = {}
    for launch in launches:
        tensors = {n: v.dtype for n, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
        found.setdefault(repr((launch.compiled_in(), tensors)), launch)
    return list(found.values())
