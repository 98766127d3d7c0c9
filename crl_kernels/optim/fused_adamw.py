"""AdamW with an EWC penalty inside: the penalty is a part of the pass that moves the parameters."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import operators
from ..distributed.shards import is_sharded, local_part
from ..model.names import join_names
from ..penalty.diagonal import DiagonalHistory
from ..penalty.folded import FoldedPenalty, check_history, fold_history
from ..penalty.low_rank import LowRankHistory
from ..penalty.strength import check_strength

_HALF = (torch.float16, torch.bfloat16)
_TRAINED = (*_HALF, torch.float32, torch.float64)
_dtype = attrgetter("dtype")
_SAVED = ("step", "exp_avg", "exp_avg_sq")
# A group's row of the settings, but for what each parameter's number of steps and its share add:
# sign, beta1, beta2, 1 - lr * weight_decay, lr, 1, eps, 1.
_Row = tuple[float, ...]


class _Roles(NamedTuple):
    """The optimizer's parameters, group by group, and what each one is to a step; kept while they stay the same."""

    params: list[Tensor]
    group_sizes: list[int]
    bound: list[Tensor]  # the history's
    others: list[Tensor]
    halves: list[Tensor]
    untrained: list[Tensor]  # of dtypes that no step moves
    kinds: list[Any]  # dtypes and devices
    group_of: dict[Tensor, int]

    @staticmethod
    def of(params: list[Tensor], group_sizes: list[int], bound: list[Tensor]) -> "_Roles":
        penalized = set(bound)
        others = [parameter for parameter in params if parameter not in penalized]
        halves = [parameter for parameter in params if parameter.dtype in _HALF]
        untrained = [parameter for parameter in params if parameter.dtype not in _TRAINED]
        groups = chain.from_iterable([number] * size for number, size in enumerate(group_sizes))
        group_of = dict(zip(params, groups, strict=True))
        return _Roles(params, group_sizes, bound, others, halves, untrained, _kinds(params), group_of)


class FusedAdamW(Optimizer):
    """AdamW (decoupled weight decay) with an EWC penalty folded into its step.

        g <- grad + lam sum_k a_k (u_k . theta - b_k) u_k      or   grad + lam S (theta - m)      (gradient mode)
        theta <- argmin |theta' - theta|^2 / (2 lr) + penalty(theta')                             (decoupled mode)
        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        theta <- (1 - lr weight_decay) theta - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The same as torch's AdamW with ``history.add_penalty_grad_(lam)`` or, decoupled,
    ``history.decoupled_step_(lam, optimizer.param_groups)`` just before its step; but ``.grad`` stays as it is.
    Decoupled training is best finished with one ``history.decoupled_step_``.

    Traffic, in bytes per float32 parameter and step: 28, which are AdamW's own, and 4 for each term (2 for bfloat16
    directions), or 8 for a diagonal history. A low-rank term's projection u_k . theta is carried: the pass that writes
    theta sums it, in float64, for the next step. It is read from the parameters once, and again after the history or
    this optimizer's state was loaded, terms were appended, parameters were frozen or freed, and after any write from
    outside that the parameters' version counters show. Writes through ``.data`` do not show: call :meth:`resync`.

    Clipping. The penalty is not clipped, since it comes after. To have it clipped, use ``FusedAdamW`` without a history
    and call ``history.add_penalty_grad_(lam)`` before clipping.

    float16 and bfloat16 parameters have a float32 master copy, ``"master"`` in their state, as well as moments in
    float32. It is what moves, and what the projections are of; the parameter is its rounding. A write from outside is
    taken over where it differs from that. A model may change its dtype or device between steps (``model.float()``): the
    next step brings the moments along, makes a master copy of a parameter that now has 16 bits, and drops that of one
    that has more and moves itself.

    ``state_dict`` and ``load_state_dict`` exchange ``step``, ``exp_avg`` and ``exp_avg_sq`` with torch's AdamW, in both
    directions, and parameter groups have the same keys. torch ignores ``"master"`` and keeps moments in the parameter's
    dtype; without a master copy, one is made of the parameter. The history, ``lam`` and the options after it are not in
    the state.

    Copies and pickles have the history, ``lam`` and these options too, but, as with any torch optimizer, no hooks of
    others. Copy it together with its model, ``copy.deepcopy((model, optimizer))``: the copied optimizer then moves the
    copied model, whose penalty it has; ``optimizer.history`` is its history. A copy without the model has a history
    without one, and its step says so.

    A GradScaler's scale and its skipped steps are honoured on the device, as by torch's ``fused=True``. Nothing waits
    for the device, but for ``verify_every`` and, decoupled, learning rates that differ by group and are tensors on it.

    A bound parameter without a gradient moves by the penalty; as in torch, any other stays. A bound one that requires
    no gradient any more stays where it is, and its part of the penalty counts. Parameters of other dtypes, such as int8
    or float8, are taken as long as they have no gradient.

    Args:
        params: as for any torch optimizer; groups may have their own ``lr``, ``betas``, ``eps``, ``weight_decay``.
        lr, betas, eps, weight_decay, maximize: as for torch's AdamW.
        amsgrad, capturable, differentiable: as for torch's AdamW, and False is all that there is.
        foreach, fused: accepted, kept in the groups, and without effect: there is one implementation, a fused one.
        history: a LowRankHistory or DiagonalHistory of some or all of these parameters; others get no penalty. Terms
            may be appended between steps.
        lam: strength, a float or a 0-dim tensor; may be changed between steps, in place or through ``optimizer.lam``.
            One for all groups, because anything else is the gradient of no penalty.
        decoupled: the proximal step before AdamW's own, each group with its learning rate, in place of the gradient.
            ``lam`` may be infinite then.
        verify_every: read the projections anew every so many steps, and warn if they had changed; 0: never.

    Attributes:
        last_penalty: the penalty before the last step, a 0-dim float64 tensor on the device.

    Raises:
        TypeError, ValueError: options that are not implemented, ``lam`` in a group, trained parameters of another dtype
            than float16, bfloat16, float32 or float64, hyperparameters out of range, a history of parameters that are
            not the optimizer's or one that is attached; ``maximize`` with a history.
        RuntimeError: in a step, before anything is written: a gradient that is sparse or of a parameter of another
            dtype, capture in a CUDA graph, a history that was copied without its model.
    """

    _step_supports_amp_scaling = True
    # Version counters, which a step watches, cannot be traced: compiled code calls it as it is.
    _untraced_step: Any = None

    _given: Mapping[Tensor, dict[str, Any]] = {}  # while a state is loaded: what torch has rounded since

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
        lam: float | Tensor = 0.0,
        decoupled: bool = False,
        verify_every: int = 0,
    ) -> None:
        check_strength("lam", lam, finite=not decoupled)
        if not isinstance(verify_every, int) or verify_every < 0:
            raise ValueError(f"verify_every is {verify_every!r}; expected an integer >= 0, where 0 is never.")
        check_history(history)
        self.lam, self._decoupled, self._verify_every = lam, decoupled, verify_every
        self._history = history
        self._steps_taken = 0
        self._begin()
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
            "decoupled_weight_decay": True,  # so that torch's Adam, which may load the state, is told
        }
        super().__init__(params, defaults)
        if self._penalty is not None:
            self._penalty.require_members(self.param_groups)
        first = next(chain.from_iterable(group["params"] for group in self.param_groups), None)
        device = None if first is None else first.device
        self.last_penalty = torch.zeros((), dtype=torch.float64, device=device)

    def _begin(self) -> None:
        """Forgets whatever is only kept from one step to the next."""
        if FusedAdamW._untraced_step is None:  # with the first optimizer, because it imports torch._dynamo, for seconds
            FusedAdamW._untraced_step = torch.compiler.disable(FusedAdamW._step)
        self._penalty = fold_history(self._history, self._decoupled)
        self._versions: list[int] | None = None  # of watched parameters after the last step; None: read them anew
        self._roles = _Roles.of([], [], [])
        self._uploaded: dict[Any, Tensor] = {}

    @property
    def history(self) -> LowRankHistory | DiagonalHistory | None:
        """What the penalty is made of."""
        return self._history

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._sharded = any(is_sharded(p) for group in self.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles."""
        return super().__getstate__() | {name: self.__dict__[name] for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of copies and pickles, and of ``load_state_dict``."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # groups that older versions of torch or of this have saved
                group.setdefault(name, value)
            group["decoupled_weight_decay"] = True
        for parameter, kept in self.state.items():
            if isinstance(parameter, Tensor) and kept:
                kept.update(self._given.get(parameter, {}))
                _fit(parameter, kept)
        self._begin()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of a FusedAdamW or of torch's AdamW, as load-state hooks leave it.

        Raises:
            ValueError: a state that has used amsgrad, or that is incomplete or of parameters of other shapes. Nothing
                changes then.
        """
        last = self.register_load_state_dict_pre_hook(FusedAdamW._read_state)  # it sees what the others have made
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._given = {}

    @staticmethod
    def _read_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks a state before anything changes, and keeps the float32 tensors of 16-bit parameters, because torch
        rounds them."""
        assert isinstance(optimizer, FusedAdamW)
        for group in state_dict["param_groups"]:
            optimizer._check_options(group)
            optimizer._check_numbers(optimizer.defaults | group)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        states, given = dict(state_dict["state"]), {}
        for number, (key, parameter) in enumerate(zip(saved, params, strict=False)):  # torch refuses other numbers
            if not states.get(key):
                continue
            # A flattened distributed checkpoint has {} for what it lacks.
            state = {name: value for name, value in states[key].items() if not (isinstance(value, dict) and not value)}
            if state:
                _check_state(f"parameter {number}" if key == number else f"parameter {key!r}", parameter, state)
            states[key] = state
            if parameter.dtype in _HALF:
                given[parameter] = {name: state[name] for name in _IN_FLOAT32 if name in state}
        optimizer._given = given
        return state_dict | {"state": states}

    def resync(self) -> None:
        """Makes the next step read the parameters anew: call it after writing to them through ``.data``."""
        self._versions = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step. A closure, as in torch, computes the loss and the gradients first, and its loss is returned.

        Warns:
            UserWarning: ``verify_every`` has found the parameters changed.
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
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "FusedAdamW's step is being captured in a CUDA graph, whose replays would not carry projections from "
                "step to step. Capture forward and backward alone, or use torch.optim.AdamW(capturable=True) with "
                "history.add_penalty_grad_(lam) before its step."
            )
        check_strength("lam", self.lam, finite=not self._decoupled)
        penalty = self._penalty if self._penalty is not None and len(self._penalty.history) else None
        bound = penalty.bound_params() if penalty is not None else []
        roles = self._find_roles(bound)
        self._check_gradients(roles)
        if roles is not self._roles:
            self._roles, self._versions = roles, None
            for parameter in roles.params:
                if state := self.state.get(parameter):
                    _fit(parameter, state)
        watched = bound + roles.halves
        if self._versions != self._versions_of(watched):
            self._versions = None
        if penalty is not None:
            self._carry(penalty, bound, roles.halves)
        elif self._versions is None:
            self._adopt_writes(roles.halves)

        moved = [parameter for parameter in bound if parameter.requires_grad]
        if penalty is not None:
            self.last_penalty = penalty.step_(partial(self._operands, moved), self.lam, self.param_groups)
        others: dict[torch.device, list[Tensor]] = {}
        for parameter in roles.others:
            if parameter.grad is not None:
                others.setdefault(parameter.device, []).append(parameter)
        for device, params in others.items():
            nothing = torch.zeros(0, dtype=torch.float64, device=device)
            operators.low_rank_adamw_(self._operands(params, [0.0] * len(params), None), [], nothing, False)
            moved += params
        if rounded := [parameter for parameter in moved if parameter.dtype in _HALF]:
            masters = [self.state[parameter]["master"] for parameter in rounded]
            torch._foreach_copy_(self._local(rounded), self._local(masters))
        self._versions = self._versions_of(watched)
        self._steps_taken += 1

    def _find_roles(self, bound: list[Tensor]) -> _Roles:
        """Those that are kept, or new ones if a parameter has joined, left or changed its group, dtype or device."""
        kept, params = self._roles, [parameter for group in self.param_groups for parameter in group["params"]]
        group_sizes = [len(group["params"]) for group in self.param_groups]
        if (
            group_sizes == kept.group_sizes
            and _same(params, kept.params)
            and _same(bound, kept.bound)
            and _kinds(params) == kept.kinds
        ):
            return kept
        return _Roles.of(params, group_sizes, bound)

    def _versions_of(self, params: list[Tensor]) -> list[int]:
        """Their version counters; a sharded one's part in this process has a counter of its own."""
        versions = [parameter._version for parameter in params]
        return versions + [local_part(parameter)._version for parameter in params] if self._sharded else versions

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        """This process's parts of parameters, gradients or moments."""
        return list(map(local_part, tensors)) if self._sharded else tensors

    def _carry(self, penalty: FoldedPenalty[Any], bound: list[Tensor], halves: list[Tensor]) -> None:
        """Sees to it that what the penalty carries belongs to the parameters as they are."""
        moving = tuple(i for i, parameter in enumerate(bound) if parameter.requires_grad)
        fits = self._versions is not None and penalty.is_current(moving)
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
                f"parameters were changed behind FusedAdamW's back: {difference}. It goes on with the new ones; call "
                "resync() after writing to parameters through .data.",
                stacklevel=6,
            )

    def _adopt_writes(self, halves: list[Tensor]) -> None:
        """Takes over, into the master copies, what was written to parameters from outside."""
        for parameter in halves:
            if (master := self.state.get(parameter, {}).get("master")) is not None:
                master, parameter = self._local([master, parameter])
                same = master.to(parameter.dtype) == parameter
                master.copy_(torch.where(same, master, parameter.float()))

    def _operands(self, params: list[Tensor], ratios: list[float], share: Tensor | None) -> operators.AdamWState:
        """The operands of one pass over some parameters, each with its ratio of the penalty's share (None: of 1).

        AdamW leaves a parameter without a gradient alone, and so, decoupled, only the penalty moves it: a learning rate
        of 0 on moments that are thrown away.
        """
        device = params[0].device
        states = [self.state[parameter] for parameter in params]
        for parameter, state in zip(params, states, strict=True):
            if not state:
                state.update(_new_state(parameter))
        thetas = [state.get("master", parameter) for parameter, state in zip(params, states, strict=True)]
        grads = [torch.zeros_like(x) if p.grad is None else p.grad for x, p in zip(thetas, params, strict=True)]
        rows = [self._roles.group_of[parameter] for parameter in params]
        if self._decoupled:
            for i, parameter in enumerate(params):
                if parameter.grad is None:
                    states[i], rows[i] = _new_state(parameter), len(self.param_groups)  # the row after theirs is _IDLE
        stepped = [state["step"] for state in states]
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones((), device=device)
        if found_inf is not None:
            found_inf = found_inf.to(device)
            taken = (found_inf <= 0).float()
        torch._foreach_add_(stepped, taken, alpha=1)  # without alpha, or with a number, it takes 4 times as long
        return operators.AdamWState(
            self._local(thetas),
            self._local(grads),
            self._local([state["exp_avg"] for state in states]),
            self._local([state["exp_avg_sq"] for state in states]),
            self._settings(rows, ratios, stepped, share, device),
            found_inf,
        )

    def _settings(
        self, rows: list[int], ratios: list[float], steps: list[Tensor], share: Tensor | None, device: torch.device
    ) -> Tensor:
        """The pass's settings, (number of parameters, 8): see the operators' definition in ``reference.py``."""
        table = self._upload((*map(_row, self.param_groups), _IDLE), torch.float64, device)
        rates = [group["lr"] for group in self.param_groups]
        if any(map(_on_device, rates)):
            weight_decays = tuple(float(group["weight_decay"]) for group in self.param_groups)
            numbers = [torch.as_tensor(rate, dtype=torch.float64, device=device) for rate in (*rates, 0.0)]
            lr = torch.stack([number.reshape(()) for number in numbers])
            table = table.clone()
            table[:, 3] = 1 - lr * self._upload((*weight_decays, 0.0), torch.float64, device)
            table[:, 4] = lr
        settings = table[self._upload(tuple(rows), torch.int64, device)]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            settings[:, 0] /= scale.to(device, torch.float64)
        corrections = 1 - settings[:, 1:3] ** torch.stack(steps).double().unsqueeze(1)
        settings[:, 4] /= corrections[:, 0]
        settings[:, 5] = corrections[:, 1].rsqrt()
        ratio = self._upload(tuple(ratios), torch.float64, device)
        settings[:, 7] = ratio if share is None else torch.where(ratio == 0, ratio, ratio * share)  # it may be infinite
        return settings

    def _upload(self, numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers on the device, without waiting for it; kept while they stay the same."""
        key = numbers, dtype, device
        if (kept := self._uploaded.get(key)) is None:
            kept = torch.tensor(numbers, dtype=dtype)
            if device.type == "cuda":
                kept = kept.pin_memory()  # torch keeps it until the copy is done
            kept = kept.to(device, non_blocking=True)
            if len(self._uploaded) >= 16:  # a schedule
                self._uploaded.clear()
            self._uploaded[key] = kept
        return kept

    def _check_gradients(self, roles: _Roles) -> None:
        for parameter in roles.untrained:
            if parameter.grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype} and has a gradient; "
                    "expected a real floating-point dtype of 16, 32 or 64 bits. Leave it to another optimizer."
                )
        gradients = [parameter.grad for parameter in roles.params]
        if {gradient.layout for gradient in gradients if gradient is not None} <= {torch.strided}:
            return
        for i, (parameter, gradient) in enumerate(zip(roles.params, gradients, strict=True)):
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {i}, of shape {tuple(parameter.shape)}, is {gradient.layout}; "
                    "FusedAdamW takes dense ones. Make its layer's gradient dense (nn.Embedding(sparse=False)), or "
                    "leave it to another optimizer."
                )

    def _check_group(self, group: Mapping[str, Any]) -> None:
        self._check_options(group)
        if group["capturable"]:
            raise ValueError(
                "capturable=True is not supported: a replayed CUDA graph would not carry projections from step to "
                "step. Use torch.optim.AdamW(capturable=True) with history.attach(optimizer, lam)."
            )
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.dtype not in _TRAINED:
                raise TypeError(
                    f"a parameter is {parameter.dtype}; expected a real floating-point dtype of 16, 32 or 64 bits, or "
                    "a parameter that requires no gradient. Leave it to another optimizer."
                )
        self._check_numbers(group)

    def _check_numbers(self, group: Mapping[str, Any]) -> None:
        for argument in ("lr", "eps", "weight_decay"):
            check_strength(argument, _one_number(argument, group[argument]))
        betas = group["betas"]
        if len(betas) != 2 or not all(0 <= float(_one_number("a beta", beta)) < 1 for beta in betas):
            raise ValueError(f"betas is {betas!r}; expected two numbers >= 0 and < 1.")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError(f"betas is {betas!r}; expected two numbers or two tensors.")

    def _check_options(self, group: Mapping[str, Any]) -> None:
        if group.get("amsgrad"):
            raise ValueError(
                "amsgrad=True is not supported; use torch.optim.AdamW with history.attach(optimizer, lam)."
            )
        if group.get("differentiable"):
            raise ValueError(
                "differentiable=True is not supported, because the step writes in place, outside of autograd; use "
                "torch.optim.AdamW with rank1_ewc_penalty or diagonal_ewc_penalty in the loss."
            )
        if "lam" in group:
            raise ValueError(
                "lam is in a parameter group; there is one for all, because anything else is the gradient of no "
                "penalty. Pass lam= to FusedAdamW."
            )
        if group.get("maximize") and self._history is not None:
            raise ValueError("maximize=True would maximize the penalty too; negate the loss instead.")


_COPIED = ("lam", "_decoupled", "_verify_every", "_history", "_steps_taken", "_sharded", "last_penalty")
_IN_FLOAT32 = ("exp_avg", "exp_avg_sq", "master")
_IDLE = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)


def _kinds(params: list[Tensor]) -> list[Any]:
    return [*map(_dtype, params), *map(Tensor.get_device, params)]


def _one_number(argument: str, value: Any) -> Any:
    """torch's AdamW takes tensors of one element in any shape."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{argument} is a tensor of shape {tuple(value.shape)}; expected a number or one element.")
    return value.reshape(())


def _check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Raises ValueError unless a parameter's state can be taken over."""
    where = "expected step, exp_avg and exp_avg_sq, as FusedAdamW and torch.optim.AdamW save them, of the same model."
    if missing := [key for key in _SAVED if key not in state]:
        raise ValueError(f"the state of {name} lacks {join_names(missing)}; {where}")
    for key in _IN_FLOAT32:
        value = state.get(key, parameter)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{key!r} in the state of {name} has shape {shape} and the parameter {tuple(parameter.shape)}; {where}"
            )
    if empty := [k for k, v in state.items() if isinstance(v, Tensor) and v.is_meta and not parameter.is_meta]:
        raise ValueError(f"{join_names(empty)} in the state of {name} is on the meta device and has no data; {where}")


def _fit(parameter: Tensor, state: dict[str, Any]) -> None:
    """Puts a state on its parameter's device, in the dtype that steps compute in, with a master copy of a 16-bit
    parameter alone: any other is itself what moves."""
    half = parameter.dtype in _HALF
    dtype = torch.float32 if half else parameter.dtype
    state["step"] = torch.as_tensor(state["step"]).to(parameter.device, torch.float32)
    for key in _IN_FLOAT32:
        if key in state:
            state[key] = state[key].to(parameter.device, dtype)
    if half:
        state.setdefault("master", parameter.detach().float())
    else:
        state.pop("master", None)


def _row(group: Mapping[str, Any]) -> _Row:
    (beta1, beta2), lr = group["betas"], group["lr"]
    sign = -1.0 if group.get("maximize") else 1.0
    rate = 0.0 if _on_device(lr) else float(lr)  # to look at it would wait for the device
    decay = 1 - rate * float(group["weight_decay"])
    return sign, float(beta1), float(beta2), decay, rate, 1.0, float(group["eps"]), 1.0


def _on_device(rate: float | Tensor) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"


def _same(tensors: list[Any], others: list[Any]) -> bool:
    """Whether these are the same objects."""
    return len(tensors) == len(others) and all(map(is_, tensors, others))


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    half = parameter.dtype in _HALF
    theta = parameter.detach().float() if half else parameter
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(theta, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(theta, memory_format=torch.preserve_format),
    }
    return state | {"master": theta} if half else state
