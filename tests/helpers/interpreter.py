"""Mends of Triton's interpreter, so that its numbers are a GPU's; to be imported only where TRITON_INTERPRET is 1.

Unmended it rounds to bfloat16 towards 0, multiplies the bits of two bfloat16 numbers as if they were integers,
multiplies float32 numbers exactly where a tensor core (sm_80, sm_90) reads them as TF32, and has exact exponentials.
"""

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

interpreted_cast, interpreted_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def mend() -> None:
    """For the rest of the process."""
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    InterpreterBuilder.create_exp2 = exp2
    InterpreterBuilder.create_exp = lambda self, x: exp2(
        self, TensorHandle(x.data * np.float32(1.4426950408889634), x.dtype.scalar)
    )


def cast(self, x, dtype):
    pair = (x.dtype.scalar, dtype.scalar)
    if pair == (tl.float32, tl.bfloat16):
        data = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16)
        return TensorHandle(data.numpy().view(np.uint16), tl.bfloat16)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
    return interpreted_cast(self, x, dtype)


def dot(self, a, b, d, precision, *rest):
    if a.dtype.scalar == tl.bfloat16:
        a, b = cast(self, a, tl.float32), cast(self, b, tl.float32)
    elif a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        a, b = truncate_to_tf32(a), truncate_to_tf32(b)
    return interpreted_dot(self, a, b, d, precision, *rest)


def truncate_to_tf32(x):
    """Without its low 13 bits, which a tensor core does not read: it does not round them."""
    bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32), tl.float32)


def exp2(self, x):
    """As ex2.approx may err: by 2^-22, either way, but not at 0 and -inf."""
    wrong = np.where(x.data.view(np.uint32) & 1, 1 + 2.0**-22, 1 - 2.0**-22)
    exact = np.exp2(x.data.astype(np.float64))
    return TensorHandle((exact * np.where(x.data == 0, 1, wrong)).astype(np.float32), x.dtype.scalar)
