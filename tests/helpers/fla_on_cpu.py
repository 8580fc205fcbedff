"""Kernels of flash-linear-attention in Triton's interpreter; to be imported before fla, where TRITON_INTERPRET is 1.

Autotuning would time configurations on a GPU. Loops count in tensors on a GPU, and in Python's numbers here; some masks
are numbers too. torch.compile would trace the interpreter.
"""

import builtins
import sys

import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle, _implicit_cvt

import interpreter


class Counter(int):
    """A number that can be cast as a tensor; what is computed of it with others is one too."""

    def to(self, dtype):
        return _implicit_cvt(int(self)).to(dtype)

    def __add__(self, other):
        return counter(super().__add__(other))

    def __sub__(self, other):
        return counter(super().__sub__(other))

    def __mul__(self, other):
        return counter(super().__mul__(other))


def counter(result):
    return Counter(result) if isinstance(result, int) else result  # else NotImplemented


def counted(*bounds):
    numbers = (int(b.handle.data.item()) if hasattr(b, "handle") else int(b) for b in bounds)
    return map(Counter, builtins.range(*numbers))


def with_boolean_mask(function, place):
    def wrapped(self, *arguments):
        given = list(arguments)
        given[place] = TensorHandle(given[place].data.astype(bool), tl.int1)
        return function(self, *given)

    return wrapped


interpreted = InterpreterBuilder.binary_op


def binary_op(self, a, b, op):
    """Of bfloat16 it would be one of the bits."""
    if a.dtype.scalar != tl.bfloat16:
        return interpreted(self, a, b, op)
    result = interpreted(self, *(interpreter.cast(self, x, tl.float32) for x in (a, b)), op)
    if result.data.dtype == bool:
        return TensorHandle(result.data, tl.bfloat16)
    return interpreter.cast(self, result, tl.bfloat16)


Autotuner._bench = lambda self, *args, config, **options: [1.0] * 3
InterpreterBuilder.create_masked_load = with_boolean_mask(InterpreterBuilder.create_masked_load, 1)
InterpreterBuilder.create_masked_store = with_boolean_mask(InterpreterBuilder.create_masked_store, 2)
GridExecutor.__call__ = torch.compiler.disable(GridExecutor.__call__)
InterpreterBuilder.binary_op = binary_op
interpreter.mend()

import fla.layers  # noqa: E402, F401

for name, module in list(sys.modules.items()):
    if name.startswith(("fla.ops", "fla.modules")):
        vars(module)["range"] = counted
