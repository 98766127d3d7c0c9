"""Derivatives of the operators: reverse mode, forward mode, vmap.

The rank-1 penalty needs two operators, each the other's adjoint, so derivatives of any order use only these two:

    projections(theta, U) = U theta        d/dtheta: combine(U, c) = U^T c        d/dc: projections

The diagonal penalty's value is ``diagonal_quadratic``, q = sum S (theta - m)^2; its gradient, 2 S (theta - m), is
``diagonal_gradient`` with c = 2; derivatives beyond that are plain PyTorch. Directions, Fisher and anchors are
constants.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from .definitions import ops

# Reverse mode of the operators themselves, for compiled graphs.


def _setup_projections(ctx: Any, inputs: Any, output: Any) -> None:
    params, directions, _ = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(*params, *directions)


def _backward_projections(ctx: Any, grad: Tensor) -> Any:
    tensors = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    params, directions = tensors[: ctx.num_params], tensors[ctx.num_params :]
    return ops.low_rank_combine(directions, grad, params), [None] * len(directions), None


def _setup_combine(ctx: Any, inputs: Any, output: Any) -> None:
    directions, coefficients, like = inputs
    ctx.num_terms, ctx.num_like = coefficients.numel(), len(like)
    ctx.save_for_backward(*directions)


def _backward_combine(ctx: Any, grads: Sequence[Tensor]) -> Any:
    directions = ctx.saved_tensors
    projections = ops.low_rank_projections(grads, directions, ctx.num_terms)
    return [None] * len(directions), projections, [None] * ctx.num_like


def _setup_quadratic(ctx: Any, inputs: Any, output: Any) -> None:
    params, fisher, anchor = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(*params, *fisher, *anchor)


def _backward_quadratic(ctx: Any, grad: Tensor) -> Any:
    params, fisher, anchor = _split(ctx.saved_tensors, ctx.num_params)
    return ops.diagonal_gradient(params, fisher, anchor, 2 * grad), [None] * len(fisher), [None] * len(anchor)


def _setup_gradient(ctx: Any, inputs: Any, output: Any) -> None:
    params, fisher, anchor, coefficient = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(coefficient, *params, *fisher, *anchor)


def _backward_gradient(ctx: Any, grads: Sequence[Tensor]) -> Any:
    coefficient, *tensors = ctx.saved_tensors
    params, fisher, anchor = _split(tensors, ctx.num_params)
    by_params, by_coefficient = _diagonal_gradient_vjp(params, fisher, anchor, coefficient, grads)
    return by_params, [None] * len(fisher), [None] * len(anchor), by_coefficient


def _split(tensors: Sequence[Tensor], num_params: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """(params, fisher, anchor), the last two of equal length."""
    middle = (num_params + len(tensors)) // 2
    return tensors[:num_params], tensors[num_params:middle], tensors[middle:]


def _diagonal_gradient_vjp(
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
    grads: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Derivatives of sum grads . c S (theta - m) by theta and by c, differentiable again."""
    state = zip(params, reference._pieces(fisher, params), reference._pieces(anchor, params), grads, strict=True)
    weighted = [(theta.double() - m, s * grad.double()) for theta, s, m, grad in state]
    by_params = [(coefficient * sg).to(theta.dtype) for theta, (_, sg) in zip(params, weighted, strict=True)]
    return by_params, torch.stack([(distance * sg).sum() for distance, sg in weighted]).sum()


for _name, _backward, _setup in (
    ("low_rank_projections", _backward_projections, _setup_projections),
    ("low_rank_combine", _backward_combine, _setup_combine),
    ("diagonal_quadratic", _backward_quadratic, _setup_quadratic),
    ("diagonal_gradient", _backward_gradient, _setup_gradient),
):
    torch.library.register_autograd(f"crl_kernels::{_name}", _backward, setup_context=_setup)


# Reverse mode, forward mode and vmap in eager mode. Lists are passed flat, because a Function sees only tensors that
# are arguments themselves; a leading number says where to split them.


class _VmapByLoop(torch.autograd.Function):
    """Under vmap, one call per element of the batch: correct for every choice of batched arguments."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        results = [
            cls.apply(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


def _zeros_for_none(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like, strict=True)]


class Projections(_VmapByLoop):
    @staticmethod
    def forward(num_terms: int, num_params: int, *tensors: Tensor) -> Tensor:
        result: Tensor = ops.low_rank_projections(tensors[:num_params], tensors[num_params:], num_terms)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.num_terms, ctx.num_params, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors  # once: activation checkpointing refuses a second look
        params, directions = tensors[: ctx.num_params], tensors[ctx.num_params :]
        by_params = _Combine.apply(len(directions), grads[0], *directions, *params)
        return (None, None, *by_params, *(None for _ in directions))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        params, directions = ctx.saved_tensors[: ctx.num_params], ctx.saved_tensors[ctx.num_params :]
        moved = _zeros_for_none(tangents[2 : 2 + ctx.num_params], params)
        return Projections.apply(ctx.num_terms, ctx.num_params, *moved, *directions)


class _Combine(_VmapByLoop):
    @staticmethod
    def forward(num_directions: int, coefficients: Tensor, *tensors: Tensor) -> Any:
        return tuple(ops.low_rank_combine(tensors[:num_directions], coefficients, tensors[num_directions:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.num_directions, coefficients, *tensors = inputs
        ctx.num_terms = coefficients.numel()
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        by_coefficients = Projections.apply(ctx.num_terms, len(grads), *grads, *tensors[: ctx.num_directions])
        return (None, by_coefficients, *(None for _ in tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        directions, like = ctx.saved_tensors[: ctx.num_directions], ctx.saved_tensors[ctx.num_directions :]
        moved = tangents[1] if tangents[1] is not None else directions[0].new_zeros(ctx.num_terms, dtype=torch.float64)
        return _Combine.apply(ctx.num_directions, moved, *directions, *like)


class Quadratic(_VmapByLoop):
    @staticmethod
    def forward(num_params: int, *tensors: Tensor) -> Tensor:
        result: Tensor = ops.diagonal_quadratic(*_split(tensors, num_params))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.num_params, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        by_params = _QuadraticGradient.apply(ctx.num_params, 2 * grads[0], *tensors)
        return (None, *by_params, *(None for _ in tensors[ctx.num_params :]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        params, fisher, anchor = _split(ctx.saved_tensors, ctx.num_params)
        moved = _zeros_for_none(tangents[1 : 1 + len(params)], params)
        two = params[0].new_full((), 2.0, dtype=torch.float64)
        return _diagonal_gradient_vjp(params, fisher, anchor, two, moved)[1] * two


class _QuadraticGradient(_VmapByLoop):
    @staticmethod
    def forward(num_params: int, coefficient: Tensor, *tensors: Tensor) -> Any:
        return tuple(ops.diagonal_gradient(*_split(tensors, num_params), coefficient))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.num_params, coefficient, *tensors = inputs
        ctx.save_for_backward(coefficient, *tensors)
        ctx.save_for_forward(coefficient, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        coefficient, *tensors = ctx.saved_tensors
        params, fisher, anchor = _split(tensors, ctx.num_params)
        by_params, by_coefficient = _diagonal_gradient_vjp(params, fisher, anchor, coefficient, grads)
        return (None, by_coefficient, *by_params, *(None for _ in range(len(fisher) + len(anchor))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        coefficient, *tensors = ctx.saved_tensors
        params, fisher, anchor = _split(tensors, ctx.num_params)
        moved = _zeros_for_none(tangents[2 : 2 + len(params)], params)
        by_coefficient = torch.zeros_like(coefficient) if tangents[1] is None else tangents[1]
        state = zip(params, moved, reference._pieces(fisher, params), reference._pieces(anchor, params), strict=True)
        return tuple(
            (s * (coefficient * t.double() + by_coefficient * (theta.double() - m))).to(theta.dtype)
            for theta, t, s, m in state
        )


def inside_transform() -> bool:
    """Whether code is being compiled inside torch.func.grad, jvp or vmap.

    There a custom operator has no forward mode (its tangent would silently be zero) and no vmap; plain PyTorch has
    both.
    """
    return torch._C._functorch.maybe_current_level() is not None


# The effect of torch.compiler.assume_constant_result, which would import all of Dynamo, and Triton with it.
inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
