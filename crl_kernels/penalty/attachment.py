"""A history's penalty in the steps of any torch optimizer, by step hooks.

Hooks run once for each step that the optimizer takes, also under gradient accumulation and when a GradScaler skips a
step. Where a step is given a closure that computes the gradients, the hook extends the closure. A GradScaler gives some
optimizers (``fused=True``) gradients that are still scaled, with the scale in ``optimizer.grad_scale``, and tells them
to skip by ``optimizer.found_inf``. Both are device tensors, and the hooks use them as such, so that they do not wait
for the device.
"""

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..model.binding import Binding

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


_UNSTABLE = 2.0  # gradient descent on a quadratic of curvature h diverges for lr * h > 2


class _AttachedHistory(Protocol):
    _attachment: "Attachment | None"
    _binding: Binding

    def _agree_on_strength(self, lam: float | Tensor, how: str) -> None: ...
    def stiffness(self, lam: float | Tensor, lr: float | Tensor) -> float | Tensor: ...
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor: ...
    def decoupled_step_(self, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> None: ...


def is_wrapper(optimizer: object) -> bool:
    """Whether an object has an optimizer's interface, as Lightning's wrapper does, and may not be a torch Optimizer."""
    return hasattr(optimizer, "step") and isinstance(getattr(optimizer, "param_groups", None), Sequence)


def find_stepped(optimizer: Any, params: Sequence[Tensor]) -> Optimizer:
    """The optimizer that moves ``params``: this one, or one that it wraps.

    accelerate, Lightning, SAM and Lookahead keep an optimizer in an attribute of a wrapper and step it themselves. The
    wrapper's own hooks may never run. A wrapped optimizer that has only some of the parameters is ignored.

    Raises:
        ValueError: several wrapped optimizers that have all parameters, or one whose class calls no hooks.
        TypeError: a wrapper without such an optimizer.
    """
    param_ids = set(map(id, params))
    visited = [optimizer]
    while inner := {
        name: value
        for name, value in getattr(optimizer, "__dict__", {}).items()
        if isinstance(value, Optimizer)
        and all(value is not other for other in visited)
        and param_ids <= _param_ids(value)
    }:
        if len(set(map(id, inner.values()))) > 1:
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__} that holds several optimizers of these parameters, "
                f"{', '.join(inner)}. Attach to the one that steps them."
            )
        optimizer = next(iter(inner.values()))
        visited.append(optimizer)
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


def _param_ids(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class Attachment:
    """The hook that ``history.attach`` registers with an optimizer, until ``remove``.

    Copies and pickles of the optimizer have their own attachment, with a copy of the history. Otherwise torch would
    drop the hooks, and the copy would train without the penalty.
    """

    def __init__(self, history: _AttachedHistory, optimizer: Optimizer, lam: float | Tensor, decoupled: bool) -> None:
        self._history: _AttachedHistory | None = history
        self._lam = lam
        self._checked = self._warned = False
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_post_hook(self._after_step)
            if decoupled
            else optimizer.register_step_pre_hook(self._before_step)
        ]
        if decoupled and history._binding.agreement.several:  # they agree before the optimizer moves anything
            self._handles.append(optimizer.register_step_pre_hook(self._agree))
        # Set on the instance, where copy and pickle find it, because the class belongs to torch or to another library.
        optimizer.__getstate__ = partial(_state_with_attachments, optimizer)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        return {"_history": self._history, "_lam": self._lam, "_checked": False, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = []  # the copied optimizer's state contains its hooks
        if self._history is not None:
            self._history._attachment = self

    def remove(self) -> None:
        self._history = None  # disables copies of the hook, too
        for handle in self._handles:
            handle.remove()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds the penalty's gradient, at the scale of the present gradients, or has the closure that computes the
        gradients add it. Returns the step's arguments if they have changed."""
        if self._history is None or _is_nested(optimizer):
            return None
        history = self._history
        if not self._checked and not torch.compiler.is_compiling():
            history._binding.members(optimizer.param_groups)  # another library may have exchanged them since attach
            self._checked = True
        history._agree_on_strength(self._lam, "a gradient")  # of the user, without a GradScaler's scale
        self._warn_if_stiff(history, optimizer)
        if callable(closure := kwargs.get("closure")):
            return args, kwargs | {"closure": _with_penalty(closure, history, self._lam)}
        if callable(closure := args[1] if len(args) > 1 else None):
            return (args[0], _with_penalty(closure, history, self._lam), *args[2:]), kwargs
        scale = getattr(optimizer, "grad_scale", None)
        history.add_penalty_grad_(self._lam if scale is None else scale.double() * self._lam)
        return None

    def _agree(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._history is not None:
            self._history._agree_on_strength(self._lam, "a decoupled step")

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the proximal step, unless the optimizer skipped its own."""
        if self._history is None or _is_nested(optimizer):
            return
        found_inf = getattr(optimizer, "found_inf", None)
        lam = self._lam
        if found_inf is not None:
            strength = lam if isinstance(lam, Tensor) else torch.full_like(found_inf, lam, dtype=torch.float64)
            lam = torch.where(found_inf > 0, 0.0, strength)
        self._history.decoupled_step_(lam, optimizer.param_groups)

    def _warn_if_stiff(self, history: _AttachedHistory, optimizer: Optimizer) -> None:
        rates: list[Any] = [group.get("lr") for group in optimizer.param_groups]
        if self._warned or not all(isinstance(rate, (int, float, Tensor)) for rate in rates):
            return  # the optimizer computes its rates in its step, as Adafactor does with relative steps
        if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in (self._lam, *rates)):
            return  # reading a number from a device would wait for it
        stiffness = float(history.stiffness(self._lam, max(map(float, rates))))
        if stiffness > _UNSTABLE:
            self._warned = True
            warnings.warn(
                f"the penalty is stiff: lr * lam * curvature = {stiffness:.3g}. As a gradient it diverges above "
                f"{_UNSTABLE:.0f} under plain SGD, and under Adam it can outweigh the task's gradient. Use a smaller "
                "lam, such as history.suggest_lam(lr, steps), or attach with decoupled=True, which is stable at every "
                "lam.",
                stacklevel=2,
            )


def _with_penalty(closure: Callable[[], Any], history: _AttachedHistory, lam: float | Tensor) -> Callable[[], Any]:
    """A closure that adds the penalty to the gradients that ``closure`` computes, and to the loss that it returns."""

    def penalized() -> Any:
        loss = closure()
        value = history.add_penalty_grad_(lam)
        return loss + value.to(loss.dtype) if isinstance(loss, Tensor) else loss

    return penalized


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the hook runs for a ``super().step()`` inside the optimizer's step, for which torch calls hooks again."""
    if torch.compiler.is_compiling():
        return False
    wrapper = sys._getframe(2)  # torch's function that calls pre hooks, the step and post hooks
    frame = wrapper.f_back
    while frame is not None:
        if frame.f_code is wrapper.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _state_with_attachments(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's ``__getstate__`` with the hooks of attachments added."""
    state: dict[str, Any] = type(optimizer).__getstate__(optimizer)
    attached = False
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        hooks = [hook for hook in getattr(optimizer, name).values() if _belongs_to_attachment(hook)]
        # Keys that cannot collide with those of hooks that are registered later.
        state[name] = OrderedDict((hook.__self__, hook) for hook in hooks)
        attached = attached or bool(hooks)
    if attached:
        state["__getstate__"] = partial(_state_with_attachments, optimizer)
    return state


def _belongs_to_attachment(hook: Any) -> bool:
    attachment = getattr(hook, "__self__", None)
    return isinstance(attachment, Attachment) and attachment._history is not None
