"""Rules for normalisations: group, layer, RMS, batch and instance."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_gradients import MatrixGradient, SampleGradient
from ..rows import Rows
from .broadcast import broadcast_operand
from .interface import (
    Call,
    Recorder,
    complete_gradients,
    device_autocasts,
    differentiable_gradients,
    sum_tokens,
    take_gradient,
)


class _GroupNorm(torch.autograd.Function):
    """The backward pass treats (N, C) channels in G groups as 1 sample of N C channels in N G groups. So PyTorch's
    kernel returns the gradients of weight and bias for each sample, in the same pass."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> Tensor:
        count, channels = input.shape[:2]
        pixels = input.shape[2:].numel()
        result: Tensor
        result, mean, rstd = torch.native_group_norm(input, weight, bias, count, channels, pixels, groups, eps)
        ctx.call, ctx.groups, ctx.eps = call, groups, eps
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        *inputs, mean, rstd = ctx.saved_tensors
        input, weight = inputs[:2]
        call, needs = ctx.call, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            derivatives = differentiable_gradients(
                lambda x, w, c: F.group_norm(x, ctx.groups, w, c, ctx.eps), inputs, b
            )
            return None, *derivatives, None, None
        count, channels = input.shape[:2]
        pixels = input.shape[2:].numel()
        by_input, by_weight, by_bias = torch.ops.aten.native_group_norm_backward(
            b.contiguous().reshape(1, count * channels, pixels),
            input.contiguous().reshape(1, count * channels, pixels),
            mean.reshape(1, -1),
            rstd.reshape(1, -1),
            None if weight is None else weight.repeat(count),
            1,
            count * channels,
            pixels,
            count * ctx.groups,
            needs,
        )
        rows = call.rows(b, (0,))
        return (
            None,
            None if by_input is None else by_input.reshape(input.shape),
            _sum_of_rows(ctx, call, 0, inputs, rows, by_weight),
            _sum_of_rows(ctx, call, 1, inputs, rows, by_bias),
            None,
            None,
        )


def _sum_of_rows(
    ctx: Any, call: Call, slot: int, inputs: Sequence[Tensor | None], rows: Rows | None, gradients: Tensor | None
) -> Tensor | None:
    """The operand's gradient, from its gradients by each row of the output."""
    operand = inputs[slot + 1]
    if gradients is None or operand is None or call.skips(slot):
        return None
    matrix = gradients.reshape(gradients.numel() // max(1, operand.numel()), *operand.shape)
    if rows is not None:
        taken = take_gradient(ctx, call, slot, inputs, lambda: MatrixGradient(rows.sum(matrix)))
        if taken is not None:
            return taken
    total = matrix.sum(0).to(operand.dtype)
    call.note_gradient(slot, total)
    return total


def group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None):
        return NotImplemented
    if device_autocasts(input):
        normalized = F.group_norm(input, num_groups, eps=eps)
        return _affine(recorder, normalized, weight, bias, (-1, *(1,) * (input.dim() - 2)))
    return _GroupNorm.apply(recorder.call(*operands), input.contiguous(), weight, bias, num_groups, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
    ) -> Tensor:
        result: Tensor
        result, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.call, ctx.shape, ctx.eps = call, shape, eps
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        *inputs, mean, rstd = ctx.saved_tensors
        input, weight, bias = inputs
        call, needs = ctx.call, ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            derivatives = differentiable_gradients(lambda x, w, c: F.layer_norm(x, ctx.shape, w, c, ctx.eps), inputs, b)
            return None, *derivatives, None, None
        by_weight = by_bias = None
        rows = call.rows(b, range(b.dim() - len(ctx.shape)))
        if rows is not None:

            def per_sample(gradient: Tensor) -> SampleGradient:
                count = gradient.numel() // max(1, len(rows.samples) * math.prod(ctx.shape))
                tokens = rows.first(gradient).reshape(len(rows.samples), count, *ctx.shape)
                return MatrixGradient(rows.sum(sum_tokens(tokens)))

            if needs[1]:
                by_weight = take_gradient(ctx, call, 0, inputs, lambda: per_sample(b * ((input - mean) * rstd)))
            if needs[2]:
                by_bias = take_gradient(ctx, call, 1, inputs, lambda: per_sample(b))
        gradients = complete_gradients(
            call,
            inputs,
            needs,
            (by_weight, by_bias),
            lambda mask: torch.ops.aten.native_layer_norm_backward(b, input, ctx.shape, mean, rstd, weight, bias, mask),
        )
        return None, *gradients, None, None


def layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None):
        return NotImplemented
    if device_autocasts(input):
        return _affine(recorder, F.layer_norm(input, normalized_shape, eps=eps), weight, bias, tuple(normalized_shape))
    return _LayerNorm.apply(recorder.call(*operands), input, weight, bias, list(normalized_shape), eps)


def rms_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if recorder.operand(weight) is None:
        return NotImplemented
    normalized = F.rms_norm(input, list(normalized_shape), None, eps)
    return _affine(recorder, normalized, weight, None, tuple(normalized_shape))


def batch_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *cudnn: bool,
) -> Any:
    if training and running_mean is None:
        raise ValueError(
            "a BatchNorm with track_running_stats=False normalises with the statistics of the batch, in evaluation "
            "mode too, so it mixes the samples and there are no per-sample gradients. Build it with "
            "track_running_stats=True, or use GroupNorm."
        )
    if training:
        raise ValueError(
            "a BatchNorm in training mode mixes the samples of a batch, so there are no per-sample gradients. "
            "Call model.eval() first."
        )
    if recorder.operand(weight) is None and recorder.operand(bias) is None:
        return NotImplemented
    normalized = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(recorder, normalized, weight, bias, (-1, *(1,) * (input.dim() - 2)))


def instance_norm(
    recorder: Recorder,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if recorder.operand(weight) is None and recorder.operand(bias) is None:
        return NotImplemented
    normalized = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    # Cloned: it is a view, and PyTorch refuses in-place operations on a view that a Function returns.
    return _affine(recorder, normalized.clone(), weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _affine(
    recorder: Recorder, normalized: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """normalized * weight + bias, with the parameters viewed as ``shape``."""
    result = normalized
    if weight is not None:
        result = result * broadcast_operand(recorder, weight.view(shape), result.shape)
    if bias is not None:
        result = result + broadcast_operand(recorder, bias.view(shape), result.shape)
    return result.to(normalized.dtype)
