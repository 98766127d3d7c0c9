"""Makes Triton's interpreter round to bfloat16 as GPUs do, to the nearest, ties to even (it truncates), multiply
matrices of bfloat16 as such (it takes their bits for integers), and run larger or fewer programs, because each costs
it 10 ms.

This changes Triton's internals, so it is for tests only. It raises an error where a version of Triton lacks them.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from crl_kernels.backends.triton import chunks, weight_gradients

_convert = interpreter._convert_float


def _convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << 16
    return _convert(values, source, target, rounding)


_dot = interpreter.InterpreterBuilder.create_dot


def _create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
    def as_float32(matrix: Any) -> Any:
        if matrix.dtype.scalar != tl.bfloat16:
            return matrix
        bits = matrix.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    return _dot(self, as_float32(a), as_float32(b), *arguments)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
chunks.BLOCK = 4096
weight_gradients.PROGRAMS = 4
