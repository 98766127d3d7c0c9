"""Rules for linear layers and products of matrices."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_gradients import LinearGradient, MatrixGradient
from .interface import Call, Recorder, as_matrix, complete_gradients, sum_tokens, take_gradient


class _Linear(torch.autograd.Function):
    """input: (..., C)."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.call = call
        result = F.linear(input, weight, bias)
        ctx.save_for_backward(input, weight, bias)
        # For tokens the result is a view, and PyTorch refuses in-place operations on a view that a Function returns.
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        inputs = input, weight, _ = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_linear_derivative(input, weight, b, needs)
        with torch.autocast(b.device.type, enabled=False):
            by_weight = by_bias = None
            a = input.to(b.dtype)
            rows = call.rows(b, range(b.dim() - 1))
            if rows is not None and any(needs[1:]):
                a_samples, b_samples = rows.tokens(a, b)
                if needs[1]:
                    by_weight = take_gradient(ctx, call, 0, inputs, lambda: LinearGradient(a_samples, b_samples))
                if needs[2]:
                    by_bias = take_gradient(ctx, call, 1, inputs, lambda: MatrixGradient(sum_tokens(b_samples)))
            gradients = complete_gradients(
                call,
                inputs,
                needs,
                (by_weight, by_bias),
                lambda mask: _linear_derivative(a, weight.to(b.dtype), b, mask),
            )
        return None, *gradients


def _linear_derivative(input: Tensor, weight: Tensor, b: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias that are needed, by functions that have rules: in a graph that is kept,
    the recorder sees the parameters' second use."""
    return (
        torch.matmul(b, weight) if needs[0] else None,
        as_matrix(b).T @ as_matrix(input) if needs[1] else None,
        as_matrix(b).sum(0) if needs[2] else None,
    )


def linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() == 1:
        return linear(recorder, input, weight[None], bias).squeeze(-1)
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None) or not input.dim() or input.is_complex():
        return NotImplemented
    return _Linear.apply(recorder.call(*operands), input, weight, bias)


def matmul(recorder: Recorder, *factors: Any, **options: Any) -> Any:
    """x @ W, or W @ x, with a parameter W of one or two dimensions."""
    if len(factors) != 2 or options or not all(isinstance(factor, Tensor) and factor.dim() for factor in factors):
        return NotImplemented
    input, other = factors
    left, right = (factor.dim() <= 2 and recorder.operand(factor) is not None for factor in factors)
    if left and right:  # the one that is a parameter, or the one without a batch
        left, right = (recorder.binds(input), recorder.binds(other))
        right = right or not left
    if right:  # a linear layer's weight is its transpose
        return linear(recorder, input, other if other.dim() == 1 else other.T)
    if not left or input.dim() > 2:
        return NotImplemented
    if other.dim() == 1:
        return linear(recorder, other, input)
    result = linear(recorder, other.mT, input)
    return result if result is NotImplemented or input.dim() == 1 else result.mT


def addmm(recorder: Recorder, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if (beta, alpha) != (1, 1) or bias.dim() > 1 or bias.shape[-1:] != weight.shape[-1:] or recorder.binds(input):
        return NotImplemented
    return linear(recorder, input, weight.T, bias)
