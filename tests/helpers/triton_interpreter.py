"""Makes Triton's interpreter round to bfloat16 as GPUs do, to the nearest, ties to even (it truncates), round a product
and a sum in ``fma`` once (it rounds twice), multiply matrices of bfloat16 as such (it takes their bits for integers),
reduce pairs quickly, and run larger or fewer programs, because each costs it 10 ms. With CRL_TEST_SLOW_FLOAT64=1,
kernels compute as on GPUs where float64 is slow.

This changes Triton's internals, so it is for tests only. It raises an error where a version of Triton lacks them.
"""

import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from crl_kernels.backends.triton import chunks, float64_arithmetic, weight_gradients

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


def _create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
    """Through float64, which holds a product of two float32."""
    with np.errstate(all="ignore"):
        wide = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(a.data.dtype), a.dtype.scalar)


def _reduce_by_halves(self: Any, tensors: Any) -> Any:
    """Of vectors, all pairs of a level at once; the interpreter calls the function for each element."""
    data = [tensor.handle.data for tensor in tensors]
    while (half := len(data[0]) // 2) > 0:
        parts = [d[part] for part in (slice(half), slice(half, None)) for d in data]
        types = [tensor.dtype for tensor in tensors] * 2
        sums = self.combine_fn.fn(*map(self.to_tensor, parts, types))
        data = [tensor.handle.data for tensor in sums]
    return [self.to_tensor(d.item(), tensor.dtype) for d, tensor in zip(data, tensors, strict=True)]


_patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    """numpy 2.4 makes no index of an array of one element, as which older interpreters have a scalar."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter._convert_float = _convert_float
interpreter.ReduceOps.generic_reduce = _reduce_by_halves
interpreter.InterpreterBuilder.create_fma = _create_fma
interpreter.InterpreterBuilder.create_dot = _create_dot
chunks.BLOCK = 4096
if os.environ.get("CRL_TEST_SLOW_FLOAT64") == "1":
    float64_arithmetic.slow_float64 = lambda device: True
weight_gradients.PROGRAMS = 4
