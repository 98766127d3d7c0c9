"""AdamW's operators in Triton, with the penalty inside the step. ``reference.py`` defines them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import ADAMW_COLUMNS, AdamWState, takes
from . import adamw_kernels
from .chunks import block
from .operands import Flat, Target, check_state, check_targets, on_device_of_first
from .reductions import finish
from .tables import check


class _AdamWOperands:
    """The operands of a step of AdamW, as kernels take them."""

    def __init__(self, flat: Flat, state: AdamWState, roundings: Sequence[Tensor] | None) -> None:
        params, grads, exp_avgs, exp_avg_sqs, settings, found_inf = state
        check(len(grads) == len(params), "expected one gradient for each parameter")
        for parameter, gradient in zip(params, grads, strict=True):
            check(parameter.dtype in (torch.float32, torch.float64), "AdamW moves float32 and float64 tensors")
            check(
                gradient.dtype == parameter.dtype or (parameter.dtype == torch.float32 and gradient.itemsize == 2),
                "a gradient has its parameter's dtype, or 16 bits beside float32",
            )
        check(roundings is None or len(roundings) == len(params), "expected one rounding for each parameter")
        for parameter, rounding in zip(params, roundings or params, strict=True):
            is_theta = rounding.dtype == parameter.dtype and rounding.data_ptr() == parameter.data_ptr()
            check(
                is_theta or (parameter.dtype == torch.float32 and rounding.dtype in (torch.bfloat16, torch.float16)),
                "a rounding has 16 bits beside float32, or is the parameter itself",
            )
        check_targets(exp_avgs, params)
        check_targets(exp_avg_sqs, params)
        if found_inf is None:
            found_inf = torch.zeros((), dtype=torch.float32, device=params[0].device)
        check(
            found_inf.numel() == 1 and found_inf.dtype == torch.float32 and found_inf.device == params[0].device,
            "found_inf is one float32 on the device of the parameters",
        )
        lists = (params, exp_avgs, exp_avg_sqs) if roundings is None else (params, exp_avgs, exp_avg_sqs, roundings)
        self._targets = [Target(flat, tensors) for tensors in lists]
        self.theta, m, v, *written = (target.view for target in self._targets)
        views = (self.theta, flat.view(grads), m, v, written[0] if written else self.theta)
        self.constants = {
            "PARAMS": self.theta.dtypes,
            "GRADIENTS": views[1].dtypes,
            "ROUNDINGS": written[0].dtypes if written else 0,
        }
        self.arguments = [
            *(part for view in views for part in view.vector),
            flat.numbers(settings, len(ADAMW_COLUMNS) * len(params)),
            found_inf,
        ]

    def write_back(self) -> None:
        for target in reversed(self._targets):  # a rounding before theta, which may be in its place
            target.write_back()


@on_device_of_first
@takes(AdamWState)
def low_rank_adamw_(
    state: AdamWState,
    directions: Sequence[Tensor],
    coefficients: Tensor,
    decoupled: bool,
    roundings: Sequence[Tensor] | None = None,
) -> Tensor:
    num_terms = coefficients.numel()
    flat = Flat(state.params, block("low_rank_adamw_kernel"), directions, num_terms)
    operands = _AdamWOperands(flat, state, roundings)
    u = flat.directions() if num_terms else operands.theta
    partial = flat.empty_float64(num_terms, flat.chunks)
    flat.run(
        adamw_kernels.low_rank_adamw_kernel,
        *operands.arguments,
        *u.terms,
        num_terms,
        flat.numbers(coefficients, num_terms),
        partial,
        **operands.constants,
        DIRECTIONS=u.dtypes,
        DECOUPLED=decoupled,
    )
    operands.write_back()
    return finish(partial, flat.empty_float64(num_terms))


@on_device_of_first
@takes(AdamWState)
def diagonal_adamw_(
    state: AdamWState,
    fisher: Sequence[Tensor],
    anchor: Sequence[Tensor],
    decoupled: bool,
    roundings: Sequence[Tensor] | None = None,
) -> Tensor:
    check_state(fisher, anchor)
    flat = Flat(state.params, block("diagonal_adamw_kernel"))
    operands = _AdamWOperands(flat, state, roundings)
    s, m = flat.view(fisher), flat.view(anchor)
    partial = flat.empty_float64(flat.chunks)
    flat.run(
        adamw_kernels.diagonal_adamw_kernel,
        *operands.arguments,
        *s.vector,
        *m.vector,
        partial,
        **operands.constants,
        STATE=s.dtypes,
        DECOUPLED=decoupled,
    )
    operands.write_back()
    return finish(partial, flat.empty_float64())
