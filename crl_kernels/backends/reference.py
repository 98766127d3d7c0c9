"""The operators in plain PyTorch: their definition, and the implementation where no kernel runs.

Lists of tensors are read as one flat vector of P elements in list order, each tensor in row-major order. Every sum and
product is taken in float64; a result that is written to a tensor is rounded once, to that tensor's dtype (through
float32 for 16-bit dtypes, as PyTorch does). Only AdamW's own arithmetic is in its parameters' dtype, and a
convolution's per-sample gradients are computed in ``mean_dtype``.

``directions`` holds K vectors of P elements: K flat tensors, or, term by term, K lists of one tensor per parameter.
``fisher`` and ``anchor`` hold one such vector each: one flat tensor, or one tensor per parameter. A flat tensor is
(P,), or a row, (1, P), whose elements are in the order of the parameters' memory (``memory_order.py``).

Directions in int8 (``int8.py``) are lists of 2 K times as many tensors as there are parameters: of each term first
one tensor for each parameter, then one float32 tensor of scales for each parameter. A tensor of n elements in int8 has
n / L scales, each of L elements that follow one another in the parameter's row-major order, whatever its memory's. Any
other tensor of such a list has an empty tensor of scales, (0,), and so has an empty int8 tensor; so terms and
parameters in int8 stand beside others. Neither a flat tensor nor a row is in int8.

The memory order of a tensor never changes what an operator computes, except for the order in which a sum is taken. A
kernel copies nothing if the tensors that belong to one parameter have its memory order (``memory_order.py``).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .int8 import dequantised
from .memory_order import FlatOrder, is_row

_Result = TypeVar("_Result")


def takes(group: type[Any]) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """The decorated function takes its operator's first arguments together, as the named tuple ``group``."""
    count = len(group._fields)

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(function)
        def operator(*arguments: Any) -> _Result:
            return function(group(*arguments[:count]), *arguments[count:])

        return operator

    return decorate


def _pieces(vector: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """One vector as float64 tensors with the shapes of ``like``."""
    in_shape = len(vector) == len(like) == 1 and vector[0].shape == like[0].shape
    if len(vector) == 1 and not in_shape and vector[0].numel() == sum(tensor.numel() for tensor in like):
        flat = vector[0]
        vector = FlatOrder(like).split(flat[0]) if is_row(flat) else flat.flatten().split([t.numel() for t in like])
    return [piece.double().reshape(tensor.shape) for piece, tensor in zip(vector, like, strict=True)]


def _terms(directions: Sequence[Tensor], num_terms: int, like: Sequence[Tensor]) -> list[list[Tensor]]:
    size = len(directions) // num_terms
    terms = [directions[k * size : (k + 1) * size] for k in range(num_terms)]
    if size == 2 * len(like):
        terms = [list(map(dequantised, term[: len(like)], term[len(like) :])) for term in terms]
    return [_pieces(term, like) for term in terms]


def low_rank_projections(params: Sequence[Tensor], directions: Sequence[Tensor], num_terms: int) -> Tensor:
    """p_k = u_k . theta: (K,) float64."""
    values = [tensor.double() for tensor in params]
    return torch.stack(
        [
            torch.stack([(u * x).sum() for u, x in zip(term, values, strict=True)]).sum()
            for term in _terms(directions, num_terms, params)
        ]
    )


def low_rank_combine(directions: Sequence[Tensor], coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """sum_k c_k u_k, as one tensor for each of ``like``, of its shape, dtype and memory order."""
    terms = _terms(directions, coefficients.numel(), like)
    sums = [sum(c * u for c, u in zip(coefficients, pieces, strict=True)) for pieces in zip(*terms, strict=True)]
    return [torch.empty_like(tensor).copy_(total) for total, tensor in zip(sums, like, strict=True)]


def low_rank_accumulate_(targets: Sequence[Tensor], directions: Sequence[Tensor], coefficients: Tensor) -> None:
    """targets <- targets + sum_k c_k u_k."""
    _accumulate_(targets, _terms(directions, coefficients.numel(), targets), coefficients)


def _accumulate_(targets: Sequence[Tensor], terms: list[list[Tensor]], coefficients: Tensor) -> None:
    for target, *pieces in zip(targets, *terms, strict=True):
        steps = (c * u.reshape(target.shape) for c, u in zip(coefficients, pieces, strict=True))
        target.copy_(target.double() + sum(steps))


def low_rank_penalty_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    curvatures: Tensor,
    anchor_projections: Tensor,
    coefficient: Tensor,
) -> Tensor:
    """targets <- targets + c sum_k a_k (u_k . theta - b_k) u_k; returns (c / 2) sum_k a_k (u_k . theta - b_k)^2, 0-dim
    float64."""
    drift = low_rank_projections(params, directions, curvatures.numel()) - anchor_projections
    force = coefficient * curvatures * drift
    _accumulate_(targets, _terms(directions, curvatures.numel(), params), force)
    return 0.5 * (force * drift).sum()


def diagonal_quadratic(params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """sum S (theta - m)^2: 0-dim float64."""
    state = zip(params, _pieces(fisher, params), _pieces(anchor, params), strict=True)
    return torch.stack([(s * (theta.double() - m).square()).sum() for theta, s, m in state]).sum()


def diagonal_gradient(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], coefficient: Tensor
) -> list[Tensor]:
    """c S (theta - m), as one tensor for each parameter, of its dtype and memory order."""
    state = zip(params, _pieces(fisher, params), _pieces(anchor, params), strict=True)
    return [torch.empty_like(theta).copy_(coefficient * s * (theta.double() - m)) for theta, s, m in state]


def diagonal_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
) -> Tensor:
    """targets <- targets + c S (theta - m); returns sum S (theta - m)^2, 0-dim float64."""
    value = diagonal_quadratic(params, fisher, anchor)
    state = zip(targets, params, _pieces(fisher, params), _pieces(anchor, params), strict=True)
    for target, theta, s, m in state:
        target.copy_(target.double() + coefficient * s * (theta.double() - m))
    return value


def diagonal_shrink_(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], strength: Tensor
) -> None:
    """theta <- theta - w (theta - m), w = strength S / (1 + strength S); w = 0 where S = 0, 1 where it is infinite."""
    for theta, s, m in zip(params, _pieces(fisher, params), _pieces(anchor, params), strict=True):
        theta.copy_(_shrunk(theta.double(), s, m, strength))


def _shrunk(theta: Tensor, s: Tensor, m: Tensor, strength: Tensor) -> Tensor:
    x = torch.where(s == 0, 0.0, s * strength).clamp(max=torch.finfo(torch.float64).max)
    return theta - x / (1 + x) * (theta - m)


class AdamWSettings(NamedTuple):
    """A row of AdamW's ``settings``: numbers, or tensors. ``csrc/core/adamw_math.h`` has the same columns in the same
    order. t is the number of steps."""

    factor: Any  # of the gradient: 1 / its scale, negative to maximise
    beta1: Any
    beta2: Any
    decay: Any  # 1 - lr * weight_decay
    step_size: Any  # lr / (1 - beta1^t)
    root_scale: Any  # 1 / sqrt(1 - beta2^t)
    eps: Any
    share: Any  # of the penalty: the factor of a low-rank sum, or the strength of a diagonal penalty


ADAMW_COLUMNS = AdamWSettings(*range(8))  # the column of each setting


class AdamWState(NamedTuple):
    """The first arguments of AdamW's operators. ``settings`` has a float64 row of ``AdamWSettings`` for each parameter.
    Where ``found_inf``, one float32, is above 0, nothing is written, and results are of theta as it is."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    settings: Tensor
    found_inf: Tensor | None


def _begins(params: Sequence[Tensor], roundings: Sequence[Tensor] | None, found_inf: Tensor | None) -> list[Tensor]:
    """Where a step begins: theta, or, where its rounding is another number, the rounding."""
    if roundings is None:
        return list(params)
    begins = []
    for theta, rounding in zip(params, roundings, strict=True):
        kept = theta.to(rounding.dtype) == rounding
        kept = kept if found_inf is None else kept | (found_inf > 0)
        begins.append(torch.where(kept, theta, rounding.to(theta.dtype)))
    return begins


def _round_(params: Sequence[Tensor], roundings: Sequence[Tensor] | None, found_inf: Tensor | None) -> None:
    """roundings <- params, rounded to their dtypes."""
    if roundings is None:
        return
    for theta, rounding in zip(params, roundings, strict=True):
        value = theta.to(rounding.dtype)
        rounding.copy_(value if found_inf is None else torch.where(found_inf > 0, rounding, value))


def _adamw_(
    moved: Sequence[Tensor], start: Tensor, gradient: Tensor, row: AdamWSettings, found_inf: Tensor | None
) -> None:
    """Moves (theta, m, v) from ``start`` along ``gradient``. Both have theta's dtype, in which all arithmetic is."""
    _, m, v = moved
    first = m + (1 - row.beta1) * (gradient - m)
    second = row.beta2 * v + (1 - row.beta2) * gradient * gradient
    theta = row.decay * start - row.step_size * (first / (row.root_scale * second.sqrt() + row.eps))
    for target, value in zip(moved, (theta, first, second), strict=True):
        target.copy_(value if found_inf is None else torch.where(found_inf > 0, target, value))


@takes(AdamWState)
def low_rank_adamw_(
    state: AdamWState,
    directions: Sequence[Tensor],
    coefficients: Tensor,
    decoupled: bool,
    roundings: Sequence[Tensor] | None = None,
) -> Tensor:
    """A step of AdamW, with the pull q = share * sum_k c_k u_k, K >= 0, rounded to theta's dtype:

        theta <- theta + q if decoupled         g = factor * grad, + q if not decoupled
        m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
        theta <- decay * theta - step_size * m / (root_scale * sqrt(v) + eps)

    in the arithmetic of theta's dtype, float32 or float64, which m and v have too; a gradient has it, or 16 bits
    beside float32.

    ``roundings`` has a tensor for each parameter: one of 16 bits beside a float32 theta, or theta itself. Where it
    differs from theta, rounded to its dtype, the step begins with its value and not with theta's; the new theta's
    rounding is written to it.

    Returns u_k . theta after the step: (K,) float64.
    """
    params, grads, exp_avgs, exp_avg_sqs, settings, found_inf = state
    num_terms = coefficients.numel()
    terms = zip(*_terms(directions, num_terms, params), strict=True) if num_terms else [()] * len(params)
    rows = [AdamWSettings(*row) for row in settings]
    begins = _begins(params, roundings, found_inf)
    state_of = zip(params, begins, grads, exp_avgs, exp_avg_sqs, terms, rows, strict=True)
    for theta, begin, grad, m, v, pieces, row in state_of:
        pull = row.share * sum((c * u for c, u in zip(coefficients, pieces, strict=True)), torch.zeros_like(row.share))
        pull, gradient = pull.to(theta.dtype), row.factor * grad.to(theta.dtype).reshape(theta.shape)
        start, gradient = (begin + pull, gradient) if decoupled else (begin, gradient + pull)
        _adamw_((theta, m, v), start, gradient, row, found_inf)
    _round_(params, roundings, found_inf)
    return low_rank_projections(params, directions, num_terms) if num_terms else torch.empty_like(coefficients)


@takes(AdamWState)
def diagonal_adamw_(
    state: AdamWState,
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    decoupled: bool,
    roundings: Sequence[Tensor] | None = None,
) -> Tensor:
    """The same step with a diagonal penalty: q = share * S (theta - anchor) in the gradient; or, decoupled, first the
    move of ``diagonal_shrink_`` with strength = share. Either is taken in float64 and rounded to theta's dtype.

    Returns sum S (theta - anchor)^2 before the step, 0-dim float64.
    """
    params, grads, exp_avgs, exp_avg_sqs, settings, found_inf = state
    begins = _begins(params, roundings, found_inf)
    value = diagonal_quadratic(begins, fisher, anchor)
    rows = [AdamWSettings(*row) for row in settings]
    penalty = zip(_pieces(fisher, params), _pieces(anchor, params), rows, strict=True)
    for theta, begin, grad, m, v, (s, a, row) in zip(
        params, begins, grads, exp_avgs, exp_avg_sqs, penalty, strict=True
    ):
        start, gradient = begin, row.factor * grad.to(theta.dtype).reshape(theta.shape)
        if decoupled:
            start = _shrunk(begin.double(), s, a, row.share).to(theta.dtype)
        else:
            gradient = gradient + (row.share * s * (begin.double() - a)).to(theta.dtype)
        _adamw_((theta, m, v), start, gradient, row, found_inf)
    _round_(params, roundings, found_inf)
    return value


def mean_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and means of per-sample gradients of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Convolution(NamedTuple):
    """The first arguments of ``sample_weight_gradients``: a convolution of ``input`` (N, C, H, W) whose output has the
    gradient ``grad_output`` (N, O, H', W')."""

    input: Tensor
    grad_output: Tensor
    kernel_size: Sequence[int]
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(O, C / groups, kernel height, kernel width)"""
        return self.grad_output.shape[1], self.input.shape[1] // self.groups, *self.kernel_size


def sample_weight_gradient_matrix(convolution: Convolution) -> Tensor:
    """(N, O, C / groups, kernel height, kernel width): each sample's weight gradient, in ``mean_dtype`` of the
    operands' dtype. Zeros where there are no pixels."""
    input, grad_output, kernel_size, stride, padding, dilation, groups = convolution
    input, grad_output = (tensor.to(mean_dtype(tensor.dtype)) for tensor in (input, grad_output))
    weight = convolution.weight_shape
    if input.numel() == 0 or grad_output.numel() == 0:  # unfold takes no empty image
        return input.new_zeros(len(input), *weight)
    patches = torch.nn.functional.unfold(input, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
    a = patches.reshape(len(input), groups, math.prod(weight[1:]), -1)
    b = grad_output.reshape(len(input), groups, weight[0] // groups, -1)
    return (b @ a.transpose(2, 3)).reshape(len(input), *weight)


@takes(Convolution)
def sample_weight_gradients(
    convolution: Convolution, directions: Tensor | None, gram: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``matrix_statistics`` of each sample's weight gradient of a convolution."""
    return matrix_statistics(sample_weight_gradient_matrix(convolution), directions, gram, squares)


def matrix_statistics(
    matrix: Tensor, directions: Tensor | None, gram: bool, squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the gradients g_i = matrix[i]: sum_i g_i; |g_i|^2, (N,) float64; directions_k . g_i, or, without directions,
    (sum_j g_j) . g_i, (N, K) float64; g_i . g_j, (N, N) float64, or (0, 0); and sum_i g_i^2, element by element, or
    (0,). Sums have the matrix's dtype."""
    numel = matrix.shape[1:].numel()
    rows = matrix.reshape(len(matrix), numel).double()
    total = rows.sum(0)
    u = total[None] if directions is None else directions.reshape(len(directions), numel).double()
    return (
        total.reshape(matrix.shape[1:]).to(matrix.dtype),
        rows.square().sum(1),
        rows @ u.T,
        rows @ rows.T if gram else rows.new_empty(0, 0),
        rows.square().sum(0).reshape(matrix.shape[1:]).to(matrix.dtype) if squares else matrix.new_empty(0),
    )


def sample_gradient_stats(grads: Tensor, directions: Tensor | None, diagonal: bool) -> list[Tensor]:
    """[mu = mean_i g_i, |g_i|^2, g_i . mu] and, if diagonal, mean_i g_ij^2, for the rows g_i of a matrix (N, P).

    mu and the diagonal are (P,) of ``mean_dtype``; the rest is float64. mu is rounded before the projections are taken.
    With directions, (K, P) of mu's dtype, the projections are g_i . u_k, (N, K).
    """
    values = grads.double()
    mean = values.mean(0).to(mean_dtype(grads.dtype))
    projections = values @ (mean if directions is None else directions.T).double()
    results = [mean, values.square().sum(1), projections]
    return [*results, values.square().mean(0).to(mean.dtype)] if diagonal else results


def sample_gram(grads: Tensor) -> Tensor:
    """g_i . g_j for the rows of a matrix (N, P): (N, N) float64."""
    values = grads.double()
    gram = values @ values.T
    return gram.tril() + gram.tril(-1).T  # a library's product of a matrix and its transpose need not be symmetric
