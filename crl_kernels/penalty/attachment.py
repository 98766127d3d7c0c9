"""A history's penalty inside anyone's optimizer, by step hooks: two lines in a trainer that someone else wrote.

Hooks run once for each real step: under gradient accumulation, and when a GradScaler skips a step, as often as the
optimizer moves. A GradScaler hands some optimizers (``fused=True``) gradients that are still scaled, with the scale in
``optimizer.grad_scale``, and lets them skip by ``optimizer.found_inf``; both are device tensors and are used as such,
so nothing waits for the device.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


_UNSTABLE = 2.0  # gradient descent on a quadratic of curvature h diverges for lr * h > 2


class _History(Protocol):
    _attachment: "Attachment | None"

    def stiffness(self, lam: float | Tensor, lr: float | Tensor) -> float | Tensor: ...
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor: ...
    def decoupled_step_(self, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> None: ...


def is_wrapper(optimizer: object) -> bool:
    """Whether it acts as an optimizer without being one, as Lightning's wrapper does."""
    return hasattr(optimizer, "step") and isinstance(getattr(optimizer, "param_groups", None), Sequence)


def find_stepped(optimizer: Any, params: Sequence[Tensor]) -> Optimizer:
    """The optimizer that moves ``params``: this one, or one inside of it.

    accelerate, Lightning, SAM and Lookahead keep an optimizer in an attribute of a wrapper and step it themselves. The
    wrapper's own hooks may never run. An optimizer inside that has only some of the parameters is not followed.

    Raises:
        ValueError: several that have all parameters, or one whose class calls no hooks.
        TypeError: a wrapper around no such optimizer.
    """
    wanted = set(map(id, params))
    seen = [optimizer]
    while inner := {
        name: value
        for name, value in getattr(optimizer, "__dict__", {}).items()
        if isinstance(value, Optimizer) and all(value is not other for other in seen) and wanted <= _members(value)
    }:
        if len(set(map(id, inner.values()))) > 1:
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__} that holds several optimizers of these parameters, "
                f"{', '.join(inner)}. Attach to the one that steps them."
            )
        optimizer = next(iter(inner.values()))
        seen.append(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} and holds no torch.optim.Optimizer of the bound parameters in "
            "an attribute. Attach to the torch optimizer itself, if its groups hold the model's own parameters, or "
            "add rank1_ewc_penalty or diagonal_ewc_penalty to the loss."
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}, whose step calls no hooks, since its class does not call "
            "torch.optim.Optimizer.__init__. Call history.add_penalty_grad_(lam) before its step, or "
            "history.decoupled_step_(lam, optimizer.param_groups) after it, instead of attach."
        )
    return optimizer


def _members(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class Attachment:
    """What ``history.attach`` does to an optimizer, until ``remove``.

    Copies and pickles of the optimizer have an attachment of their own, with a copy of the history. torch would drop
    the hooks, and the copy would train without the penalty.
    """

    def __init__(self, history: _History, optimizer: Optimizer, lam: float | Tensor, decoupled: bool) -> None:
        self._history: _History | None = history
        self._lam = lam
        self._warned = False
        register = optimizer.register_step_post_hook if decoupled else optimizer.register_step_pre_hook
        self._handle: RemovableHandle | None = register(self._after_step if decoupled else self._before_step)
        # In the instance, where copy and pickle look for it: its class is torch's or someone else's.
        optimizer.__getstate__ = partial(_state_with_attachments, optimizer)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        return {"_history": self._history, "_lam": self._lam, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = None  # the copied optimizer's hooks have come with its state
        if self._history is not None:
            self._history._attachment = self

    def remove(self) -> None:
        self._history = None  # wherever a hook was copied to
        if self._handle is not None:
            self._handle.remove()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Adds the penalty's gradient, at the scale of the gradients that are there."""
        if self._history is None or _is_nested(optimizer):
            return
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise RuntimeError(
                "optimizer.step was given a closure, which computes gradients after this hook has added the penalty's. "
                "Add rank1_ewc_penalty or diagonal_ewc_penalty to the loss inside the closure instead, or attach with "
                "decoupled=True."
            )
        self._warn_if_stiff(self._history, optimizer)
        scale = getattr(optimizer, "grad_scale", None)
        self._history.add_penalty_grad_(self._lam if scale is None else scale.double() * self._lam)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The proximal step, unless the optimizer has skipped its own."""
        if self._history is None or _is_nested(optimizer):
            return
        found_inf = getattr(optimizer, "found_inf", None)
        lam = self._lam
        if found_inf is not None:
            strength = lam if isinstance(lam, Tensor) else torch.full_like(found_inf, lam, dtype=torch.float64)
            lam = torch.where(found_inf > 0, 0.0, strength)
        self._history.decoupled_step_(lam, optimizer.param_groups)

    def _warn_if_stiff(self, history: _History, optimizer: Optimizer) -> None:
        rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
        if self._warned or not all(isinstance(rate, (int, float, Tensor)) for rate in rates):
            return  # an optimizer that makes up its rates in its step, such as Adafactor's relative ones
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (self._lam, *rates)):
            return  # looking at a device's number would wait for it
        stiffness = float(history.stiffness(self._lam, max(map(float, rates))))
        if stiffness > _UNSTABLE:
            self._warned = True
            warnings.warn(
                f"the penalty is stiff: lr * lam * curvature = {stiffness:.3g}. As a gradient it diverges above "
                f"{_UNSTABLE:.0f} under plain SGD, and what Adam makes of it can drown the task's own. Use a smaller "
                "lam, or attach with decoupled=True, which is stable at every lam.",
                stacklevel=2,
            )


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a hook runs for the ``super().step()`` of an optimizer's own step, for which torch has called it, too."""
    if torch.compiler.is_compiling():
        return False
    wrapper = sys._getframe(2)  # torch's, which calls hooks, a step, and hooks
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _state_with_attachments(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's ``__getstate__``, with the hooks of attachments."""
    state: dict[str, Any] = type(optimizer).__getstate__(optimizer)
    attached = False
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        hooks = [hook for hook in getattr(optimizer, name).values() if _is_attachments(hook)]
        # Under keys that no hook which is registered later can have.
        state[name] = OrderedDict((hook.__self__, hook) for hook in hooks)
        attached = attached or bool(hooks)
    if attached:
        state["__getstate__"] = partial(_state_with_attachments, optimizer)
    return state


def _is_attachments(hook: Any) -> bool:
    attachment = getattr(hook, "__self__", None)
    return isinstance(attachment, Attachment) and attachment._history is not None
