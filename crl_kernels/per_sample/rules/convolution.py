"""Rules for convolutions and transposed convolutions of one to three dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends.reference import Convolution
from ..layer_gradients import ConvolutionGradient, MatrixGradient, Reshaped, SampleGradient
from ..rows import Rows
from .interface import Call, Recorder, complete_gradients, differentiable_gradients, sum_tokens, take_gradient


class _Convolution(torch.autograd.Function):
    """input: (rows, C, ...), one, two or three spatial dimensions."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.call, ctx.geometry = call, geometry
        ctx.save_for_backward(input, weight, bias)
        result: Tensor = torch.convolution(input, weight, bias, *geometry)
        return result

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        inputs = input, weight, bias = ctx.saved_tensors
        call, needs, geometry = ctx.call, ctx.needs_input_grad[1:], ctx.geometry
        if torch.is_grad_enabled():
            derivatives = differentiable_gradients(lambda *tensors: torch.convolution(*tensors, *geometry), inputs, b)
            return None, *derivatives, None
        a = input.to(b.dtype)
        by_weight = by_bias = None
        # Before the gradient by the input, so that its memory and that of the statistics are not held at once.
        rows = call.rows(b, (0,))
        if rows is not None:
            if needs[1]:
                by_weight = take_gradient(
                    ctx, call, 0, inputs, lambda: _convolution_gradient(rows, a, b, weight, geometry)
                )
            if needs[2]:
                by_bias = take_gradient(
                    ctx,
                    call,
                    1,
                    inputs,
                    lambda: MatrixGradient(rows.sum(sum_tokens(b.flatten(2).transpose(1, 2)))),
                )
        sizes = None if bias is None else list(bias.shape)
        gradients = complete_gradients(
            call,
            inputs,
            needs,
            (by_weight, by_bias),
            lambda mask: torch.ops.aten.convolution_backward(b, a, weight.to(b.dtype), sizes, *geometry, mask),
        )
        return None, *gradients, None


def _convolution_gradient(
    rows: Rows, a: Tensor, b: Tensor, weight: Tensor, geometry: tuple[Any, ...]
) -> SampleGradient:
    stride, padding, dilation, transposed, _, groups = geometry
    if weight.dim() == 5:
        return MatrixGradient(rows.sum(_matrix_row_by_row(a, b, weight, geometry)))
    if transposed:  # a transposed convolution is the adjoint: input and output change places
        a, b = b, a
    gradient: SampleGradient
    if weight.dim() == 4:
        gradient = ConvolutionGradient(Convolution(a, b, weight.shape[2:], stride, padding, dilation, groups))
    else:
        (length,), (step,), (pad,), (spread,) = weight.shape[2:], stride, padding, dilation
        a, b = a[:, :, None], b[:, :, None]
        in_rows = ConvolutionGradient(Convolution(a, b, (1, length), (1, step), (0, pad), (1, spread), groups))
        gradient = Reshaped(in_rows, (*weight.shape[:2], 1, length), weight.shape)
    return gradient if rows.in_order else MatrixGradient(rows.sum(gradient.matrix()))


def _matrix_row_by_row(a: Tensor, b: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """Per-row gradients (rows, *weight.shape), with one backward call a row."""
    backward, only_weight = torch.ops.aten.convolution_backward, [False, True, False]
    gradients = [
        backward(b[i : i + 1], a[i : i + 1], weight.to(b.dtype), None, *geometry, only_weight)[1] for i in range(len(b))
    ]
    return torch.stack(gradients) if gradients else weight.new_zeros(0, *weight.shape)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values if len(values) == dims else values * dims


def _convolved(
    recorder: Recorder, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Any:
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None) or input.is_complex() or input.dim() not in (dims + 1, dims + 2):
        return NotImplemented
    unbatched = input.dim() == dims + 1
    result = _Convolution.apply(recorder.call(*operands), input[None] if unbatched else input, weight, bias, geometry)
    return result[0] if unbatched else result


def convolution(dims: int) -> Callable[..., Any]:
    def rule(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
        if padding == "valid":
            padding = (0,) * dims
        elif padding == "same":
            totals = [spread * (size - 1) for spread, size in zip(dilation, weight.shape[2:], strict=True)]
            if any(total % 2 for total in totals):  # one more on the right, as torch does
                input = F.pad(input, [side for total in reversed(totals) for side in (0, total % 2)])
            padding = tuple(total // 2 for total in totals)
        geometry = (stride, _tuple(padding, dims), dilation, False, (0,) * dims, groups)
        return _convolved(recorder, dims, input, weight, bias, geometry)

    return rule


def transposed_convolution(dims: int) -> Callable[..., Any]:
    def rule(
        recorder: Recorder,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        stride, padding, dilation = (_tuple(value, dims) for value in (stride, padding, dilation))
        geometry = (stride, padding, dilation, True, _tuple(output_padding, dims), groups)
        return _convolved(recorder, dims, input, weight, bias, geometry)

    return rule
