"""Differentiable EWC penalties of a history or of raw tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import operators
from .diagonal import DiagonalHistory
from .low_rank import LowRankHistory
from .strength import check_strength

Tensors = Tensor | Sequence[Tensor]


def rank1_ewc_penalty(
    params: LowRankHistory | Tensors,
    *,
    lam: float | Tensor,
    direction: Tensors | None = None,
    curvature: float | Tensor | None = None,
    anchor: Tensors | None = None,
    anchor_projection: float | Tensor | None = None,
) -> Tensor:
    """The low-rank EWC penalty of a history, or the rank-1 penalty of raw tensors.

        history:  (lam / 2) sum_k a_k (u_k . theta - b_k)^2
        raw:      (lam / 2) a (u . theta - b)^2,   b = u . theta*

    Dot products are taken in float64: u . theta and b nearly cancel. Differentiable by the parameters (and by ``lam``,
    ``curvature`` and ``anchor_projection``), any number of times, in reverse and forward mode, under vmap and
    torch.compile; directions and anchors are constants. NaN and Inf pass through to the value.

    Args:
        params: a LowRankHistory; or one tensor; or a sequence of tensors of any shapes and floating-point dtypes.
        lam: strength, a float or a 0-dim tensor; ``history.suggest_lam(lr, steps)`` is where to begin. The paper's
            15,000 belongs to a per-sample loss that is the MEAN over the image of the squared error.
        direction: u; a tensor like ``params``, a sequence like ``params``, or one flat tensor of all elements in order.
        curvature: a >= 0, the Fisher's curvature along u, in squared gradient units.
        anchor: theta*, in the form of ``params``. Each call reads it.
        anchor_projection: b = u . theta* in float64, instead of ``anchor``: cheaper, and theta* need not be kept.

    Returns:
        0-dim tensor; float64 if any parameter is, else float32.

    Raises:
        TypeError, ValueError: an invalid argument, by name.

    Source: arXiv 2509.23593, with (u, a, b) instead of (mu, c*, theta*).
    """
    if isinstance(params, LowRankHistory):
        _refuse_raw(direction=direction, curvature=curvature, anchor=anchor, anchor_projection=anchor_projection)
        return params.penalty(lam)
    if isinstance(params, DiagonalHistory):
        raise TypeError("params is a DiagonalHistory; call diagonal_ewc_penalty.")
    check_strength("lam", lam)
    tensors = _as_list("params", params)
    if direction is None or curvature is None:
        raise TypeError("raw tensors need direction= and curvature=; or pass a LowRankHistory.")
    if (anchor is None) == (anchor_projection is None):
        raise TypeError("raw tensors need exactly one of anchor= and anchor_projection=.")
    directions = _constants("direction", direction, tensors)
    check_strength("curvature", curvature)
    if anchor is not None:
        with torch.no_grad():
            b: float | Tensor = operators.low_rank_projections(_constants("anchor", anchor, tensors), directions, 1)[0]
    else:
        b = _number("anchor_projection", anchor_projection)
    drift = operators.low_rank_projections(tensors, directions, 1)[0] - b
    return (drift.square() * curvature * lam * 0.5).to(_value_dtype(tensors))


def diagonal_ewc_penalty(
    params: DiagonalHistory | Tensors,
    *,
    lam: float | Tensor,
    fisher_diagonal: Tensors | None = None,
    anchor: Tensors | None = None,
) -> Tensor:
    """The diagonal EWC penalty of a history, or of raw tensors.

        history:  (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R), the sum over all past tasks
        raw:      (lam / 2) sum_j F_j (theta_j - theta*_j)^2

    Sums are taken in float64. Differentiable by the parameters and ``lam``, any number of times, in reverse and forward
    mode, under vmap and torch.compile; Fisher and anchors are constants. NaN and Inf pass through to the value.

    Args:
        params: a DiagonalHistory; or one tensor; or a sequence of tensors of any shapes and floating-point dtypes.
        lam: strength, a float or a 0-dim tensor; ``history.suggest_lam(lr, steps)`` is where to begin.
        fisher_diagonal: F >= 0, mean squared per-sample gradients; in the form of ``params``, or one flat tensor.
        anchor: theta*, likewise.

    Returns:
        0-dim tensor; float64 if any parameter is, else float32.

    Raises:
        TypeError, ValueError: an invalid argument, by name.

    Source: Kirkpatrick et al., arXiv 1612.00796.
    """
    if isinstance(params, DiagonalHistory):
        _refuse_raw(fisher_diagonal=fisher_diagonal, anchor=anchor)
        return params.penalty(lam)
    if isinstance(params, LowRankHistory):
        raise TypeError("params is a LowRankHistory; call rank1_ewc_penalty.")
    check_strength("lam", lam)
    tensors = _as_list("params", params)
    if fisher_diagonal is None or anchor is None:
        raise TypeError("raw tensors need fisher_diagonal= and anchor=; or pass a DiagonalHistory.")
    fisher, anchors = _constants("fisher_diagonal", fisher_diagonal, tensors), _constants("anchor", anchor, tensors)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (*fisher, *anchors)) else torch.float32
    fisher, anchors = [f.to(dtype) for f in fisher], [m.to(dtype) for m in anchors]
    return (operators.diagonal_quadratic(tensors, fisher, anchors) * lam * 0.5).to(_value_dtype(tensors))


def _refuse_raw(**arguments: object) -> None:
    if raw := [name for name, value in arguments.items() if value is not None]:
        raise TypeError(f"{', '.join(raw)} cannot be given together with a history, which has its own.")


def _as_list(argument: str, tensors: Tensors) -> list[Tensor]:
    if not isinstance(tensors, Tensor) and not isinstance(tensors, Sequence):
        raise TypeError(
            f"{argument} is a {type(tensors).__name__}; expected a tensor or a sequence of tensors, "
            "such as list(model.parameters())."
        )
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not listed:
        raise ValueError(f"{argument} is empty; expected at least one tensor.")
    for i, tensor in enumerate(listed):
        name = argument if isinstance(tensors, Tensor) else f"{argument}[{i}]"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; expected a real floating-point dtype.")
        if tensor.device != listed[0].device:
            raise ValueError(f"{name} is on {tensor.device}; expected {listed[0].device}, as the first.")
    return listed


def _constants(argument: str, tensors: Tensors, params: list[Tensor]) -> list[Tensor]:
    """The tensors of a constant vector: one for each parameter, of its shape, or a single flat one."""
    listed = _as_list(argument, tensors)
    for tensor in listed:
        if tensor.requires_grad:
            raise ValueError(f"{argument} requires a gradient, but it is a constant here; pass {argument}.detach().")
        if tensor.device != params[0].device:
            raise ValueError(f"{argument} is on {tensor.device}; expected {params[0].device}, as params.")
    numel = sum(p.numel() for p in params)
    if isinstance(tensors, Tensor) and tensors.shape == (numel,):
        return listed
    if len(listed) != len(params):
        raise ValueError(f"{argument} has {len(listed)} tensors; expected {len(params)}, or one flat one of {numel}.")
    for i, (tensor, parameter) in enumerate(zip(listed, params, strict=True)):
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{argument}[{i}] has shape {tuple(tensor.shape)}; expected {tuple(parameter.shape)}, as params[{i}]."
            )
    return listed


def _number(argument: str, value: float | Tensor | None) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{argument} has shape {tuple(value.shape)}; expected a float or a 0-dim tensor.")
        if not value.is_floating_point():
            raise TypeError(f"{argument} is a {value.dtype} tensor; expected a float or a 0-dim floating-point tensor.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} is a {type(value).__name__}; expected a float or a 0-dim tensor.")
    if not math.isfinite(value):
        raise ValueError(f"{argument} is {value}; expected a finite value.")
    return value


def _value_dtype(params: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
