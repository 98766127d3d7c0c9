"""How functions that take parameters are run so that per-sample gradients can be read in the backward pass.

``RULES`` maps a function (``torch.conv2d``) to a rule. A rule is given a Recorder and the function's arguments, and
runs the function through an ``autograd.Function`` whose backward hands each parameter's per-sample gradients to the
recorder and, once the recorder has finished, is the ordinary one. The gradient by the input is always the ordinary
one; the parameter's own gradient is the sum that the statistics need anyway. A rule returns ``NotImplemented`` where
it does not apply.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layer_gradients import (
    ConvolutionGradient,
    EmbeddingGradient,
    LinearGradient,
    MatrixGradient,
    Reshaped,
    SampleGradient,
)


class Use(Protocol):
    """One use of a bound parameter, or of a view of one, in the forward pass."""

    def settle(self, gradient: SampleGradient) -> Tensor:
        """Takes the statistics of the use's per-sample gradients and returns their sum."""
        ...


class Recorder(Protocol):
    """What rules need of whoever records."""

    recording: bool

    def binds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a bound parameter or a view of one."""
        ...

    def use(self, tensor: Tensor | None) -> Use | None:
        """A new use, if the tensor is bound."""
        ...

    def samples(self, tensor: Tensor, dim: int = 0) -> int | None:
        """The number of samples, if dimension ``dim`` of the tensor has that many."""
        ...

    def attention_samples(self) -> int | None:
        """Inside of multi-head attention, whose tensors are (tokens, samples, ...): the number of samples."""
        ...


def _settle(use: Use | None, gradient: Callable[[], SampleGradient], like: Tensor | None) -> Tensor | None:
    if use is None or like is None:
        return None
    return use.settle(gradient()).to(like.dtype)


def _device_autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


class _Linear(torch.autograd.Function):
    """input: (N, ..., C), or, of attention, (tokens, N, C) or (tokens * N, C)."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        uses: tuple[Use | None, Use | None],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        attention: int | None,
    ) -> Tensor:
        ctx.recorder, ctx.uses, ctx.attention = recorder, uses, attention
        result = F.linear(input, weight, bias)
        ctx.save_for_backward(input, weight, bias)
        # Of tokens it is a view of a matrix, which PyTorch lets no in-place operation change behind a function of ours.
        return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        input, weight, bias = ctx.saved_tensors
        with torch.autocast(b.device.type, enabled=False):
            by_input = by_weight = by_bias = None
            if ctx.needs_input_grad[2]:
                by_input = (b @ weight.to(b.dtype)).to(input.dtype)
            use_weight, use_bias = ctx.uses if ctx.recorder.recording else (None, None)
            a = input.to(b.dtype)
            if use_weight is not None or use_bias is not None:
                a_samples, b_samples = (_tokens(tensor, ctx.attention) for tensor in (a, b))
            if ctx.needs_input_grad[3]:
                if use_weight is not None:
                    by_weight = _settle(use_weight, lambda: LinearGradient(a_samples, b_samples), weight)
                else:
                    by_weight = (b.reshape(-1, b.shape[-1]).T @ a.reshape(-1, a.shape[-1])).to(weight.dtype)
            if ctx.needs_input_grad[4]:
                if use_bias is not None:
                    by_bias = _settle(use_bias, lambda: MatrixGradient(_sum_tokens(b_samples)), bias)
                else:
                    by_bias = b.reshape(-1, b.shape[-1]).sum(0).to(bias.dtype)
        return None, None, by_input, by_weight, by_bias, None


def _tokens(tensor: Tensor, attention: int | None) -> Tensor:
    """As (N, T, channels)."""
    if attention is None:
        return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
    return tensor.reshape(-1, attention, tensor.shape[-1]).transpose(0, 1)


def _sum_tokens(b: Tensor) -> Tensor:
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    return b.sum(1, dtype=dtype) if b.shape[1] != 1 else b[:, 0]


def linear(recorder: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    attention = recorder.attention_samples()
    if attention is None and (input.dim() < 2 or recorder.samples(input) is None):
        return NotImplemented
    if attention is not None and input.dim() not in (2, 3):
        return NotImplemented
    uses = recorder.use(weight), recorder.use(bias)
    return _Linear.apply(recorder, uses, input, weight, bias, attention)


def matmul(recorder: Recorder, input: Tensor, other: Tensor) -> Any:
    """x @ W with a parameter W (C, O) or (C,): a linear layer's weight is its transpose."""
    if not isinstance(input, Tensor) or recorder.samples(input) is None or input.dim() < 2 or other.dim() > 2:
        return NotImplemented
    if recorder.attention_samples() is not None or recorder.binds(input) or not other.dim():
        return NotImplemented
    if other.dim() == 1:
        return linear(recorder, input, other[None]).squeeze(-1)
    return linear(recorder, input, other.T)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        uses: tuple[Use | None, Use | None],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.recorder, ctx.uses, ctx.geometry = recorder, uses, geometry
        stride, padding, dilation, transposed, output_padding, groups = geometry
        ctx.save_for_backward(input, weight, bias)
        result: Tensor = torch.convolution(
            input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        input, weight, bias = ctx.saved_tensors
        use_weight, use_bias = ctx.uses if ctx.recorder.recording else (None, None)
        a = input.to(b.dtype)
        needs = ctx.needs_input_grad
        by_input = by_weight = by_bias = None
        # Before the gradient by the input, so that its memory and what the statistics need are not held at once.
        if use_weight is not None and needs[3]:
            by_weight = _settle(use_weight, lambda: _convolution_gradient(a, b, weight, ctx.geometry), weight)
        if use_bias is not None and needs[4]:
            by_bias = _settle(use_bias, lambda: MatrixGradient(_sum_tokens(b.flatten(2).transpose(1, 2))), bias)
        ordinary = (needs[2], needs[3] and use_weight is None, needs[4] and use_bias is None)
        if any(ordinary):
            sizes = None if bias is None else list(bias.shape)
            found = torch.ops.aten.convolution_backward(b, a, weight.to(b.dtype), sizes, *ctx.geometry, ordinary)
            by_input = found[0]
            by_weight = found[1] if ordinary[1] else by_weight
            by_bias = found[2] if ordinary[2] else by_bias
        return (
            None,
            None,
            None if by_input is None else by_input.to(input.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None else by_bias.to(bias.dtype),
            None,
        )


def _convolution_gradient(a: Tensor, b: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> SampleGradient:
    stride, padding, dilation, transposed, _, groups = geometry
    if transposed:  # a transposed convolution is the adjoint: input and output change places
        a, b = b, a
    if weight.dim() == 4:
        return ConvolutionGradient(a, b, weight.shape[2:], stride, padding, dilation, groups)
    (length,), (step,), (pad,), (spread,) = weight.shape[2:], stride, padding, dilation
    in_rows = ConvolutionGradient(a[:, :, None], b[:, :, None], (1, length), (1, step), (0, pad), (1, spread), groups)
    return Reshaped(in_rows, (*weight.shape[:2], 1, length), weight.shape)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values if len(values) == dims else values * dims


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
        if input.dim() != dims + 2 or recorder.samples(input) is None:
            return NotImplemented
        stride, dilation = _tuple(stride, dims), _tuple(dilation, dims)
        if padding == "valid":
            padding = (0,) * dims
        elif padding == "same":
            totals = [spread * (size - 1) for spread, size in zip(dilation, weight.shape[2:], strict=True)]
            if any(total % 2 for total in totals):  # one more on the right, as torch does
                input = F.pad(input, [side for total in reversed(totals) for side in (0, total % 2)])
            padding = tuple(total // 2 for total in totals)
        geometry = (stride, _tuple(padding, dims), dilation, False, (0,) * dims, groups)
        uses = recorder.use(weight), recorder.use(bias)
        return _Convolution.apply(recorder, uses, input, weight, bias, geometry)

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
        if input.dim() != dims + 2 or recorder.samples(input) is None:
            return NotImplemented
        stride, padding, dilation = (_tuple(value, dims) for value in (stride, padding, dilation))
        geometry = (stride, padding, dilation, True, _tuple(output_padding, dims), groups)
        uses = recorder.use(weight), recorder.use(bias)
        return _Convolution.apply(recorder, uses, input, weight, bias, geometry)

    return rule


class _GroupNorm(torch.autograd.Function):
    """The backward of (N, C) channels in G groups is asked of torch for 1 sample of N C channels in N G groups: the
    gradients of weight and bias are then those of each sample, in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        uses: tuple[Use | None, Use | None],
        input: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        count, channels = input.shape[:2]
        pixels = input[0, 0].numel()
        result: Tensor
        result, mean, rstd = torch.native_group_norm(input, weight, bias, count, channels, pixels, groups, eps)
        ctx.recorder, ctx.uses, ctx.groups = recorder, uses, groups
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        count, channels = input.shape[:2]
        pixels = input[0, 0].numel()
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
            (needs[2], needs[4], needs[5]),
        )
        uses = ctx.uses if ctx.recorder.recording else (None, None)
        return (
            None,
            None,
            None if by_input is None else by_input.reshape(input.shape),
            None,
            _small(uses[0], by_weight, count, weight),
            _small(uses[1], by_bias, count, bias),
            None,
        )


def _small(use: Use | None, rows: Tensor | None, count: int, parameter: Tensor | None) -> Tensor | None:
    """The sum of each sample's gradients, settled if there is a use."""
    if rows is None or parameter is None:
        return None
    rows = rows.reshape(count, *parameter.shape)
    total = rows.sum(0) if use is None else use.settle(MatrixGradient(rows))
    return total.to(parameter.dtype)


def group_norm(
    recorder: Recorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if input.dim() < 2 or recorder.samples(input) is None:
        return NotImplemented
    if _device_autocasts(input):
        normalized = F.group_norm(input, num_groups, eps=eps)
        return _affine(recorder, normalized, weight, bias, (-1, *(1,) * (input.dim() - 2)))
    return _GroupNorm.apply(
        recorder, (recorder.use(weight), recorder.use(bias)), input.contiguous(), num_groups, weight, bias, eps
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        uses: tuple[Use | None, Use | None],
        input: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        result: Tensor
        result, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.recorder, ctx.uses, ctx.shape = recorder, uses, shape
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        use_weight, use_bias = ctx.uses if ctx.recorder.recording else (None, None)
        by_input, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward(
            b,
            input,
            ctx.shape,
            mean,
            rstd,
            weight,
            bias,
            (needs[2], needs[4] and use_weight is None, needs[5] and use_bias is None),
        )
        tokens = (input.shape[0], -1, *ctx.shape)
        if needs[4] and use_weight is not None:
            rows = (b * ((input - mean) * rstd)).reshape(tokens)
            by_weight = _settle(use_weight, lambda: MatrixGradient(_sum_tokens(rows)), weight)
        if needs[5] and use_bias is not None:
            by_bias = _settle(use_bias, lambda: MatrixGradient(_sum_tokens(b.reshape(tokens))), bias)
        return None, None, by_input, None, by_weight, by_bias, None


def layer_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    if input.dim() <= len(normalized_shape) or recorder.samples(input) is None:
        return NotImplemented
    if _device_autocasts(input):
        return _affine(recorder, F.layer_norm(input, normalized_shape, eps=eps), weight, bias, tuple(normalized_shape))
    uses = recorder.use(weight), recorder.use(bias)
    return _LayerNorm.apply(recorder, uses, input, list(normalized_shape), weight, bias, eps)


def rms_norm(
    recorder: Recorder,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if input.dim() <= len(normalized_shape) or recorder.samples(input) is None:
        return NotImplemented
    return _affine(
        recorder, F.rms_norm(input, list(normalized_shape), None, eps), weight, None, tuple(normalized_shape)
    )


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
    if training:
        raise ValueError(
            "a BatchNorm in training mode mixes the samples of a batch, so there are no per-sample gradients. "
            "Call model.eval() first."
        )
    if recorder.samples(input) is None:
        return NotImplemented
    normalized = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(recorder, normalized, weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _affine(
    recorder: Recorder, normalized: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> Tensor:
    """normalized * weight + bias, with parameters that are viewed as `shape` first."""
    result = normalized
    if weight is not None:
        result = result * _per_sample(recorder, weight.view(shape), result)
    if bias is not None:
        result = result + _per_sample(recorder, bias.view(shape), result)
    return result.to(normalized.dtype)


def _per_sample(recorder: Recorder, parameter: Tensor, like: Tensor) -> Tensor:
    """One copy, in no memory, of a parameter for each sample, to be broadcast against `like` (N, ...)."""
    use = recorder.use(parameter)
    return parameter if use is None else _Expand.apply(recorder, use, parameter, like.shape[0], like.dim())


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, use: Use, parameter: Tensor, count: int, dim: int) -> Tensor:
        ctx.recorder, ctx.use_ = recorder, use
        ctx.shape, ctx.dtype = parameter.shape, parameter.dtype
        shape = parameter.shape[1:] if parameter.dim() == dim else (1,) * (dim - 1 - parameter.dim()) + parameter.shape
        return parameter.detach().reshape(1, *shape).expand(count, *shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        rows = b.reshape(len(b), *ctx.shape)
        total = ctx.use_.settle(MatrixGradient(rows)) if ctx.recorder.recording else rows.sum(0)
        return None, None, total.to(ctx.dtype), None, None


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """x + p, p * x, ... with x (N, ...) and a parameter that is broadcast over the samples."""

    def rule(recorder: Recorder, first: Any, second: Any, **options: Any) -> Any:
        for x, p, swapped in ((first, second, False), (second, first, True)):
            if not isinstance(x, Tensor) or not isinstance(p, Tensor) or not recorder.binds(p):
                continue
            over_samples = p.dim() < x.dim() or (p.dim() == x.dim() and p.shape[:1] == (1,))
            if not x.dim() or recorder.samples(x) is None or recorder.binds(x) or not over_samples:
                return NotImplemented
            q = _per_sample(recorder, p, x)
            return function(q, x, **options) if swapped else function(x, q, **options)
        return NotImplemented

    return rule


def expand(recorder: Recorder, parameter: Tensor, *sizes: Any) -> Any:
    """p.expand(N, -1, -1) of a class token or a query that every sample starts from."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    shape = parameter.shape
    inner = shape if len(sizes) == len(shape) + 1 else shape[1:] if shape[:1] == (1,) else None
    kept = inner is not None and all(size in (-1, old) for size, old in zip(sizes[1:], inner, strict=True))
    if not kept or recorder.samples(torch.empty(sizes[:1], device="meta")) is None:
        return NotImplemented
    use = recorder.use(parameter)
    return _Expand.apply(recorder, use, parameter, sizes[0], len(sizes))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recorder: Recorder, use: Use, ids: Tensor, weight: Tensor, padding_idx: int) -> Tensor:
        ctx.recorder, ctx.use_, ctx.padding_idx = recorder, use, padding_idx
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> Any:
        ids, weight = ctx.saved_tensors
        if ctx.padding_idx >= 0:
            b = b * (ids != ctx.padding_idx)[..., None]
        if ctx.recorder.recording:
            gradient = EmbeddingGradient(
                ids.reshape(len(ids), -1), b.reshape(len(ids), -1, b.shape[-1]), weight.shape[0]
            )
            by_weight = ctx.use_.settle(gradient).to(weight.dtype)
        else:
            by_weight = torch.zeros_like(weight).index_add_(0, ids.flatten(), b.flatten(0, -2).to(weight.dtype))
        return None, None, None, by_weight, None


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
    if not input.dim() or recorder.samples(input) is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    return _Embedding.apply(recorder, recorder.use(weight), input, weight, padding)


_ELEMENTWISE = (
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_),
    *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_),
    *(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide),
)

RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matmul,
    Tensor.matmul: matmul,
    Tensor.__matmul__: matmul,
    torch.mm: matmul,
    Tensor.mm: matmul,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.batch_norm: batch_norm,
    F.embedding: embedding,
    Tensor.expand: expand,
    **{function: elementwise(function) for function in _ELEMENTWISE},
}
