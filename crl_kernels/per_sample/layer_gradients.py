"""Per-sample gradients of one use of a parameter, and their statistics, by kind of layer.

A layer's backward pass has the layer's input a and the gradient b of its output, for all N samples at once:

    linear        g_i = sum_t b_it a_it^T                       (T tokens)
    convolution   g_i[o, c, ky, kx] = sum_yx b_i[o, y, x] a_i[c, y + ky, x + kx], strided, dilated, by groups
    embedding     g_i[v] = sum of b_it over the tokens t with id v
    the rest      g_i itself, small: biases, scales and shifts, broadcast parameters

Each class computes ``statistics(wanted)`` without a matrix of all g_i where it can, and that matrix as ``matrix()``.
All statistics are sums over parameters, so a model's statistics are the sums over its layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .. import operators  # noqa: F401  (defines the operators)
from ..backends import reference
from ..backends.reference import Convolution

_TILE = 2**24  # numbers of per-sample gradients that sums with weights hold at a time


@dataclass(frozen=True)
class Wanted:
    """The statistics to take, in addition to the sum and the square norms."""

    directions: Tensor | None = None  # (K, *shape); None: project on the batch's own sum
    gram: bool = False
    squares: bool = False


@dataclass(frozen=True)
class Statistics:
    """Statistics of one parameter, or of a part of one."""

    sum: Tensor  # sum_i g_i, (*shape)
    sq_norms: Tensor  # (N,) float64
    projections: Tensor  # (N, K) float64; (N, 1) on the sum
    gram: Tensor | None  # (N, N) float64
    squares: Tensor | None  # sum_i g_i^2, (*shape)


class SampleGradient(Protocol):
    """The gradients g_i of one use of a parameter."""

    def statistics(self, wanted: Wanted) -> Statistics: ...

    def matrix(self) -> Tensor:
        """(N, *shape), float32 or float64."""
        ...

    def weighted_sums(self, weights: Tensor) -> Tensor:
        """sum_i w_ki g_i for weights (K, N): (K, *shape), float32 or float64."""
        ...


def _at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit numbers are summed as float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _in_tiles(weights: Tensor, numbers: int, matrix_of: Callable[[slice], Tensor]) -> Tensor:
    """weights (K, N) times the (N, *shape) gradients of N samples. As many samples' gradients are computed at once as
    fit in _TILE, at least one; one sample takes ``numbers`` of it."""
    count, sums = weights.shape[1], None
    step = max(1, _TILE // max(1, numbers))
    for begin in range(0, max(1, count), step):
        samples = slice(begin, begin + step)
        matrix = matrix_of(samples)
        if sums is None:
            sums = matrix.new_zeros(len(weights), *matrix.shape[1:])
        sums.flatten(1).addmm_(weights[:, samples].to(matrix.dtype), matrix.flatten(1))
    assert sums is not None
    return sums


class MatrixGradient:
    """Gradients as a matrix: (N, *shape)."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = _at_least_float32(matrix)

    def matrix(self) -> Tensor:
        return self._matrix

    def weighted_sums(self, weights: Tensor) -> Tensor:
        rows = weights.to(self._matrix.dtype) @ self._matrix.reshape(len(self._matrix), -1)
        return rows.reshape(len(weights), *self._matrix.shape[1:])

    def statistics(self, wanted: Wanted) -> Statistics:
        return _statistics(
            reference.matrix_statistics(self._matrix, wanted.directions, wanted.gram, wanted.squares), wanted
        )


def _statistics(results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], wanted: Wanted) -> Statistics:
    """Results of ``matrix_statistics``, without those that are empty because they are not wanted."""
    total, sq_norms, projections, gram, squares = results
    return Statistics(total, sq_norms, projections, gram if wanted.gram else None, squares if wanted.squares else None)


class ConvolutionGradient:
    """Gradients of a convolution's weight (O, C / groups, kh, kw). 16-bit operands stay 16-bit, for a GPU's tensor
    cores; sums are float32."""

    def __init__(self, convolution: Convolution) -> None:
        self._convolution = convolution

    def matrix(self) -> Tensor:
        return reference.sample_weight_gradient_matrix(self._convolution)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        input, grad_output, *_ = self._convolution

        def matrix_of(samples: slice) -> Tensor:
            part = self._convolution._replace(input=input[samples], grad_output=grad_output[samples])
            return reference.sample_weight_gradient_matrix(part)

        patches = input.shape[1] * math.prod(self._convolution.kernel_size) * grad_output.shape[2:].numel()
        return _in_tiles(weights, patches + math.prod(self._convolution.weight_shape), matrix_of)

    def statistics(self, wanted: Wanted) -> Statistics:
        # Few pixels: as a linear layer on patches, 256 -> 256, 3 x 3, at 2 x 2 pixels, N = 32, in 6.9 ms against 15.0.
        # The shifted Gram, without patches, is never the cheapest: 11.6 ms there, 24.1 against 19.8 at 4 x 4, 25.9
        # against 13.3 for 128 -> 128 at 7 x 7, 636 against 18 for 64 -> 32 at 28 x 28 (layer_rules_cpu_1thread.md).
        input, grad_output, kernel_size, stride, padding, dilation, groups = self._convolution
        out, pixels = grad_output.shape[1], grad_output.shape[2] * grad_output.shape[3]
        d_in = input.shape[1] * kernel_size[0] * kernel_size[1]
        if groups == 1 and not wanted.squares and _gram_is_cheaper(pixels, d_in, out, wanted.gram):
            geometry = (tuple(pair) for pair in (kernel_size, dilation, padding, stride))
            patches = functional.unfold(_at_least_float32(input), *geometry).mT
            if patches.shape[1] == pixels:
                linear = LinearGradient(patches, grad_output.flatten(2).mT)
                return Reshaped(linear, (out, d_in), self._convolution.weight_shape).statistics(wanted)
        u = None if wanted.directions is None else wanted.directions.to(reference.mean_dtype(input.dtype))
        operator = torch.ops.crl_kernels.sample_weight_gradients
        return _statistics(operator(*self._convolution, u, wanted.gram, wanted.squares), wanted)


class Reshaped:
    """The gradients ``inner`` of a parameter of ``inner_shape``, as gradients of a parameter of ``shape`` with the same
    elements in the same order."""

    def __init__(self, inner: SampleGradient, inner_shape: Sequence[int], shape: Sequence[int]) -> None:
        self._inner, self._inner_shape, self._shape = inner, tuple(inner_shape), tuple(shape)

    def matrix(self) -> Tensor:
        return self._inner.matrix().reshape(-1, *self._shape)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        return self._inner.weighted_sums(weights).reshape(len(weights), *self._shape)

    def statistics(self, wanted: Wanted) -> Statistics:
        u = wanted.directions
        u = None if u is None else u.reshape(len(u), *self._inner_shape)
        inner = self._inner.statistics(Wanted(u, wanted.gram, wanted.squares))
        squares = None if inner.squares is None else inner.squares.reshape(self._shape)
        return Statistics(inner.sum.reshape(self._shape), inner.sq_norms, inner.projections, inner.gram, squares)


def _gram_is_cheaper(tokens: int, d_in: int, d_out: int, gram: bool) -> bool:
    """Whether the Gram rule of LinearGradient takes less time than the operator, on a CPU.

    With h = d_in d_out / (d_in + d_out), it does where T <= h / 16; with the samples' Gram matrix, T^2 <= h / 3 must
    hold too.

    The operator spends as much on statistics of its d_in d_out elements as on tens of tokens, the Gram rule's products
    grow as T^2 (d_in + d_out). In benchmarks/results/layer_rules_cpu_1thread.md they cross, N = 32, Gram against
    operator in ms: 128 -> 128 between 2 tokens (0.53, 0.56) and 4 (0.64, 0.58); 128 -> 512 between 4 (1.33, 1.84) and
    8 (2.45, 2.01); 512 -> 512 at 16 (9.48, 9.57); 1024 -> 1024 beyond 16 (33.1, 38.4). The Gram matrix is (N T)^2
    (d_in + d_out) against N^2 d_in d_out, so N divides out: 128 -> 512, 4 tokens, 2.20 against 3.60 for N = 32, 14.9
    against 26.9 for N = 128; 8 tokens, 5.12 against 3.85 and 48.6 against 28.4.

    Where a device has no kernel, the operator materialises every g_i, and the Gram rule would be faster for more tokens
    than these; that is not measured.
    """
    size, widths = d_in * d_out, d_in + d_out
    return 16 * tokens * widths <= size and (not gram or 3 * tokens**2 * widths <= size)


class LinearGradient:
    """Gradients of a linear layer's weight (O, C): input (N, T, C), grad_output (N, T, O).

    Many tokens: as a convolution with a 1 x 1 kernel. Few (_gram_is_cheaper): without g_i at all, from

        |g_i|^2 = sum_ts (a_it . a_is) (b_it . b_is),    u . g_i = sum_t b_it . (u a_it)

    which costs two matrix products of the layer's size.
    """

    def __init__(self, input: Tensor, grad_output: Tensor) -> None:
        self._a, self._b = input, grad_output

    def matrix(self) -> Tensor:
        return _at_least_float32(self._b).transpose(1, 2) @ _at_least_float32(self._a)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        a, b = _at_least_float32(self._a), _at_least_float32(self._b)
        (count, tokens, d_in), d_out = a.shape, b.shape[2]
        used = weights != 0
        # Multiply-adds for each element of the weight: on the left, one product for each row with the samples that it
        # uses; on the right, all g_i and then the rows' sums of them.
        if int(used.sum()) * tokens > count * (tokens + len(weights)):
            return _in_tiles(weights, d_in * d_out, lambda samples: b[samples].transpose(1, 2) @ a[samples])
        sums = a.new_empty(len(weights), d_out, d_in)
        for row, samples, total in zip(weights.to(b.dtype), used, sums, strict=True):
            torch.mm((row[samples, None, None] * b[samples]).flatten(0, 1).T, a[samples].flatten(0, 1), out=total)
        return sums

    def statistics(self, wanted: Wanted) -> Statistics:
        tokens, d_in, d_out = self._a.shape[1], self._a.shape[2], self._b.shape[2]
        if wanted.squares or not _gram_is_cheaper(tokens, d_in, d_out, wanted.gram):
            return self._as_convolution().statistics(wanted)
        a, b = _at_least_float32(self._a), _at_least_float32(self._b)
        total = b.flatten(0, 1).T @ a.flatten(0, 1)
        u = total[None] if wanted.directions is None else wanted.directions.to(a.dtype)
        a64, b64 = a.double(), b.double()
        if wanted.gram:
            a_rows, b_rows = a64.flatten(0, 1), b64.flatten(0, 1)
            products = (a_rows @ a_rows.T) * (b_rows @ b_rows.T)
            gram = products.unflatten(0, (-1, tokens)).unflatten(2, (-1, tokens)).sum((1, 3))
            sq_norms = gram.diagonal()
        else:
            gram = None
            sq_norms = ((a64 @ a64.transpose(1, 2)) * (b64 @ b64.transpose(1, 2))).sum((1, 2))
        projections = torch.stack([((a @ direction.T) * b).sum((1, 2), dtype=torch.float64) for direction in u], 1)
        return Statistics(total, sq_norms, projections, gram, None)

    def _as_convolution(self) -> Reshaped:
        shape = (self._b.shape[2], self._a.shape[2])
        a, b = (tensor.transpose(1, 2).unsqueeze(2) for tensor in (self._a, self._b))  # (N, channels, 1, T)
        return Reshaped(ConvolutionGradient(Convolution(a, b, (1, 1))), (*shape, 1, 1), shape)


class EmbeddingGradient:
    """Gradients of an embedding's table (V, D): ids (N, T), grad_output (N, T, D)."""

    def __init__(self, ids: Tensor, grad_output: Tensor, num_embeddings: int) -> None:
        self._ids, self._b, self._num_embeddings = ids, _at_least_float32(grad_output), num_embeddings

    def _scatter(self, values: Tensor) -> Tensor:
        """(N, T, D) -> (N, V, D)"""
        count, _, width = values.shape
        result = values.new_zeros(count, self._num_embeddings, width)
        return result.scatter_add_(1, self._ids[..., None].expand_as(values), values)

    def matrix(self) -> Tensor:
        return self._scatter(self._b)

    def weighted_sums(self, weights: Tensor) -> Tensor:
        sums = self._b.new_zeros(len(weights), self._num_embeddings, self._b.shape[2])
        for row, total in zip(weights.to(self._b.dtype), sums, strict=True):
            total.index_add_(0, self._ids.flatten(), (row[:, None, None] * self._b).flatten(0, 1))
        return sums

    def statistics(self, wanted: Wanted) -> Statistics:
        ids, b = self._ids, self._b.double()
        table = (self._num_embeddings, b.shape[2])
        total = b.new_zeros(table).index_add_(0, ids.flatten(), b.flatten(0, 1))
        # Each sample's gradient has rows at its ids only: tokens with the same id are summed at the first of them.
        same = ids[:, :, None] == ids[:, None, :]
        first = ~same.tril(-1).any(2)
        rows = (same.double() @ b) * first[..., None]
        u = total[None] if wanted.directions is None else wanted.directions.double()
        projections = torch.stack([(rows * direction[ids]).sum((1, 2)) for direction in u], 1)
        gram = None
        if wanted.gram:
            flat, flat_ids = rows.flatten(0, 1), ids.flatten()
            products = (flat @ flat.T) * (flat_ids[:, None] == flat_ids)
            gram = products.unflatten(0, ids.shape).unflatten(2, ids.shape).sum((1, 3))
        squares = None
        if wanted.squares:
            squares = b.new_zeros(table).index_add_(0, ids.flatten(), rows.square().flatten(0, 1)).to(self._b.dtype)
        return Statistics(total.to(self._b.dtype), rows.square().sum((1, 2)), projections, gram, squares)
