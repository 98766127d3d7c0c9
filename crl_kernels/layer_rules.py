"""How functions that take parameters are run so that per-sample gradients can be read in the backward pass.

``RULES`` maps a function (``torch.conv2d``) to a rule. A rule is given a Recorder and the function's arguments, and
runs the function through an ``autograd.Function``. Its backward asks the recorder where the samples are in the
gradient b of the output; if they are apart there, it hands over each operand's per-sample gradients. The gradient by
the input is always the ordinary one; the operand's own is the sum that the statistics need anyway. A rule returns
``NotImplemented`` where it does not apply. ``any_function`` serves every function, with a backward pass a sample.

A backward pass with create_graph=True, for a loss that has a derivative in it, is PyTorch's own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .layer_gradients import (
    ConvolutionGradient,
    EmbeddingGradient,
    LinearGradient,
    MatrixGradient,
    Reshaped,
    SampleGradient,
)
from .sample_rows import Rows


class Call(Protocol):
    """A call of a function with a rule, and its operands by slot."""

    def rows(self, b: Tensor, dims: Sequence[int]) -> Rows | None: ...
    def skips(self, slot: int) -> bool: ...
    def note_gradient(self, slot: int, gradient: Tensor) -> None: ...
    def takes(self, slot: int) -> bool: ...
    def settle(self, slot: int, gradient: SampleGradient, edge: GradientEdge | None) -> Tensor: ...


class Recorder(Protocol):
    """What rules need of whoever records."""

    def binds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a bound parameter or a view of one."""
        ...

    def operand(self, tensor: Any) -> Any:
        """The tensor as an operand whose per-sample gradients may be taken, or None."""
        ...

    def call(self, *operands: Any) -> Call: ...

    def weights_of_rows(self, count: int) -> Tensor:
        """(K, N): the weights of each of the K rows that are wanted; of N single samples, the unit matrix."""
        ...

    def take_rows(
        self,
        seeds: Callable[[int], tuple[list[GradientEdge], list[Tensor]]],
        count: int,
        inputs: Sequence[Tensor],
    ) -> None:
        """One backward pass for each of ``count`` rows."""
        ...

    def say_slow(self, function: str, inputs: Sequence[Tensor], count: int) -> None: ...


def _edge(ctx: Any, inputs: Sequence[Tensor | None], which: int) -> GradientEdge | None:
    """Of the which-th of a Function's tensor arguments, in the graph."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]
    node, output = ctx.next_functions[present.index(which)]
    return None if node is None else GradientEdge(node, output)


def _taken(
    ctx: Any,
    call: Call,
    slot: int,
    inputs: Sequence[Tensor | None],
    gradient: Callable[[], SampleGradient],
) -> Tensor | None:
    """The operand's gradient, if per-sample ones are taken of it. Operands are a Function's tensor arguments after the
    first, the input."""
    operand = inputs[slot + 1]
    if operand is None or not call.takes(slot):
        return None
    return call.settle(slot, gradient(), _edge(ctx, inputs, slot + 1)).to(operand.dtype)


def _derivative(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], b: Tensor) -> list[Tensor | None]:
    """The gradients of ``function`` by its inputs, which can be differentiated in turn."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        result = function(*inputs)
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, b, create_graph=True, allow_unused=True))
        return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


def _device_autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


# Linear


class _Linear(torch.autograd.Function):
    """input: (..., C)."""

    @staticmethod
    def forward(ctx: Any, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.call = call
        result = F.linear(input, weight, bias)
        ctx.save_for_backward(input, weight, bias)
        # Of tokens it is a view of a matrix, which PyTorch lets no in-place operation change behind a function of ours.
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        inputs = input, weight, bias = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *_linear_derivative(input, weight, bias, b, needs)
        with torch.autocast(b.device.type, enabled=False):
            by_input = by_weight = by_bias = None
            if needs[0]:
                by_input = (b @ weight.to(b.dtype)).to(input.dtype)
            a = input.to(b.dtype)
            rows = call.rows(b, range(b.dim() - 1))
            if rows is not None and any(needs[1:]):
                a_samples, b_samples = rows.tokens(a, b)
                if needs[1]:
                    by_weight = _taken(ctx, call, 0, inputs, lambda: LinearGradient(a_samples, b_samples))
                if needs[2]:
                    by_bias = _taken(ctx, call, 1, inputs, lambda: MatrixGradient(_sum_tokens(b_samples)))
            if needs[1] and by_weight is None and not call.skips(0):
                by_weight = (_matrix(b).T @ _matrix(a)).to(weight.dtype)
                call.note_gradient(0, by_weight)
            if needs[2] and by_bias is None and not call.skips(1):
                by_bias = _matrix(b).sum(0).to(bias.dtype)
                call.note_gradient(1, by_bias)
        return None, by_input, by_weight, by_bias


def _linear_derivative(
    input: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Made of functions with rules, so that the parameters' second use is seen."""
    return (
        torch.matmul(b, weight) if needs[0] else None,
        _matrix(b).T @ _matrix(input) if needs[1] else None,
        _matrix(b).sum(0) if needs[2] else None,
    )


def _matrix(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)"""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def _sum_tokens(b: Tensor) -> Tensor:
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    return b.sum(1, dtype=dtype) if b.shape[1] != 1 else b[:, 0]


def linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() == 1:
        return linear(recorder, input, weight[None], bias).squeeze(-1)
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None) or not input.dim() or input.is_complex():
        return NotImplemented
    return _Linear.apply(recorder.call(*operands), input, weight, bias)


def matmul(recorder: Recorder, *factors: Any, **options: Any) -> Any:
    """x @ W, or W @ x, with a parameter W of one or two dimensions."""
    if len(factors) != 2 or options or not all(isinstance(each, Tensor) and each.dim() for each in factors):
        return NotImplemented
    input, other = factors
    left, right = (each.dim() <= 2 and recorder.operand(each) is not None for each in factors)
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


# Convolutions


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
            found = _derivative(lambda *tensors: torch.convolution(*tensors, *geometry), inputs, b)
            return None, *found, None
        a = input.to(b.dtype)
        by_input = by_weight = by_bias = None
        # Before the gradient by the input, so that its memory and what the statistics need are not held at once.
        rows = call.rows(b, (0,))
        if rows is not None:
            if needs[1]:
                by_weight = _taken(ctx, call, 0, inputs, lambda: _convolution_gradient(rows, a, b, weight, geometry))
            if needs[2]:
                by_bias = _taken(
                    ctx,
                    call,
                    1,
                    inputs,
                    lambda: MatrixGradient(rows.sum(_sum_tokens(b.flatten(2).transpose(1, 2)))),
                )
        ordinary = [needs[0]]
        for slot, taken in enumerate((by_weight, by_bias)):
            ordinary.append(needs[slot + 1] and taken is None and not call.skips(slot))
        if any(ordinary):
            sizes = None if bias is None else list(bias.shape)
            found = torch.ops.aten.convolution_backward(b, a, weight.to(b.dtype), sizes, *geometry, ordinary)
            by_input = found[0]
            if ordinary[1]:
                by_weight = found[1]
                call.note_gradient(0, by_weight)
            if ordinary[2]:
                by_bias = found[2]
                call.note_gradient(1, by_bias)
        return (
            None,
            None if by_input is None else by_input.to(input.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None else by_bias.to(bias.dtype),
            None,
        )


def _convolution_gradient(
    rows: Rows, a: Tensor, b: Tensor, weight: Tensor, geometry: tuple[Any, ...]
) -> SampleGradient:
    stride, padding, dilation, transposed, _, groups = geometry
    if weight.dim() == 5:
        return MatrixGradient(rows.sum(_one_by_one(a, b, weight, geometry)))
    if transposed:  # a transposed convolution is the adjoint: input and output change places
        a, b = b, a
    gradient: SampleGradient
    if weight.dim() == 4:
        gradient = ConvolutionGradient(a, b, weight.shape[2:], stride, padding, dilation, groups)
    else:
        (length,), (step,), (pad,), (spread,) = weight.shape[2:], stride, padding, dilation
        a, b = a[:, :, None], b[:, :, None]
        in_rows = ConvolutionGradient(a, b, (1, length), (1, step), (0, pad), (1, spread), groups)
        gradient = Reshaped(in_rows, (*weight.shape[:2], 1, length), weight.shape)
    return gradient if rows.in_order else MatrixGradient(rows.sum(gradient.matrix()))


def _one_by_one(a: Tensor, b: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """(rows, *weight.shape)"""
    backward, only_weight = torch.ops.aten.convolution_backward, [False, True, False]
    found = [
        backward(b[i : i + 1], a[i : i + 1], weight.to(b.dtype), None, *geometry, only_weight)[1] for i in range(len(b))
    ]
    return torch.stack(found) if found else weight.new_zeros(0, *weight.shape)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values if len(values) == dims else values * dims


def _convolved(
    recorder: Recorder, dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
) -> Any:
    operands = recorder.operand(weight), recorder.operand(bias)
    if operands == (None, None) or input.is_complex() or input.dim() not in (dims + 1, dims + 2):
        return NotImplemented
    one = input.dim() == dims + 1
    result = _Convolution.apply(recorder.call(*operands), input[None] if one else input, weight, bias, geometry)
    return result[0] if one else result


def _convolution(dims: int) -> Callable[..., Any]:
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


def _transposed_convolution(dims: int) -> Callable[..., Any]:
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


# Norms


class _GroupNorm(torch.autograd.Function):
    """The backward of (N, C) channels in G groups is asked of torch for 1 sample of N C channels in N G groups: the
    gradients of weight and bias are then those of each sample, in the same pass."""

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
            found = _derivative(lambda x, w, c: F.group_norm(x, ctx.groups, w, c, ctx.eps), inputs, b)
            return None, *found, None, None
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
            _of_rows(ctx, call, 0, inputs, rows, by_weight),
            _of_rows(ctx, call, 1, inputs, rows, by_bias),
            None,
            None,
        )


def _of_rows(
    ctx: Any, call: Call, slot: int, inputs: Sequence[Tensor | None], rows: Rows | None, gradients: Tensor | None
) -> Tensor | None:
    """The operand's gradient from those that the rows of the output give it."""
    operand = inputs[slot + 1]
    if gradients is None or operand is None or call.skips(slot):
        return None
    matrix = gradients.reshape(gradients.numel() // max(1, operand.numel()), *operand.shape)
    if rows is not None:
        found = _taken(ctx, call, slot, inputs, lambda: MatrixGradient(rows.sum(matrix)))
        if found is not None:
            return found
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
    if _device_autocasts(input):
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
            found = _derivative(lambda x, w, c: F.layer_norm(x, ctx.shape, w, c, ctx.eps), inputs, b)
            return None, *found, None, None
        by_weight = by_bias = None
        rows = call.rows(b, range(b.dim() - len(ctx.shape)))
        if rows is not None:

            def per_sample(gradient: Tensor) -> SampleGradient:
                count = gradient.numel() // max(1, len(rows.samples) * math.prod(ctx.shape))
                tokens = rows.first(gradient).reshape(len(rows.samples), count, *ctx.shape)
                return MatrixGradient(rows.sum(_sum_tokens(tokens)))

            if needs[1]:
                by_weight = _taken(ctx, call, 0, inputs, lambda: per_sample(b * ((input - mean) * rstd)))
            if needs[2]:
                by_bias = _taken(ctx, call, 1, inputs, lambda: per_sample(b))
        ordinary = [needs[0]]
        for slot, taken in enumerate((by_weight, by_bias)):
            ordinary.append(needs[slot + 1] and taken is None and not call.skips(slot))
        by_input, *others = torch.ops.aten.native_layer_norm_backward(
            b, input, ctx.shape, mean, rstd, weight, bias, ordinary
        )
        for slot, gradient in enumerate(others):
            if ordinary[slot + 1]:
                call.note_gradient(slot, gradient)
        by_weight = others[0] if ordinary[1] else by_weight
        by_bias = others[1] if ordinary[2] else by_bias
        return None, by_input, by_weight, by_bias, None, None


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
    if _device_autocasts(input):
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
    # A view of another shape's norm, which must not be changed in place behind a function of ours.
    return _affine(recorder, normalized.clone(), weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _affine(
    recorder: Recorder, normalized: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """normalized * weight + bias, with parameters that are viewed as `shape` first."""
    result = normalized
    if weight is not None:
        result = result * _broadcast(recorder, weight.view(shape), result.shape)
    if bias is not None:
        result = result + _broadcast(recorder, bias.view(shape), result.shape)
    return result.to(normalized.dtype)


# Broadcast parameters


class _Expand(torch.autograd.Function):
    """A parameter that is broadcast to ``shape``, in no memory."""

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
        if rows is not None and call.takes(0):
            operand = ctx.next_functions[0]
            edge = None if operand[0] is None else GradientEdge(*operand)
            total = call.settle(0, MatrixGradient(_reduced(rows, b, aligned, shape)), edge)
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
    return torch.stack([rows.weigh(b, one).sum_to_size(aligned).reshape(shape) for one in samples])


def _broadcast(recorder: Recorder, parameter: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    operand = recorder.operand(parameter)
    if operand is None:
        return parameter
    spread: Tensor = _Expand.apply(recorder.call(operand), parameter, shape, dtype or parameter.dtype)
    return spread


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """x + p, p * x, ... where p is broadcast; and where it is a parameter of x's shape."""

    in_place = _changes_its_arguments(function)

    def rule(recorder: Recorder, *operands: Any, **options: Any) -> Any:
        if len(operands) != 2 or not all(isinstance(each, Tensor) for each in operands) or "out" in options:
            return NotImplemented
        first, second = operands
        candidates = [each.requires_grad for each in operands]
        candidates[0] = candidates[0] and not in_place
        if first.shape == second.shape:
            candidates = [wanted and recorder.binds(each) for wanted, each in zip(candidates, operands, strict=True)]
        if not any(candidates):
            return NotImplemented
        shape = torch.broadcast_shapes(first.shape, second.shape)
        spread = []
        for wanted, tensor in zip(candidates, operands, strict=True):
            if wanted and (tensor.shape != shape or recorder.binds(tensor)):
                # A tensor of no dimension does not decide the result's dtype; broadcast, it would.
                dtype = tensor.dtype if tensor.dim() else torch.result_type(first, second)
                tensor = _broadcast(recorder, tensor, shape, dtype)
            spread.append(tensor)
        return function(*spread, **options)

    return rule


def expand(recorder: Recorder, parameter: Tensor, *sizes: Any, **options: Any) -> Any:
    """p.expand(N, -1, -1) of a class token or a query that every sample starts from."""
    if not parameter.requires_grad or options or not sizes:
        return NotImplemented
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    own = (1,) * (len(sizes) - parameter.dim()) + tuple(parameter.shape)
    shape = torch.Size([old if size == -1 else size for size, old in zip(sizes, own, strict=True)])
    result = _broadcast(recorder, parameter, shape)
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
    return _broadcast(recorder, spread, torch.Size(repeated)).reshape(shape)


def where(recorder: Recorder, condition: Any = None, *values: Any, **options: Any) -> Any:
    if len(values) != 2 or options:
        return NotImplemented
    tensors = [value for value in (condition, *values) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    spread = [
        _broadcast(recorder, value, shape, None if value.dim() else torch.result_type(*values))
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
    return Tensor.__setitem__(tensor, index, _broadcast(recorder, value, shape, value.dtype))


def attention(
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    """A mask that is learnt, such as a bias for each relative position, is broadcast over samples."""
    if recorder.operand(attn_mask) is None:
        return NotImplemented
    assert attn_mask is not None
    mask = _broadcast(recorder, attn_mask, torch.Size((*query.shape[:-1], key.shape[-2])))
    return F.scaled_dot_product_attention(query, key, value, mask, *rest, **options)


# Embedding


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, ids: Tensor, weight: Tensor, padding_idx: int, sparse: bool) -> Tensor:
        ctx.call, ctx.padding_idx, ctx.sparse = call, padding_idx, sparse
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        inputs = ids, weight = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled():
            found = _derivative(lambda i, w: F.embedding(i, w, ctx.padding_idx), inputs, b)
            return None, *found, None, None
        if ctx.padding_idx >= 0:
            b = b * (ids != ctx.padding_idx)[..., None]
        rows = call.rows(b, range(b.dim() - 1))
        by_weight = None
        if rows is not None:
            own, gradients = rows.tokens(ids[..., None], b)
            by_weight = _taken(ctx, call, 0, inputs, lambda: EmbeddingGradient(own[..., 0], gradients, weight.shape[0]))
        if by_weight is None and not call.skips(0):
            by_weight = torch.zeros_like(weight).index_add_(0, ids.flatten(), _matrix(b).to(weight.dtype))
            call.note_gradient(0, by_weight)
        if ctx.sparse and by_weight is not None:
            by_weight = torch.sparse_coo_tensor(ids.flatten()[None], _matrix(b).to(weight.dtype), weight.shape)
        return None, None, by_weight, None, None


def embedding(
    recorder: Recorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    operand = recorder.operand(weight)
    if operand is None:
        return NotImplemented
    if scale_grad_by_freq:
        raise ValueError(
            "an Embedding with scale_grad_by_freq=True divides gradients by how often an id is in the whole batch, so "
            "there are no per-sample gradients. Build it with scale_grad_by_freq=False."
        )
    if max_norm is not None:
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(recorder.call(operand), input, weight, padding, sparse)


# Every other function


def _changes_its_arguments(function: Callable[..., Any]) -> bool:
    name: str = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"


# Or views, which ``binds`` knows: attributes such as .shape and .T, and questions.
_NOT_DIFFERENTIABLE = {"__get__", "__set__", "__len__", "__hash__", "__repr__", "detach", "requires_grad_"}
_NOT_DIFFERENTIABLE |= {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "data_ptr",
}


class _Arrival(torch.autograd.Function):
    """Where the gradient of a function's output arrives: the output, in memory of its own."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, call: Call, name: str, stand_ins: Sequence[Tensor], output: Tensor
    ) -> Tensor:
        ctx.recorder, ctx.call, ctx.function, ctx.stand_ins = recorder, call, name, stand_ins
        return output.clone()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        rows = None if torch.is_grad_enabled() else ctx.call.rows(b, range(b.dim()))
        if rows is not None:
            edge = GradientEdge(*ctx.next_functions[-1])
            weights = ctx.recorder.weights_of_rows(rows.count)
            ctx.recorder.say_slow(ctx.function, ctx.stand_ins, rows.count)
            ctx.recorder.take_rows(lambda i: ([edge], [rows.weigh(b, weights[i])]), len(weights), ctx.stand_ins)
        return None, None, None, None, b


def any_function(recorder: Recorder, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs a function that takes parameters. The backward pass of each of its outputs whose samples are apart goes
    through the function once for each sample."""
    name = getattr(function, "__name__", repr(function))
    if name in _NOT_DIFFERENTIABLE or _changes_its_arguments(function) or kwargs.get("out") is not None:
        return function(*args, **kwargs)
    stand_ins: list[Tensor] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if not recorder.binds(tensor):
            return tensor
        stand_ins.append(tensor.view_as(tensor))  # which no other call has
        return stand_ins[-1]

    args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
    result = function(*args, **kwargs)
    leaves, structure = tree_flatten(result)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not recorder.binds(leaf):
            call = recorder.call(*(recorder.operand(each) for each in stand_ins))
            leaves[i] = _Arrival.apply(recorder, call, name, tuple(stand_ins), leaf)
    return tree_unflatten(leaves, structure)


_ELEMENTWISE = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__, Tensor.sub_),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_),
    *(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.__itruediv__, Tensor.div_),
    *(torch.pow, Tensor.pow, Tensor.__pow__, torch.maximum, torch.minimum),
)

RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.addmm: addmm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.embedding: embedding,
    F.scaled_dot_product_attention: attention,
    Tensor.expand: expand,
    Tensor.expand_as: expand_as,
    torch.broadcast_to: broadcast_to,
    Tensor.broadcast_to: broadcast_to,
    Tensor.repeat: repeat,
    Tensor.__setitem__: set_item,
    torch.where: where,
    Tensor.where: lambda recorder, value, condition, other: where(recorder, condition, value, other),
    **{function: elementwise(function) for function in _ELEMENTWISE},
}
