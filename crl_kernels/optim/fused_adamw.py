"""FusedAdamW: the pass that moves the parameters also applies the EWC penalty."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import operators
from ..backends.reference import ADAMW_COLUMNS, AdamWSettings
from ..distributed.shards import is_sharded, local_part
from ..model.arguments import require_integer
from ..model.names import join_names
from ..penalty.diagonal import DiagonalHistory
from ..penalty.folded import FoldedPenalty, check_history, fold_history
from ..penalty.low_rank import LowRankHistory
from ..penalty.strength import check_strength
from .checks import (
    capture_error,
    check_capture,
    check_gradients,
    check_group,
    check_hyperparameters,
    check_options,
    check_shapes,
    kinds_of,
    on_device,
)
from .state import HALF_DTYPES, TRAINABLE_DTYPES, convert_state, new_state, read_states


class _Roles(NamedTuple):
    """The optimizer's parameters, group by group, and the part each plays in a step. Kept until one of them changes."""

    params: list[Tensor]
    group_sizes: list[int]
    bound: list[Tensor]  # the history's
    unbound: list[Tensor]
    halves: list[Tensor]  # float16 and bfloat16
    unmovable: list[Tensor]  # of dtypes that no step can move, or with elements that share memory
    kinds: list[list[Any]]  # dtypes, devices, shapes and strides
    group_of: dict[Tensor, int]

    @staticmethod
    def assign(params: list[Tensor], group_sizes: list[int], bound: list[Tensor]) -> "_Roles":
        penalized = set(bound)
        unbound = [parameter for parameter in params if parameter not in penalized]
        halves = [parameter for parameter in params if parameter.dtype in HALF_DTYPES]
        unmovable = [p for p in params if p.dtype not in TRAINABLE_DTYPES or _is_expanded(p)]
        groups = chain.from_iterable([number] * size for number, size in enumerate(group_sizes))
        group_of = dict(zip(params, groups, strict=True))
        return _Roles(params, group_sizes, bound, unbound, halves, unmovable, _kinds(params), group_of)


class FusedAdamW(Optimizer):
    """AdamW (decoupled weight decay) with an EWC penalty folded into its step.

        g <- grad + lam sum_k a_k (u_k . theta - b_k) u_k      or   grad + lam S (theta - m)      (gradient mode)
        theta <- argmin |theta' - theta|^2 / (2 lr) + penalty(theta')                             (decoupled mode)
        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        theta <- (1 - lr weight_decay) theta - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The result is the same as with torch's AdamW and, just before its step, ``history.add_penalty_grad_(lam)`` or, in
    decoupled mode, ``history.decoupled_step_(lam, optimizer.param_groups)``; but ``.grad`` is not changed. In decoupled
    mode, finish training with one call of ``history.decoupled_step_``.

    Memory traffic, in bytes per float32 parameter and step: 28 for AdamW itself, plus 4 for each low-rank term (2 with
    bfloat16 directions, about 1 in int8), or plus 8 for a diagonal history. The projections u_k . theta are carried:
    the pass that writes theta also sums them, in float64, for the next step. The optimizer computes them from the
    parameters at the first step, and again after the history or the optimizer's state was loaded, after terms were
    appended, after parameters were frozen or unfrozen, and after any write from outside that the parameters' version
    counters show. Writes through ``.data`` do not change the version counters: the next step moves the written weights,
    but its penalty is of the projections before, unless ``resync`` is called after the write.

    Clipping. Gradient clipping comes before the step, so the penalty is not clipped. To clip it too, use ``FusedAdamW``
    without a history and call ``history.add_penalty_grad_(lam)`` before clipping.

    16-bit parameters. A float16 or bfloat16 parameter has moments in float32 and a float32 master copy, ``"master"`` in
    its state. The step moves the master copy and sums the projections of it; the parameter is its rounding. Where the
    parameter is another number than that rounding, by any write from outside, ``.data`` included, the step begins with
    the written value. A model may change its dtype or device between steps (``model.float()``), but no shape: the next
    step converts the moments, makes a master copy of a parameter that now has 16 bits, and drops the master copy of a
    parameter that now has more.

    Saved state. ``state_dict`` and ``load_state_dict`` exchange ``step``, ``exp_avg`` and ``exp_avg_sq`` with torch's
    AdamW, in both directions, and parameter groups have the same keys. torch ignores ``"master"`` and keeps moments in
    the parameter's dtype. If a loaded state has no master copy, the parameter is copied. The state does not contain the
    history, ``lam`` and the options after it.

    Copies and pickles contain the history, ``lam`` and these options. As with any torch optimizer, they do not contain
    hooks of other code. Copy the optimizer together with its model, ``copy.deepcopy((model, optimizer))``: the copied
    optimizer then moves the copied model and has its penalty, and ``optimizer.history`` is the copied history. A copy
    without the model has a history without parameters, and its step raises RuntimeError.

    CUDA graphs. With ``capturable=True`` a step may be captured, after at least one eager step. Learning rates and,
    with a history, ``lam`` must be 0-dim tensors on the device: replays read them there. Replays carry the projections
    in the memory that the captured step used. They do not renew them after writes from outside; an eager step does, in
    place. Capture again after ``load_state_dict``, and after terms were appended or parameters frozen.

    A GradScaler's scale and skipped steps are applied on the device, as by torch's ``fused=True``. A step does not wait
    for the device, except for ``verify_every``, in the first step after a change of a history that processes share (see
    its ``append``) and, in decoupled mode, for learning rates that differ between groups and are tensors on the device.

    The penalty moves a bound parameter that has no gradient; any other parameter without a gradient stays, as in torch.
    A frozen bound parameter, one that no longer requires a gradient, stays too, and its part of the penalty still
    counts. Parameters of other dtypes, such as int8 or float8, are accepted as long as they have no gradient.

    Args:
        params: as for any torch optimizer; groups may have their own ``lr``, ``betas``, ``eps``, ``weight_decay``.
        lr, betas, eps, weight_decay, maximize: as for torch's AdamW.
        amsgrad, differentiable: as for torch's AdamW, but only False is supported.
        capturable: whether the step may be captured in a CUDA graph.
        foreach, fused: accepted and kept in the groups, but without effect: the only implementation is a fused one.
        history: a LowRankHistory or DiagonalHistory of some or all of these parameters; the others get no penalty.
            Terms may be appended between steps.
        lam: strength, a float or a 0-dim tensor, with a history; ``history.suggest_lam(lr, steps)`` is where to begin.
            It may be changed between steps, in place or through ``optimizer.lam``. It is the same for all groups: a
            per-group lam does not correspond to any penalty function.
        decoupled: take the proximal step before AdamW's own, each group with its learning rate, instead of adding the
            penalty's gradient. ``lam`` may be infinite then.
        verify_every: every so many steps, compute the projections from the parameters and warn if they differ from the
            carried ones; 0: never.

    Attributes:
        last_penalty: the penalty before the last step, a 0-dim float64 tensor on the device; a new one in every step,
            but with ``capturable=True`` always the same.

    Raises:
        TypeError, ValueError: options that are not implemented, ``lam`` in a group, trained parameters of another dtype
            than float16, bfloat16, float32 or float64, hyperparameters out of range, a history without ``lam`` or the
            reverse, a history with parameters that the optimizer lacks, an attached history, ``maximize`` with a
            history.
        RuntimeError: in a step, before anything is written: a gradient that is sparse, or of another shape, device or
            dtype than its parameter's (16 and 32 bits go together), a parameter that cannot move or has changed its
            shape, a capture whose replays would differ from eager steps, a history that was copied without its model,
            another ``lam`` in a process that shares the model.
    """

    _step_supports_amp_scaling = True
    # Version counters, which a step watches, cannot be traced: compiled code calls it as it is.
    _untraced_step: Any = None

    # While a state is loaded: tensors of 16-bit parameters before torch rounds them.
    _unrounded: Mapping[Tensor, dict[str, Any]] = {}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        history: LowRankHistory | DiagonalHistory | None = None,
        lam: float | Tensor | None = None,
        decoupled: bool = False,
        verify_every: int = 0,
    ) -> None:
        require_integer("verify_every", verify_every, 0, ", where 0 is never")
        if history is None and (lam is not None or decoupled):
            raise ValueError(
                "lam or decoupled is given without history, so no step would have a penalty; pass history=, or neither."
            )
        if history is not None and lam is None:
            raise TypeError(
                "history is given without lam, the strength of its penalty; pass lam=, such as "
                "history.suggest_lam(lr, steps)."
            )
        lam = 0.0 if lam is None else lam
        if history is not None:
            check_history(history, lam, decoupled)
        self.lam, self._decoupled, self._verify_every = lam, decoupled, verify_every
        self._history = history
        self._steps_taken = 0
        self._reset_caches()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,  # for torch's Adam, which may load the state
        }
        super().__init__(params, defaults)
        if self._penalty is not None:
            self._penalty.require_members(self.param_groups)
        first = next(chain.from_iterable(group["params"] for group in self.param_groups), None)
        device = None if first is None else first.device
        self.last_penalty = torch.zeros((), dtype=torch.float64, device=device)

    def _reset_caches(self) -> None:
        """Forgets everything that is only kept from one step to the next."""
        if FusedAdamW._untraced_step is None:  # not at import: it imports torch._dynamo, which takes seconds
            FusedAdamW._untraced_step = torch.compiler.disable(FusedAdamW._step)
        self._penalty = fold_history(self._history, self._decoupled)
        self._versions: list[int] | None = None  # of watched parameters after the last step; None: read them again
        self._roles = _Roles.assign([], [], [])
        self._group_rows: tuple[AdamWSettings, ...] = ()
        self._uploaded: dict[Any, Tensor] = {}
        self._capturing = False
        if "_replayed" not in self.__dict__:  # what graphs read is never forgotten
            self._replayed: dict[Any, Tensor] = {}

    @property
    def history(self) -> LowRankHistory | DiagonalHistory | None:
        """The history whose penalty is in the step; None without one."""
        return self._history

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self._history is not None)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._sharded = any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles."""
        return super().__getstate__() | {name: self.__dict__[name] for name in _COPIED_ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Sets the state of a copy or pickle, or of ``load_state_dict``."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # missing in groups that older versions saved
                group.setdefault(name, value)
            group["decoupled_weight_decay"] = True
        for parameter, kept in self.state.items():
            if isinstance(parameter, Tensor) and kept:
                kept.update(self._unrounded.get(parameter, {}))
                convert_state(parameter, kept)
        self._reset_caches()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a FusedAdamW or of torch's AdamW, after the load-state hooks.

        Raises:
            ValueError: a state that used amsgrad, is incomplete, or belongs to parameters of other shapes. Nothing has
                changed then.
        """
        # Registered last, so that it sees the state that other hooks return.
        hook = self.register_load_state_dict_pre_hook(FusedAdamW._read_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._unrounded = {}

    @staticmethod
    def _read_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks a state before anything changes, and keeps the tensors that torch would round."""
        assert isinstance(optimizer, FusedAdamW)
        if missing := {"param_groups", "state"} - state_dict.keys():
            raise ValueError(
                f"state_dict lacks {join_names(sorted(missing))}; expected what an optimizer's state_dict() returns."
            )
        for group in state_dict["param_groups"]:
            check_options(group, optimizer._history is not None)
            check_hyperparameters(optimizer.defaults | group)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        states, optimizer._unrounded = read_states(state_dict["state"], keys, params)
        return state_dict | {"state": states}

    def resync(self) -> None:
        """Makes the next step compute the projections again: call it after writing to parameters through ``.data``."""
        self._versions = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step. As in torch, a closure computes the loss and the gradients first; its loss is returned.

        Warns:
            UserWarning: ``verify_every`` found that parameters were changed.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"closure is a {type(closure).__name__}; expected a function that computes the loss.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._untraced_step()
        return loss

    def _step(self) -> None:
        # In inference mode it would keep inference tensors, which later steps could not change.
        with torch.inference_mode(False), torch.no_grad():
            self._take_step()

    def _take_step(self) -> None:
        check_strength("lam", self.lam, finite=not self._decoupled)
        penalty = self._penalty if self._penalty is not None and len(self._penalty.history) else None
        self._capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if self._capturing:
            lam = None if penalty is None else self.lam
            check_capture(self.param_groups, lam, self._decoupled, self._verify_every)
        if penalty is not None:
            penalty.agree_on_strength(self.lam)
        bound = penalty.bound_params() if penalty is not None else []
        roles = self._find_roles(bound)
        if roles is not self._roles:
            check_shapes(roles.params, self.state)
        check_gradients(roles.params, roles.kinds, bound, roles.unmovable)
        # Before steps are counted, as it raises for what is no number.
        self._group_rows = (*map(_row, self.param_groups), _IDLE)
        if roles is not self._roles:
            self._roles, self._versions = roles, None
            for parameter in roles.params:
                if state := self.state.get(parameter):
                    convert_state(parameter, state)
        watched = bound + roles.halves
        if self._versions != self._versions_of(watched):
            self._versions = None
        if self._versions is None:
            self._require_eager("parameters, their state or the history have changed since the last step")
        if penalty is not None:
            self._update_carried(penalty, bound, roles.halves)
            moved = [parameter for parameter in bound if parameter.requires_grad]
            value = penalty.step_(partial(self._operands, moved), self.lam, self.param_groups)
            # Replays of a graph write it where the captured step has written it.
            self.last_penalty = self.last_penalty.copy_(value) if self.param_groups[0]["capturable"] else value
        unpenalized: dict[torch.device, list[Tensor]] = {}
        for parameter in roles.unbound:
            if parameter.grad is not None:
                unpenalized.setdefault(parameter.device, []).append(parameter)
        for device, params in unpenalized.items():
            no_coefficients = torch.zeros(0, dtype=torch.float64, device=device)
            state, roundings = self._operands(params, [0.0] * len(params), None)
            operators.low_rank_adamw_(state, [], no_coefficients, False, roundings)
        self._versions = self._versions_of(watched)
        self._steps_taken += 1

    def _find_roles(self, bound: list[Tensor]) -> _Roles:
        """The kept roles, or new ones if a parameter has joined, left or changed its group, dtype, device or order."""
        kept, params = self._roles, [parameter for group in self.param_groups for parameter in group["params"]]
        group_sizes = [len(group["params"]) for group in self.param_groups]
        if (
            group_sizes == kept.group_sizes
            and _are_same_objects(params, kept.params)
            and _are_same_objects(bound, kept.bound)
            and _kinds(params) == kept.kinds
        ):
            return kept
        return _Roles.assign(params, group_sizes, bound)

    def _versions_of(self, params: list[Tensor]) -> list[int]:
        """Version counters of parameters. A sharded parameter's local part has a counter of its own."""
        versions = [parameter._version for parameter in params]
        return versions + [local_part(parameter)._version for parameter in params] if self._sharded else versions

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        """This process's parts of parameters, gradients or moments."""
        return list(map(local_part, tensors)) if self._sharded else tensors

    def _update_carried(self, penalty: FoldedPenalty[Any], bound: list[Tensor], halves: list[Tensor]) -> None:
        """Makes sure that the penalty's carried sums belong to the present parameters."""
        moving = tuple(i for i, parameter in enumerate(bound) if parameter.requires_grad)
        fits = self._versions is not None and penalty.is_current(moving)
        if not fits:
            self._require_eager("the penalty has changed since the last step")
        due = self._verify_every and self._steps_taken % self._verify_every == 0
        if fits and not due:
            return
        self._adopt_writes(halves)
        params = self._local([self.state.get(parameter, {}).get("master", parameter) for parameter in bound])
        if not fits:
            penalty.require_members(self.param_groups)  # the history may have been rebound
            penalty.read(params, moving)
        elif difference := penalty.find_difference(params, moving):
            warnings.warn(
                f"parameters were changed without FusedAdamW noticing: {difference}. It continues with the new ones. "
                "Call resync() after writing to parameters through .data.",
                stacklevel=7,
            )

    def _adopt_writes(self, halves: list[Tensor]) -> None:
        """Copies writes from outside, which went to the parameters, into the master copies."""
        for parameter in halves:
            if (master := self.state.get(parameter, {}).get("master")) is not None:
                master, parameter = self._local([master, parameter])
                same = master.to(parameter.dtype) == parameter
                master.copy_(torch.where(same, master, parameter.float()))

    def _operands(
        self, params: list[Tensor], ratios: list[float], share: Tensor | None
    ) -> tuple[operators.AdamWState, list[Tensor] | None]:
        """The operands of one pass over some parameters, each with its ratio of the penalty's share (None: of 1), and
        their roundings, if any has 16 bits.

        AdamW does not move a parameter without a gradient. In decoupled mode only the penalty moves it: the pass then
        has a learning rate of 0 and works on moments that are thrown away.
        """
        device = params[0].device
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                self._require_eager("a parameter has its first gradient")
                state.update(new_state(parameter))
        thetas = [state.get("master", parameter) for parameter, state in zip(params, states, strict=True)]
        grads = [torch.zeros_like(x) if p.grad is None else p.grad for x, p in zip(thetas, params, strict=True)]
        rows = [self._roles.group_of[parameter] for parameter in params]
        if self._decoupled:
            for i, parameter in enumerate(params):
                if parameter.grad is None:
                    # _IDLE is the row after the groups'.
                    states[i], rows[i] = new_state(parameter), len(self.param_groups)
        step_counts = [state["step"] for state in states]
        found_inf = getattr(self, "found_inf", None)
        increment = torch.ones((), device=device)
        if found_inf is not None:
            found_inf = found_inf.to(device)
            increment = (found_inf <= 0).float()
        # Without alpha, or with a number, it takes 4 times as long.
        torch._foreach_add_(step_counts, increment, alpha=1)
        state = operators.AdamWState(
            self._local(thetas),
            self._local(grads),
            self._local([state["exp_avg"] for state in states]),
            self._local([state["exp_avg_sq"] for state in states]),
            self._settings(rows, ratios, step_counts, share, device),
            found_inf,
        )
        has_halves = self._roles.halves and any(parameter.dtype in HALF_DTYPES for parameter in params)
        return state, self._local(params) if has_halves else None

    def _settings(
        self, rows: list[int], ratios: list[float], steps: list[Tensor], share: Tensor | None, device: torch.device
    ) -> Tensor:
        """The pass's settings, (number of parameters, 8) float64: a row of ``AdamWSettings`` for each parameter."""
        column = ADAMW_COLUMNS
        table = self._upload(self._group_rows, torch.float64, device)
        rates = [group["lr"] for group in self.param_groups]
        if any(map(on_device, rates)):
            weight_decays = tuple(float(group["weight_decay"]) for group in self.param_groups)
            numbers = [torch.as_tensor(rate, dtype=torch.float64, device=device) for rate in (*rates, 0.0)]
            lr = torch.stack([number.reshape(()) for number in numbers])
            table = table.clone()
            table[:, column.decay] = 1 - lr * self._upload((*weight_decays, 0.0), torch.float64, device)
            table[:, column.step_size] = lr
        settings = table[self._upload(tuple(rows), torch.int64, device)]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            settings[:, column.factor] /= scale.to(device, torch.float64)
        corrections = 1 - settings[:, column.beta1 : column.beta2 + 1] ** torch.stack(steps).double().unsqueeze(1)
        settings[:, column.step_size] /= corrections[:, 0]
        settings[:, column.root_scale] = corrections[:, 1].rsqrt()
        ratio = self._upload(tuple(ratios), torch.float64, device)
        # The share may be infinite.
        settings[:, column.share] = ratio if share is None else torch.where(ratio == 0, ratio, ratio * share)
        return settings

    def _upload(self, numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers as a tensor on the device, without waiting for it. The last few tensors are kept, and those that a
        graph has captured for good."""
        key = numbers, dtype, device
        if (kept := self._uploaded.get(key)) is None:
            self._require_eager("a parameter group has changed since the last step")
            kept = torch.tensor(numbers, dtype=dtype)
            if device.type == "cuda":
                kept = kept.pin_memory()  # torch keeps it until the copy is done
            kept = kept.to(device, non_blocking=True)
            if len(self._uploaded) >= 16:  # a schedule makes new ones at every step
                self._uploaded.clear()
            self._uploaded[key] = kept
        if self._capturing:
            self._replayed[key] = kept
        return kept

    def _require_eager(self, reason: str) -> None:
        """Raises RuntimeError while a graph captures the step: its replays would not do what is to be done now."""
        if self._capturing:
            raise capture_error(reason, "Take a step before the capture")


_COPIED_ATTRIBUTES = ("lam", "_decoupled", "_verify_every", "_history", "_steps_taken", "_sharded", "last_penalty")
_IDLE = AdamWSettings(factor=1.0, beta1=0.0, beta2=0.0, decay=1.0, step_size=0.0, root_scale=1.0, eps=1.0, share=1.0)


def _kinds(params: list[Tensor]) -> list[list[Any]]:
    return [*kinds_of(params), list(map(Tensor.stride, params))]


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _row(group: Mapping[str, Any]) -> AdamWSettings:
    (beta1, beta2), lr = group["betas"], group["lr"]
    sign = -1.0 if group.get("maximize") else 1.0
    rate = 0.0 if on_device(lr) else float(lr)  # to look at it would wait for the device
    decay = 1 - rate * float(group["weight_decay"])
    return AdamWSettings(
        factor=sign,
        beta1=float(beta1),
        beta2=float(beta2),
        decay=decay,
        step_size=rate,
        root_scale=1.0,
        eps=float(group["eps"]),
        share=1.0,
    )


def _are_same_objects(tensors: list[Any], others: list[Any]) -> bool:
    return len(tensors) == len(others) and all(map(is_, tensors, others))
