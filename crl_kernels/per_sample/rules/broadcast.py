"""Rules for parameters that are broadcast over samples: scales, biases, class tokens, masks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..layer_gradients import MatrixGradient
from ..rows import Rows
from .interface import Call, Recorder, is_in_place


class _Expand(torch.autograd.Function):
    """A parameter broadcast to ``shape`` without a copy."""

    @staticmethod
    def forward(ctx: Any, call: Call, parameter: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        ctx.call, ctx.shape, ctx.dtype = call, parameter.shape, parameter.dtype
        return parameter.detach().to(dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        call, shape = ctx.call, ctx.shape
        if torch.is_grad_enabled():
            return None, b.sum_to_size(shape).to(ctx.dtype), None, None
        aligned = (1,) * (b.dim() - len(shape)) + tuple(shape)  # of as many dimensions as b
        missing = b.dim() - len(shape)
        shared = [dim for dim, size in enumerate(aligned) if dim < missing or size == 1 != b.shape[dim]]
        rows = call.rows(b, shared or range(b.dim()))
        total = None
        if rows is not None and call.wants(0):
            operand = ctx.next_functions[0]
            edge = None if operand[0] is None else GradientEdge(*operand)
            total = call.take(0, MatrixGradient(_reduced(rows, b, aligned, shape)), edge)
        if total is None:
            total = b.sum_to_size(shape)
            call.note_gradient(0, total)
        return None, total.to(ctx.dtype), None, None


def _reduced(rows: Rows, b: Tensor, aligned: tuple[int, ...], shape: torch.Size) -> Tensor:
    """(N, *shape): each sample's part of b, summed over the dimensions along which the parameter was broadcast."""
    if all(aligned[dim] == 1 for dim in rows.dims):
        others = [size for dim, size in enumerate(aligned) if dim not in rows.dims]
        parts = rows.first(b)
        return rows.sum(parts.sum_to_size(len(parts), *others).reshape(len(parts), *shape))
    samples = torch.eye(rows.count, device=b.device, dtype=torch.float64)
    return torch.stack([rows.weigh(b, sample).sum_to_size(aligned).reshape(shape) for sample in samples])


def broadcast_operand(
    recorder: Recorder, parameter: Tensor, shape: torch.Size, dtype: torch.dtype | None = None
) -> Tensor:
    operand = recorder.operand(parameter)
    if operand is None:
        return parameter
    spread: Tensor = _Expand.apply(recorder.call(operand), parameter, shape, dtype or parameter.dtype)
    return spread


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for x + p, p * x, ... where p is broadcast, or is a parameter of x's shape."""
    in_place = is_in_place(function)

    def rule(recorder: Recorder, *operands: Any, **options: Any) -> Any:
        if len(operands) != 2 or not all(isinstance(tensor, Tensor) for tensor in operands) or "out" in options:
            return NotImplemented
        first, second = operands
        candidates = [tensor.requires_grad for tensor in operands]
        candidates[0] = candidates[0] and not in_place
        if first.shape == second.shape:
            candidates = [wanted and recorder.binds(x) for wanted, x in zip(candidates, operands, strict=True)]
        if not any(candidates):
            return NotImplemented
        shape = torch.broadcast_shapes(first.shape, second.shape)
        spread = []
        for wanted, tensor in zip(candidates, operands, strict=True):
            if wanted and (tensor.shape != shape or recorder.binds(tensor)):
                # A 0-dim tensor does not decide the result's dtype, but would if it were broadcast.
                dtype = tensor.dtype if tensor.dim() else torch.result_type(first, second)
                tensor = broadcast_operand(recorder, tensor, shape, dtype)
            spread.append(tensor)
        return function(*spread, **options)

    return rule


def expand(recorder: Recorder, parameter: Tensor, *sizes: Any, **options: Any) -> Any:
    """p.expand(N, -1, -1), for example of a class token or a query that every sample starts from."""
    if not parameter.requires_grad or options or not sizes:
        return NotImplemented
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    own = (1,) * (len(sizes) - parameter.dim()) + tuple(parameter.shape)
    shape = torch.Size([old if size == -1 else size for size, old in zip(sizes, own, strict=True)])
    result = broadcast_operand(recorder, parameter, shape)
    return NotImplemented if result is parameter else result


def broadcast_to(recorder: Recorder, parameter: Tensor, size: Sequence[int]) -> Any:
    return expand(recorder, parameter, *size)


def expand_as(recorder: Recorder, parameter: Tensor, other: Tensor) -> Any:
    return expand(recorder, parameter, *other.shape)


def repeat(recorder: Recorder, parameter: Tensor, *times: Any, **options: Any) -> Any:
    """As an expansion of (1, s_0, 1, s_1, ...) to (r_0, s_0, r_1, s_1, ...)."""
    if recorder.operand(parameter) is None or options:
        return NotImplemented
    times = tuple(times[0]) if len(times) == 1 and not isinstance(times[0], int) else times
    sizes = (1,) * (len(times) - parameter.dim()) + tuple(parameter.shape)
    spread = parameter.reshape([part for size in sizes for part in (1, size)])
    repeated = [part for count, size in zip(times, sizes, strict=True) for part in (count, size)]
    shape = [count * size for count, size in zip(times, sizes, strict=True)]
    return broadcast_operand(recorder, spread, torch.Size(repeated)).reshape(shape)


def where(recorder: Recorder, condition: Any = None, *values: Any, **options: Any) -> Any:
    if len(values) != 2 or options:
        return NotImplemented
    tensors = [value for value in (condition, *values) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    spread = [
        broadcast_operand(recorder, value, shape, None if value.dim() else torch.result_type(*values))
        if isinstance(value, Tensor) and (recorder.binds(value) or value.shape != shape)
        else value
        for value in values
    ]
    if all(new is old for new, old in zip(spread, values, strict=True)):
        return NotImplemented
    return torch.where(condition, *spread)


def set_item(recorder: Recorder, tensor: Tensor, index: Any, value: Any) -> Any:
    """x[:, 0] = p"""
    if recorder.operand(value) is None:
        return NotImplemented
    with torch.no_grad():
        shape = tensor[index].shape
    return Tensor.__setitem__(tensor, index, broadcast_operand(recorder, value, shape, value.dtype))


def attention(
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """Attention with a learned mask, such as a bias for each relative position, which is broadcast over samples."""
    if recorder.operand(attn_mask) is None:
        return NotImplemented
    assert attn_mask is not None
    mask = broadcast_operand(recorder, attn_mask, torch.Size((*query.shape[:-1], key.shape[-2])))
    return F.scaled_dot_product_attention(query, key, value, mask, *rest, **options)
