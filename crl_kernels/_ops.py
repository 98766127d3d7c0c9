"""THE list of operators: every schema, fake kernel and autograd rule.

What an operator computes is written in ``backends/reference.py``; the compiled libraries register faster
implementations of the same schemas. A list of tensors stands for one flat vector.

The rank-1 penalty needs two operators that are each other's adjoint, so derivatives of any order stay in the family:

    projections(theta, U) = U theta        d/dtheta: combine(U, c) = U^T c        d/dc: projections

The diagonal penalty's value is ``diagonal_quadratic``, q = sum S (theta - m)^2; its gradient, 2 S (theta - m), is
``diagonal_gradient`` with c = 2; derivatives beyond that are plain PyTorch. Directions, Fisher and anchors are
constants.

The functions at the end are what the rest of the library calls. In eager mode they go through ``autograd.Function``,
which knows reverse mode, forward mode and vmap; a rule that is registered with ``torch.library`` alone makes
``func.jvp`` silently zero. While compiling they call the operator itself, because Dynamo refuses a Function with a jvp.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import reference, registry  # importing the registry loads the compiled libraries

SCHEMAS = (
    "low_rank_projections(Tensor[] params, Tensor[] directions, int num_terms) -> Tensor",
    "low_rank_combine(Tensor[] directions, Tensor coefficients, Tensor[] like) -> Tensor[]",
    "low_rank_accumulate_(Tensor(a!)[] targets, Tensor[] directions, Tensor coefficients) -> ()",
    "low_rank_penalty_accumulate_(Tensor(a!)[] targets, Tensor[] params, Tensor[] directions, Tensor curvatures,"
    " Tensor anchor_projections, Tensor coefficient) -> Tensor",
    "diagonal_quadratic(Tensor[] params, Tensor[] fisher, Tensor[] anchor) -> Tensor",
    "diagonal_gradient(Tensor[] params, Tensor[] fisher, Tensor[] anchor, Tensor coefficient) -> Tensor[]",
    "diagonal_accumulate_(Tensor(a!)[] targets, Tensor[] params, Tensor[] fisher, Tensor[] anchor, Tensor coefficient)"
    " -> Tensor",
    "diagonal_shrink_(Tensor(a!)[] params, Tensor[] fisher, Tensor[] anchor, Tensor strength) -> ()",
    "low_rank_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor settings, Tensor? found_inf, Tensor[] directions, Tensor coefficients, bool decoupled) -> Tensor",
    "diagonal_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor settings, Tensor? found_inf, Tensor[] fisher, Tensor[] anchor, bool decoupled) -> Tensor",
    "sample_weight_gradients(Tensor input, Tensor grad_output, int[] kernel_size, int[] stride, int[] padding,"
    " int[] dilation, int groups, Tensor? directions, bool gram, bool squares)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "sample_gradient_stats(Tensor grads, Tensor? directions, bool diagonal) -> Tensor[]",
    "sample_gram(Tensor grads) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)

_library = torch.library.Library("crl_kernels", "DEF")
for _schema, _name in zip(SCHEMAS, NAMES, strict=True):
    _library.define(_schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
registry.register(NAMES)

_ops = torch.ops.crl_kernels


# Fake kernels: shapes and dtypes of results, for torch.compile and torch.export.

_FAKES: dict[str, Callable[..., Any]] = {
    "low_rank_projections": lambda params, directions, num_terms: _float64(params, (num_terms,)),
    "low_rank_combine": lambda directions, coefficients, like: [tensor.new_empty(tensor.shape) for tensor in like],
    "low_rank_accumulate_": lambda targets, directions, coefficients: None,
    "low_rank_penalty_accumulate_": lambda targets, params, directions, a, b, coefficient: _float64(params, ()),
    "diagonal_quadratic": lambda params, fisher, anchor: _float64(params, ()),
    "diagonal_gradient": lambda params, fisher, anchor, coefficient: [p.new_empty(p.shape) for p in params],
    "diagonal_accumulate_": lambda targets, params, fisher, anchor, coefficient: _float64(params, ()),
    "diagonal_shrink_": lambda params, fisher, anchor, strength: None,
    "low_rank_adamw_": lambda params, grads, m, v, settings, found_inf, directions, coefficients, decoupled: _float64(
        params, (coefficients.numel(),)
    ),
    "diagonal_adamw_": lambda params, *arguments: _float64(params, ()),
    "sample_weight_gradients": lambda *arguments: _fake_sample_weight_gradients(*arguments),
    "sample_gradient_stats": lambda grads, directions, diagonal: _fake_stats(grads, directions, diagonal),
    "sample_gram": lambda grads: _float64([grads], (grads.shape[0], grads.shape[0])),
}


def _fake_sample_weight_gradients(
    input: Tensor,
    grad_output: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    directions: Tensor | None,
    gram: bool,
    squares: bool,
) -> tuple[Tensor, ...]:
    count, num_directions = input.shape[0], 1 if directions is None else directions.shape[0]
    weight = (grad_output.shape[1], input.shape[1] // groups, *kernel_size)
    side = count if gram else 0
    dtype, float64 = reference.mean_dtype(input.dtype), torch.float64
    return (
        input.new_empty(weight, dtype=dtype),
        input.new_empty(count, dtype=float64),
        input.new_empty(count, num_directions, dtype=float64),
        input.new_empty(side, side, dtype=float64),
        input.new_empty(weight if squares else 0, dtype=dtype),
    )


def _float64(params: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return params[0].new_empty(shape, dtype=torch.float64)


def _fake_stats(grads: Tensor, directions: Tensor | None, diagonal: bool) -> list[Tensor]:
    num_rows, num_columns = grads.shape
    of_columns = [grads.new_empty(num_columns, dtype=reference.mean_dtype(grads.dtype)) for _ in range(1 + diagonal)]
    projections = (num_rows,) if directions is None else (num_rows, directions.shape[0])
    return [of_columns[0], _float64([grads], (num_rows,)), _float64([grads], projections), *of_columns[1:]]


for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"crl_kernels::{_name}", _fake)


# Reverse mode of the operators themselves: what compiled graphs use.


def _setup_projections(ctx: Any, inputs: Any, output: Any) -> None:
    params, directions, _ = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(*params, *directions)


def _backward_projections(ctx: Any, grad: Tensor) -> Any:
    tensors = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    params, directions = tensors[: ctx.num_params], tensors[ctx.num_params :]
    return _ops.low_rank_combine(directions, grad, params), [None] * len(directions), None


def _setup_combine(ctx: Any, inputs: Any, output: Any) -> None:
    directions, coefficients, like = inputs
    ctx.num_terms, ctx.num_like = coefficients.numel(), len(like)
    ctx.save_for_backward(*directions)


def _backward_combine(ctx: Any, grads: Sequence[Tensor]) -> Any:
    directions = ctx.saved_tensors
    projections = _ops.low_rank_projections(grads, directions, ctx.num_terms)
    return [None] * len(directions), projections, [None] * ctx.num_like


def _setup_quadratic(ctx: Any, inputs: Any, output: Any) -> None:
    params, fisher, anchor = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(*params, *fisher, *anchor)


def _backward_quadratic(ctx: Any, grad: Tensor) -> Any:
    params, fisher, anchor = _split(ctx.saved_tensors, ctx.num_params)
    return _ops.diagonal_gradient(params, fisher, anchor, 2 * grad), [None] * len(fisher), [None] * len(anchor)


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


# Reverse mode, forward mode and vmap of eager mode. Lists are passed flat, because a Function sees only tensors that
# are arguments themselves; a leading number says where they are cut.


def _vmap_by_loop(function: type[torch.autograd.Function], info: Any, in_dims: Any, args: Any) -> Any:
    """One call per element of the batch: correct for every choice of batched arguments."""
    results = [
        function.apply(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _zeros_for_none(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like, strict=True)]


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(num_terms: int, num_params: int, *tensors: Tensor) -> Tensor:
        result: Tensor = _ops.low_rank_projections(tensors[:num_params], tensors[num_params:], num_terms)
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
        return _Projections.apply(ctx.num_terms, ctx.num_params, *moved, *directions)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_by_loop(_Projections, info, in_dims, args)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(num_directions: int, coefficients: Tensor, *tensors: Tensor) -> Any:
        return tuple(_ops.low_rank_combine(tensors[:num_directions], coefficients, tensors[num_directions:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.num_directions, coefficients, *tensors = inputs
        ctx.num_terms = coefficients.numel()
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        by_coefficients = _Projections.apply(ctx.num_terms, len(grads), *grads, *tensors[: ctx.num_directions])
        return (None, by_coefficients, *(None for _ in tensors))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        directions, like = ctx.saved_tensors[: ctx.num_directions], ctx.saved_tensors[ctx.num_directions :]
        moved = tangents[1] if tangents[1] is not None else directions[0].new_zeros(ctx.num_terms, dtype=torch.float64)
        return _Combine.apply(ctx.num_directions, moved, *directions, *like)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_by_loop(_Combine, info, in_dims, args)


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(num_params: int, *tensors: Tensor) -> Tensor:
        result: Tensor = _ops.diagonal_quadratic(*_split(tensors, num_params))
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

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_by_loop(_Quadratic, info, in_dims, args)


class _QuadraticGradient(torch.autograd.Function):
    @staticmethod
    def forward(num_params: int, coefficient: Tensor, *tensors: Tensor) -> Any:
        return tuple(_ops.diagonal_gradient(*_split(tensors, num_params), coefficient))

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

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap_by_loop(_QuadraticGradient, info, in_dims, args)


# What the library calls.


def _inside_transform() -> bool:
    """Whether code is being compiled inside of torch.func.grad, jvp or vmap.

    There a custom operator has no forward mode (its tangent would be silently zero) and no vmap; plain PyTorch has all.
    """
    return torch._C._functorch.maybe_current_level() is not None


# What torch.compiler.assume_constant_result does, which imports all of Dynamo, and Triton with it, to do it.
_inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def low_rank_projections(params: Sequence[Tensor], directions: Sequence[Tensor], num_terms: int) -> Tensor:
    """u_k . theta, (K,) float64; differentiable by the parameters."""
    if torch.compiler.is_compiling():
        if _inside_transform():
            return reference.low_rank_projections(params, directions, num_terms)
        result: Tensor = _ops.low_rank_projections(params, directions, num_terms)
        return result
    result = _Projections.apply(num_terms, len(params), *params, *directions)
    return result


def constant_projections(params: Sequence[Tensor], directions: Sequence[Tensor], num_terms: int) -> Tensor:
    """The same under ``torch.no_grad``, without what makes it differentiable: for 100 small tensors 65 us, not 165."""
    result: Tensor = _ops.low_rank_projections(params, directions, num_terms)
    return result


def low_rank_combine(directions: Sequence[Tensor], coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """sum_k c_k u_k, as one tensor for each of ``like``, under ``torch.no_grad``."""
    result: list[Tensor] = _ops.low_rank_combine(directions, coefficients, like)
    return result


def low_rank_accumulate_(targets: Sequence[Tensor], directions: Sequence[Tensor], coefficients: Tensor) -> None:
    """targets <- targets + sum_k c_k u_k, under ``torch.no_grad``."""
    _ops.low_rank_accumulate_(targets, directions, coefficients)
    torch.autograd.graph.increment_version(targets)


def low_rank_penalty_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    curvatures: Tensor,
    anchor_projections: Tensor,
    coefficient: Tensor,
) -> Tensor:
    """targets <- targets + c sum_k a_k (u_k . theta - b_k) u_k, under ``torch.no_grad``; returns the penalty,
    (c / 2) sum_k a_k (u_k . theta - b_k)^2, 0-dim float64."""
    value: Tensor = _ops.low_rank_penalty_accumulate_(
        targets, params, directions, curvatures, anchor_projections, coefficient
    )
    torch.autograd.graph.increment_version(targets)
    return value


def diagonal_quadratic(params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """sum S (theta - m)^2, 0-dim float64; differentiable by the parameters."""
    if torch.compiler.is_compiling():
        if _inside_transform():
            return reference.diagonal_quadratic(params, fisher, anchor)
        result: Tensor = _ops.diagonal_quadratic(params, fisher, anchor)
        return result
    result = _Quadratic.apply(len(params), *params, *fisher, *anchor)
    return result


def diagonal_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
) -> Tensor:
    """targets <- targets + c S (theta - m), under ``torch.no_grad``; returns sum S (theta - m)^2, 0-dim float64."""
    value: Tensor = _ops.diagonal_accumulate_(targets, params, fisher, anchor, coefficient)
    torch.autograd.graph.increment_version(targets)
    return value


def diagonal_shrink_(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], strength: Tensor
) -> None:
    """theta <- theta - w (theta - m), w = strength S / (1 + strength S), under ``torch.no_grad``."""
    _ops.diagonal_shrink_(params, fisher, anchor, strength)
    torch.autograd.graph.increment_version(params)


class AdamWState(NamedTuple):
    """What AdamW moves, what it reads, and how: the first arguments of its operators (see ``reference.py``)."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    settings: Tensor
    found_inf: Tensor | None

    def _increment_versions(self) -> None:
        torch.autograd.graph.increment_version([*self.params, *self.exp_avgs, *self.exp_avg_sqs])


def low_rank_adamw_(state: AdamWState, directions: Sequence[Tensor], coefficients: Tensor, decoupled: bool) -> Tensor:
    """A step of AdamW with sum_k c_k u_k in the gradient, or, decoupled, added before, under ``torch.no_grad``; returns
    u_k . theta after it, (K,) float64."""
    projections: Tensor = _ops.low_rank_adamw_(*state, directions, coefficients, decoupled)
    state._increment_versions()
    return projections


def diagonal_adamw_(state: AdamWState, fisher: Sequence[Tensor], anchor: Sequence[Tensor], decoupled: bool) -> Tensor:
    """A step of AdamW with the diagonal penalty's gradient, or, decoupled, its proximal step before, under
    ``torch.no_grad``; returns sum S (theta - m)^2 before it, 0-dim float64."""
    value: Tensor = _ops.diagonal_adamw_(*state, fisher, anchor, decoupled)
    state._increment_versions()
    return value
