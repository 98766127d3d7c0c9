"""The operators whose schemas are in ``_ops.py`` and whose meanings are in ``reference.py``, in Triton."""

import contextlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import kernels
from .sample_matrix import sample_gradient_stats as sample_gradient_stats
from .sample_matrix import sample_gram as sample_gram
from .tables import Flat, View, check
from .weight_gradients import sample_weight_gradients as sample_weight_gradients

_LANES = 2048  # partial sums that the second stage adds at once

_Result = TypeVar("_Result")


def _on_device_of_first(operator: Callable[..., _Result]) -> Callable[..., _Result]:
    """Triton launches on the current device and its current stream."""

    @wraps(operator)
    def guarded(first: Sequence[Tensor], *arguments: Any) -> _Result:
        device = first[0].device if first else torch.device("cpu")
        with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
            return operator(first, *arguments)

    return guarded


class _Target:
    """Tensors to write. Those that are not contiguous are written through a contiguous copy: call ``write_back`` after
    the kernel."""

    def __init__(self, flat: Flat, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._contiguous = [tensor.contiguous() for tensor in tensors]  # itself, where it is contiguous
        self.view = flat.view(self._contiguous)

    def write_back(self) -> None:
        for tensor, contiguous in zip(self._tensors, self._contiguous, strict=True):
            if contiguous is not tensor:
                tensor.copy_(contiguous)


def _check_targets(targets: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    check(len(targets) == len(params), "expected one target for each parameter")
    check(
        all(target.dtype == parameter.dtype for target, parameter in zip(targets, params, strict=True)),
        "a target has another dtype than its parameter",
    )


def _check_state(fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> None:
    check(len(fisher) == len(anchor), "fisher and anchor are lists of different lengths")
    for s, m in zip(fisher, anchor, strict=True):
        check(
            s.dtype == m.dtype and s.dtype in (torch.float32, torch.float64),
            "the diagonal Fisher and its anchor are both float32 or both float64",
        )


def _partial_projections(flat: Flat, params: Sequence[Tensor], u: View, num_terms: int) -> Tensor:
    """(K, chunks): each chunk's share of u_k . theta."""
    theta = flat.view(params)
    partial = flat.empty_float64(num_terms, flat.chunks)
    flat.run(
        kernels.projections_kernel,
        theta.entries,
        theta.stride,
        u.entries,
        u.stride,
        u.pieces,
        num_terms,
        partial,
        PARAMS=theta.dtypes,
        DIRECTIONS=u.dtypes,
    )
    return partial


def _finish(flat: Flat, partial: Tensor, result: Tensor) -> Tensor:
    """The sum of each row of partial sums."""
    kernels.finish_kernel[(result.numel(),)](partial, flat.chunks, result, LANES=_LANES, num_warps=kernels.NUM_WARPS)
    return result


def _combine(flat: Flat, targets: View, u: View, coefficients: Tensor, overwrite: bool) -> None:
    flat.run(
        kernels.combine_kernel,
        targets.entries,
        targets.stride,
        u.entries,
        u.stride,
        u.pieces,
        coefficients.numel(),
        coefficients,
        TARGETS=targets.dtypes,
        DIRECTIONS=u.dtypes,
        OVERWRITE=overwrite,
    )


@_on_device_of_first
def low_rank_projections(params: Sequence[Tensor], directions: Sequence[Tensor], num_terms: int) -> Tensor:
    flat = Flat(params)
    partial = _partial_projections(flat, params, flat.view(directions, num_terms), num_terms)
    return _finish(flat, partial, flat.empty_float64(num_terms))


@_on_device_of_first
def low_rank_combine(directions: Sequence[Tensor], coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    result = [tensor.new_empty(tensor.shape) for tensor in like]
    flat = Flat(result)
    num_terms = coefficients.numel()
    u = flat.view(directions, num_terms)
    _combine(flat, flat.view(result), u, flat.numbers(coefficients, num_terms), overwrite=True)
    return result


@_on_device_of_first
def low_rank_accumulate_(targets: Sequence[Tensor], directions: Sequence[Tensor], coefficients: Tensor) -> None:
    flat = Flat(targets)
    num_terms = coefficients.numel()
    u, c = flat.view(directions, num_terms), flat.numbers(coefficients, num_terms)
    target = _Target(flat, targets)
    _combine(flat, target.view, u, c, overwrite=False)
    target.write_back()


@_on_device_of_first
def low_rank_penalty_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    curvatures: Tensor,
    anchor_projections: Tensor,
    coefficient: Tensor,
) -> Tensor:
    """Two passes: the drift, and with it each term's force, is known only after the whole of the first."""
    _check_targets(targets, params)
    flat = Flat(params)
    num_terms = curvatures.numel()
    u = flat.view(directions, num_terms)
    a, b, c = (
        flat.numbers(curvatures, num_terms),
        flat.numbers(anchor_projections, num_terms),
        flat.numbers(coefficient, 1),
    )
    target = _Target(flat, targets)
    partial = _partial_projections(flat, params, u, num_terms)
    force, value = flat.empty_float64(num_terms), flat.empty_float64(num_terms)
    kernels.force_kernel[(num_terms,)](
        partial, flat.chunks, a, b, c, force, value, LANES=_LANES, num_warps=kernels.NUM_WARPS
    )
    _combine(flat, target.view, u, force, overwrite=False)
    target.write_back()
    return value.sum()


@_on_device_of_first
def diagonal_quadratic(params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    _check_state(fisher, anchor)
    flat = Flat(params)
    theta, s, m = flat.view(params), flat.view(fisher), flat.view(anchor)
    partial = flat.empty_float64(flat.chunks)
    flat.run(
        kernels.quadratic_kernel,
        theta.entries,
        theta.stride,
        s.entries,
        s.stride,
        m.entries,
        m.stride,
        partial,
        PARAMS=theta.dtypes,
        STATE=s.dtypes,
    )
    return _finish(flat, partial, flat.empty_float64())


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
        kernels.gradient_kernel,
        targets.entries,
        targets.stride,
        theta.entries,
        theta.stride,
        s.entries,
        s.stride,
        m.entries,
        m.stride,
        flat.numbers(coefficient, 1),
        partial,
        PARAMS=theta.dtypes,
        STATE=s.dtypes,
        OVERWRITE=overwrite,
    )
    return partial


@_on_device_of_first
def diagonal_gradient(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], coefficient: Tensor
) -> list[Tensor]:
    _check_state(fisher, anchor)
    flat = Flat(params)
    result = [tensor.new_empty(tensor.shape) for tensor in params]
    _gradient(flat, flat.view(result), params, fisher, anchor, coefficient, overwrite=True)
    return result


@_on_device_of_first
def diagonal_accumulate_(
    targets: Sequence[Tensor],
    params: Sequence[Tensor],
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    coefficient: Tensor,
) -> Tensor:
    _check_targets(targets, params)
    _check_state(fisher, anchor)
    flat = Flat(params)
    target = _Target(flat, targets)
    partial = _gradient(flat, target.view, params, fisher, anchor, coefficient, overwrite=False)
    target.write_back()
    return _finish(flat, partial, flat.empty_float64())


@_on_device_of_first
def diagonal_shrink_(
    params: Sequence[Tensor], fisher: Sequence[Tensor], anchor: Sequence[Tensor], strength: Tensor
) -> None:
    _check_state(fisher, anchor)
    flat = Flat(params)
    s, m, eta_lambda = flat.view(fisher), flat.view(anchor), flat.numbers(strength, 1)
    theta = _Target(flat, params)
    flat.run(
        kernels.shrink_kernel,
        theta.view.entries,
        theta.view.stride,
        s.entries,
        s.stride,
        m.entries,
        m.stride,
        eta_lambda,
        PARAMS=theta.view.dtypes,
        STATE=s.dtypes,
    )
    theta.write_back()


class _AdamW:
    """The operands of a step of AdamW, as kernels take them."""

    def __init__(
        self,
        flat: Flat,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        settings: Tensor,
        found_inf: Tensor | None,
    ) -> None:
        check(len(grads) == len(params), "expected one gradient for each parameter")
        for parameter, gradient in zip(params, grads, strict=True):
            check(parameter.dtype in (torch.float32, torch.float64), "AdamW moves float32 and float64 tensors")
            check(
                gradient.dtype == parameter.dtype or (parameter.dtype == torch.float32 and gradient.itemsize == 2),
                "a gradient has its parameter's dtype, or 16 bits beside float32",
            )
        _check_targets(exp_avgs, params)
        _check_targets(exp_avg_sqs, params)
        if found_inf is None:
            found_inf = torch.zeros((), dtype=torch.float32, device=params[0].device)
        check(
            found_inf.numel() == 1 and found_inf.dtype == torch.float32 and found_inf.device == params[0].device,
            "found_inf is one float32 on the device of the parameters",
        )
        self._targets = [_Target(flat, tensors) for tensors in (params, exp_avgs, exp_avg_sqs)]
        theta, m, v = (target.view for target in self._targets)
        self.grads = flat.view(grads)
        self.theta = theta
        views = (theta, self.grads, m, v)
        self.arguments = [
            *(part for view in views for part in (view.entries, view.stride)),
            flat.numbers(settings, 8 * len(params)),
            found_inf,
        ]

    def write_back(self) -> None:
        for target in self._targets:
            target.write_back()


@_on_device_of_first
def low_rank_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    settings: Tensor,
    found_inf: Tensor | None,
    directions: Sequence[Tensor],
    coefficients: Tensor,
    decoupled: bool,
) -> Tensor:
    flat = Flat(params, kernels.block("low_rank_adamw_kernel"))
    num_terms = coefficients.numel()
    adamw = _AdamW(flat, params, grads, exp_avgs, exp_avg_sqs, settings, found_inf)
    u = flat.view(directions, num_terms) if num_terms else adamw.theta
    partial = flat.empty_float64(num_terms, flat.chunks)
    flat.run(
        kernels.low_rank_adamw_kernel,
        *adamw.arguments,
        u.entries,
        u.stride,
        u.pieces,
        num_terms,
        flat.numbers(coefficients, num_terms),
        partial,
        PARAMS=adamw.theta.dtypes,
        GRADIENTS=adamw.grads.dtypes,
        DIRECTIONS=u.dtypes,
        DECOUPLED=decoupled,
    )
    adamw.write_back()
    result = flat.empty_float64(num_terms)
    return _finish(flat, partial, result) if num_terms else result


@_on_device_of_first
def diagonal_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    settings: Tensor,
    found_inf: Tensor | None,
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    decoupled: bool,
) -> Tensor:
    _check_state(fisher, anchor)
    flat = Flat(params, kernels.block("diagonal_adamw_kernel"))
    adamw = _AdamW(flat, params, grads, exp_avgs, exp_avg_sqs, settings, found_inf)
    s, m = flat.view(fisher), flat.view(anchor)
    partial = flat.empty_float64(flat.chunks)
    flat.run(
        kernels.diagonal_adamw_kernel,
        *adamw.arguments,
        s.entries,
        s.stride,
        m.entries,
        m.stride,
        partial,
        PARAMS=adamw.theta.dtypes,
        GRADIENTS=adamw.grads.dtypes,
        STATE=s.dtypes,
        DECOUPLED=decoupled,
    )
    adamw.write_back()
    return _finish(flat, partial, flat.empty_float64())
