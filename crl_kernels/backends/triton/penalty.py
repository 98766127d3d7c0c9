"""The penalties' operators in Triton, low-rank and diagonal. ``reference.py`` defines them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import penalty_kernels
from .chunks import NUM_WARPS
from .operands import Flat, Target, check_state, check_targets, on_device_of_first
from .reductions import LANES, finish
from .tables import View


def _partial_projections(flat: Flat, params: Sequence[Tensor], u: View, num_terms: int) -> Tensor:
    """(K, chunks): each chunk's share of u_k . theta."""
    theta = flat.view(params)
    partial = flat.empty_float64(num_terms, flat.chunks)
    flat.run(
        penalty_kernels.projections_kernel,
        *theta.vector,
        *u.terms,
        num_terms,
        partial,
        PARAMS=theta.dtypes,
        DIRECTIONS=u.dtypes,
    )
    return partial


def _combine(flat: Flat, targets: View, u: View, coefficients: Tensor, overwrite: bool) -> None:
    flat.run(
        penalty_kernels.combine_kernel,
        *targets.vector,
        *u.terms,
        coefficients.numel(),
        coefficients,
        TARGETS=targets.dtypes,
        DIRECTIONS=u.dtypes,
        OVERWRITE=overwrite,
    )


@on_device_of_first
def low_rank_projections(params: Sequence[Tensor], directions: Sequence[Tensor], num_terms: int) -> Tensor:
    flat = Flat(params, None, directions, num_terms)
    partial = _partial_projections(flat, params, flat.directions(), num_terms)
    return finish(partial, flat.empty_float64(num_terms))


@on_device_of_first
def low_rank_combine(directions: Sequence[Tensor], coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    result = [torch.empty_like(tensor) for tensor in like]
    num_terms = coefficients.numel()
    flat = Flat(result, None, directions, num_terms)
    target = Target(flat, result)
    _combine(flat, target.view, flat.directions(), flat.numbers(coefficients, num_terms), overwrite=True)
    target.write_back()
    return result


@on_device_of_first
def low_rank_accumulate_(targets: Sequence[Tensor], directions: Sequence[Tensor], coefficients: Tensor) -> None:
    num_terms = coefficients.numel()
    flat = Flat(targets, None, directions, num_terms)
    u, c = flat.directions(), flat.numbers(coefficients, num_terms)
    target = Target(flat, targets)
    _combine(flat, target.view, u, c, overwrite=False)
    target.write_back()


@on_device_of_first
def low_rank_penalty_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    curvatures: Tensor,
    anchor_projections: Tensor,
    coefficient: Tensor,
) -> Tensor:
    """Two passes, because the force of each term needs the drift over all chunks."""
    check_targets(targets, params)
    num_terms = curvatures.numel()
    flat = Flat(params, None, directions, num_terms)
    u = flat.directions()
    a, b, c = (
        flat.numbers(curvatures, num_terms),
        flat.numbers(anchor_projections, num_terms),
        flat.numbers(coefficient, 1),
    )
    target = Target(flat, targets)
    partial = _partial_projections(flat, params, u, num_terms)
    force, value = flat.empty_float64(num_terms), flat.empty_float64(num_terms)
    penalty_kernels.force_kernel[(num_terms,)](
        partial, flat.chunks, a, b, c, force, value, LANES=LANES, num_warps=NUM_WARPS
    )
    _combine(flat, target.view, u, force, overwrite=False)
    target.write_back()
    return value.sum()


@on_device_of_first
def diagonal_quadratic(params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    check_state(fisher, anchor)
    flat = Flat(params)
    theta, s, m = flat.view(params), flat.view(fisher), flat.view(anchor)
    partial = flat.empty_float64(flat.chunks)
    flat.run(
        penalty_kernels.quadratic_kernel,
        *theta.vector,
        *s.vector,
        *m.vector,
        partial,
        PARAMS=theta.dtypes,
        STATE=s.dtypes,
    )
    return finish(partial, flat.empty_float64())


def _gradient(
    flat: Flat,
    targets: View,
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
    overwrite: bool,
) -> Tensor:
    """Each chunk's share of the value, which is left out where targets are overwritten."""
    theta, s, m = flat.view(params), flat.view(fisher), flat.view(anchor)
    partial = flat.empty_float64(flat.chunks)
    flat.run(
        penalty_kernels.gradient_kernel,
        *targets.vector,
        *theta.vector,
        *s.vector,
        *m.vector,
        flat.numbers(coefficient, 1),
        partial,
        PARAMS=theta.dtypes,
        STATE=s.dtypes,
        OVERWRITE=overwrite,
    )
    return partial


@on_device_of_first
def diagonal_gradient(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], coefficient: Tensor
) -> list[Tensor]:
    check_state(fisher, anchor)
    flat = Flat(params)
    result = [torch.empty_like(tensor) for tensor in params]
    _gradient(flat, flat.view(result), params, fisher, anchor, coefficient, overwrite=True)
    return result


@on_device_of_first
def diagonal_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
) -> Tensor:
    check_targets(targets, params)
    check_state(fisher, anchor)
    flat = Flat(params)
    target = Target(flat, targets)
    partial = _gradient(flat, target.view, params, fisher, anchor, coefficient, overwrite=False)
    target.write_back()
    return finish(partial, flat.empty_float64())


@on_device_of_first
def diagonal_shrink_(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], strength: Tensor
) -> None:
    check_state(fisher, anchor)
    flat = Flat(params)
    s, m, eta_lambda = flat.view(fisher), flat.view(anchor), flat.numbers(strength, 1)
    theta = Target(flat, params)
    flat.run(
        penalty_kernels.shrink_kernel,
        *theta.view.vector,
        *s.vector,
        *m.vector,
        eta_lambda,
        PARAMS=theta.view.dtypes,
        STATE=s.dtypes,
    )
    theta.write_back()
