"""What FusedAdamW refuses: options of parameter groups, and gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..penalty.strength import check_strength
from .state import TRAINABLE_DTYPES


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


def check_gradients(params: Sequence[Tensor], untrainable: Sequence[Tensor]) -> None:
    """Raises RuntimeError for a gradient that is not dense, and for one of a parameter that no step can move."""
    for parameter in untrainable:
        if parameter.grad is not None:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} and has a gradient; expected a "
                "real floating-point dtype of 16, 32 or 64 bits. Leave it to another optimizer."
            )
    gradients = [parameter.grad for parameter in params]
    if {gradient.layout for gradient in gradients if gradient is not None} <= {torch.strided}:
        return
    for i, (parameter, gradient) in enumerate(zip(params, gradients, strict=True)):
        if gradient is not None and gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of parameter {i}, of shape {tuple(parameter.shape)}, is {gradient.layout}; FusedAdamW "
                "takes dense ones. Make its layer's gradient dense (nn.Embedding(sparse=False)), or leave it to "
                "another optimizer."
            )


def _as_scalar(argument: str, value: Any) -> Any:
    """torch's AdamW takes tensors of one element in any shape."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{argument} is a tensor of shape {tuple(value.shape)}; expected a number or one element.")
    return value.reshape(())
