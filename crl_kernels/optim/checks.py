"""What FusedAdamW refuses: options of parameter groups, parameters and gradients."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..penalty.strength import check_strength
from .state import HALF_DTYPES, TRAINABLE_DTYPES

_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


def check_group(group: Mapping[str, Any], penalized: bool) -> None:
    """Raises unless FusedAdamW can step a new parameter group; ``penalized`` if it has a history."""
    check_options(group, penalized)
    for parameter in group["params"]:
        if parameter.requires_grad and parameter.dtype not in TRAINABLE_DTYPES:
            raise TypeError(
                f"a parameter is {parameter.dtype}; expected a real floating-point dtype of 16, 32 or 64 bits, or a "
                "parameter that requires no gradient. Leave it to another optimizer."
            )
    check_hyperparameters(group)


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    for argument in ("lr", "eps", "weight_decay"):
        check_strength(argument, _as_scalar(argument, group[argument]))
    betas = group["betas"]
    pair = (
        isinstance(betas, (tuple, list)) and len(betas) == 2 and all(isinstance(b, (int, float, Tensor)) for b in betas)
    )
    if not pair or not all(0 <= float(_as_scalar("a beta", beta)) < 1 for beta in betas):
        raise ValueError(f"betas is {betas!r}; expected two numbers >= 0 and < 1.")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas is {betas!r}; expected two numbers or two tensors.")


def check_options(group: Mapping[str, Any], penalized: bool) -> None:
    if group.get("amsgrad"):
        raise ValueError("amsgrad=True is not supported; use torch.optim.AdamW with history.attach(optimizer, lam).")
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True is not supported, because the step writes in place, outside of autograd; use "
            "torch.optim.AdamW with rank1_ewc_penalty or diagonal_ewc_penalty in the loss."
        )
    if "lam" in group:
        raise ValueError(
            "lam is in a parameter group; a lam for each group does not correspond to any penalty function. "
            "Pass lam= to FusedAdamW."
        )
    if group.get("maximize") and penalized:
        raise ValueError("maximize=True would maximize the penalty too; negate the loss instead.")


def check_capture(
    param_groups: Sequence[Mapping[str, Any]], lam: float | Tensor | None, decoupled: bool, verify_every: int
) -> None:
    """Raises RuntimeError where the replays of a step that a CUDA graph captures would differ from eager steps. ``lam``
    is that of a penalty; None without one."""
    if not all(group.get("capturable") for group in param_groups):
        raise capture_error("capturable is False", "Create it with capturable=True")
    if verify_every:
        raise capture_error("verify_every waits for the device", "Create it with verify_every=0")
    for group in param_groups:
        if any(map(on_device, (*group["betas"], group["eps"], group["weight_decay"]))):
            raise capture_error("betas, eps or weight_decay are tensors that the host would read", "Make them numbers")
    strengths = [("lr", group["lr"]) for group in param_groups] + ([] if lam is None else [("lam", lam)])
    for name, value in strengths:
        if not on_device(value):
            reason = f"{name} is {value!r}, which replays would keep for good"
            raise capture_error(reason, "Make it a 0-dim tensor on the device and change it in place")
    if lam is not None and decoupled and len(param_groups) > 1:
        reason = "the decoupled step would compare the learning rates of its groups, which waits for the device"
        raise capture_error(reason, "Give it one group, or decoupled=False")


def capture_error(reason: str, remedy: str) -> RuntimeError:
    return RuntimeError(
        f"FusedAdamW's step is being captured in a CUDA graph, and {reason}. {remedy}, or step outside of the graph."
    )


def on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def kinds_of(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Dtypes, devices and shapes."""
    return [list(map(_dtype, tensors)), list(map(Tensor.get_device, tensors)), list(map(_shape, tensors))]


def check_shapes(params: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Raises RuntimeError for a parameter that has another shape than its state."""
    for i, parameter in enumerate(params):
        state = states.get(parameter)
        if state and state["exp_avg"].shape != parameter.shape:
            raise RuntimeError(
                f"parameter {i} has shape {tuple(parameter.shape)} and its state {tuple(state['exp_avg'].shape)}; a "
                "parameter may change its dtype or device between steps, but not its shape. Create a new optimizer."
            )


def check_gradients(
    params: Sequence[Tensor], kinds: Sequence[Sequence[Any]], bound: Sequence[Tensor], unmovable: Sequence[Tensor]
) -> None:
    """Raises RuntimeError for a gradient that no step can take, and for a parameter that is to move and cannot.

    Args:
        kinds: begins with ``kinds_of(params)``.
        bound: those that a penalty moves even without a gradient.
        unmovable: those among params that are of other dtypes than a step moves, or expanded.
    """
    for parameter in unmovable:
        if parameter.dtype in TRAINABLE_DTYPES:
            if parameter.grad is not None or (parameter.requires_grad and any(parameter is other for other in bound)):
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} was expanded, so its elements share memory and "
                    "cannot move apart. Give it memory of its own: parameter.data = parameter.data.clone()."
                )
        elif parameter.grad is not None:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} and has a gradient; expected a "
                "real floating-point dtype of 16, 32 or 64 bits. Leave it to another optimizer."
            )
    gradients = [parameter if (gradient := parameter.grad) is None else gradient for parameter in params]
    if {gradient.layout for gradient in gradients} <= {torch.strided} and kinds_of(gradients) == kinds[:3]:
        return
    for i, (parameter, gradient) in enumerate(zip(params, gradients, strict=True)):
        name = f"the gradient of parameter {i}, of shape {tuple(parameter.shape)},"
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"{name} is {gradient.layout}; FusedAdamW takes dense ones. Make its layer's gradient dense "
                "(nn.Embedding(sparse=False)), or leave it to another optimizer."
            )
        again = "Compute it again: zero_grad(), then backward()."
        if gradient.shape != parameter.shape:
            raise RuntimeError(f"{name} has shape {tuple(gradient.shape)}; expected the parameter's. {again}")
        if gradient.device != parameter.device:
            raise RuntimeError(
                f"{name} is on {gradient.device}; expected {parameter.device}, as its parameter. {again}"
            )
        expected = _gradient_dtypes(parameter.dtype)
        if gradient is not parameter and gradient.dtype not in expected:
            raise RuntimeError(
                f"{name} is {gradient.dtype}; the parameter is {parameter.dtype}, so expected "
                f"{' or '.join(map(str, expected))}. {again}"
            )


def _gradient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float64,) if dtype == torch.float64 else (torch.float32, *HALF_DTYPES)


def _as_scalar(argument: str, value: Any) -> Any:
    """torch's AdamW takes tensors of one element in any shape."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{argument} is a tensor of shape {tuple(value.shape)}; expected a number or one element.")
    return value.reshape(())
