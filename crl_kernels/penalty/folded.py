"""A history's penalty folded into the pass of an AdamW step, and the sums that are carried from one step to the next.

Low rank. The pass that writes theta also sums the projections p_k = u_k . theta, so that the next step need not read
theta for them. The pass adds sum_k c_k u_k: to the gradient, with c_k = lam a_k (p_k - b_k); or, decoupled, to theta
before the step, with the c of ``LowRankHistory.decoupled_step_``. Diagonal. The penalty acts on each element by itself,
so nothing is carried for moving parameters.

Frozen parameters are bound parameters that no longer require a gradient and do not move. They are read once: their part
of the projections, or of the value, is carried too.

An optimizer uses this module through ``fold_history``, ``check_history`` and the public methods of ``FoldedPenalty``.
Only this module knows which parts of a history's state a step needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .. import operators
from ..distributed.shards import Shards
from ..model.arguments import require_switch
from .diagonal import DiagonalHistory
from .low_rank import LowRankHistory
from .strength import Groups, Rate, check_strength

_SUMMATION_ERROR = 1e-12  # how far two summation orders of u . theta may differ, relative to |u| |theta|

_History = TypeVar("_History", LowRankHistory, DiagonalHistory)
# Makes the operands of an AdamW pass over the moving parameters, and their roundings. Arguments: each parameter's ratio
# of the penalty's strength, and that strength as a 0-dim tensor. None means a strength of 1.
MakeOperands = Callable[[list[float], Tensor | None], tuple[operators.AdamWState, list[Tensor] | None]]


class FoldedPenalty(ABC, Generic[_History]):
    """A history's penalty inside an optimizer's step, with the sums that it carries from step to step.

    Carried sums belong to one state of the history and to one set of moving parameters; both are remembered.
    """

    def __init__(self, history: _History, decoupled: bool) -> None:
        self.history: _History = history
        self._decoupled = decoupled
        self._state_read: object = None  # the history's state that the carried sums belong to
        self._moving: tuple[int, ...] = ()

    @property
    def _shards(self) -> Shards:
        return self.history._binding.shards

    def bound_params(self) -> list[Tensor]:
        """The history's parameters, in its order. Raises ValueError if one was replaced, resized or moved."""
        return self.history._bound_params()

    def agree_on_strength(self, lam: float | Tensor) -> None:
        """Raises RuntimeError if a process that shares the model has another ``lam``; asks them once after a change."""
        self.history._agree_on_strength(lam, "a decoupled step" if self._decoupled else "a gradient")

    def require_members(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for a bound parameter that is in no group."""
        self.history._binding.members(param_groups)

    def is_current(self, moving: tuple[int, ...]) -> bool:
        """Whether the carried sums still fit: no terms were appended, loaded or moved, and no parameter was frozen or
        unfrozen."""
        return self._state_read is self._state() and self._moving == moving

    def read(self, params: Sequence[Tensor], moving: tuple[int, ...]) -> None:
        """Computes the carried sums from the bound parameters; steps will move those at the indices ``moving``."""
        self._state_read, self._moving = self._state(), moving
        frozen = tuple(sorted(set(range(len(params))) - set(moving)))
        self._read(params, frozen)

    def find_difference(self, params: Sequence[Tensor], moving: tuple[int, ...]) -> str | None:
        """Computes the carried sums again. Returns the difference in words, or None if there is none. Waits for the
        device."""
        before = self._carried()
        self.read(params, moving)
        return self._difference(before, self._carried(), params)

    @abstractmethod
    def step_(self, make_operands: MakeOperands, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        """Takes the step of the moving parameters; returns the penalty before it, 0-dim float64."""

    @abstractmethod
    def _state(self) -> object:
        """An object that the history replaces whenever its state changes."""

    @abstractmethod
    def _read(self, params: Sequence[Tensor], frozen: tuple[int, ...]) -> None: ...

    @abstractmethod
    def _carried(self) -> Tensor: ...

    @abstractmethod
    def _difference(self, before: Tensor, now: Tensor, params: Sequence[Tensor]) -> str | None: ...

    def _members(self, indices: tuple[int, ...]) -> tuple[int, ...] | None:
        """Indices of parameters for ``History._pieces``: None stands for all parameters."""
        return None if len(indices) == len(self.history.names) else indices

    def _proximal(self, lam: float | Tensor, lr: Rate) -> tuple[Groups, Tensor, list[float]]:
        """(groups of moving parameters, the largest learning rate times lam, each moving parameter's ratio to it)."""
        if not self._moving:
            return (), self.history._float64(0.0), []
        groups, rate = self.history._groups(lr, self._members(self._moving))
        if groups and groups[0][1] is None:
            ratios = [groups[0][0]] * len(self._moving)
        else:
            share_of = {i: share for share, members in groups for i in members or ()}
            ratios = [share_of.get(i, 0.0) for i in self._moving]
        return groups, self.history._proximal_strength(lam, rate), ratios


class FoldedLowRank(FoldedPenalty[LowRankHistory]):
    def __init__(self, history: LowRankHistory, decoupled: bool) -> None:
        super().__init__(history, decoupled)
        self._projections = self._frozen_part = torch.zeros(0)  # not read yet

    def _state(self) -> object:
        return self.history._directions  # a new list whenever terms change

    def _read(self, params: Sequence[Tensor], frozen: tuple[int, ...]) -> None:
        self._projections = _in_place_of(self._projections, self._project(params, self._moving))
        self._frozen_part = _in_place_of(self._frozen_part, self._project(params, frozen))

    def _project(self, params: Sequence[Tensor], indices: tuple[int, ...]) -> Tensor:
        if not indices:
            return torch.zeros_like(self.history.curvatures)
        projected = [params[i] for i in indices]
        pieces = self._pieces(self._members(indices), projected)
        projections = operators.constant_projections(projected, pieces, len(self.history))
        return self._shards.sum_(projections)

    def _pieces(self, members: tuple[int, ...] | None, along: Sequence[Tensor]) -> list[Tensor]:
        return self.history._constant_pieces(self.history._directions, members, along)

    def _carried(self) -> Tensor:
        return self._projections + self._frozen_part

    def _difference(self, before: Tensor, now: Tensor, params: Sequence[Tensor]) -> str | None:
        squares = torch.stack([p.detach().double().square().sum() for p in params]).sum()
        norm = self._shards.sum_(squares).sqrt()
        lengths = self.history._gram(None).diagonal().sqrt().to(now.device)
        if bool(((before - now).abs() <= _SUMMATION_ERROR * lengths * norm).all()):
            return None
        return f"the projections u_k . theta were {before.tolist()} and are {now.tolist()}"

    def step_(self, make_operands: MakeOperands, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        history = self.history
        drift = self._carried() - history.anchor_projections
        force = history._float64(lam) * (history.curvatures * drift)
        if self._decoupled:
            groups, strength, ratios = self._proximal(lam, lr)
            coefficients = history._proximal_coefficients(groups, strength, drift)
        else:
            coefficients, ratios = force, [1.0] * len(self._moving)
        if self._moving:
            state, roundings = make_operands(ratios, None)
            directions = self._pieces(self._members(self._moving), state.params)
            projections = operators.low_rank_adamw_(state, directions, coefficients, self._decoupled, roundings)
            self._projections.copy_(self._shards.sum_(projections))
        return 0.5 * (force * drift).sum()


class FoldedDiagonal(FoldedPenalty[DiagonalHistory]):
    def __init__(self, history: DiagonalHistory, decoupled: bool) -> None:
        super().__init__(history, decoupled)
        self._frozen_part = torch.zeros(0)  # not read yet

    def _state(self) -> object:
        return self.history._fisher  # a new tensor whenever tasks change

    def _read(self, params: Sequence[Tensor], frozen: tuple[int, ...]) -> None:
        part = self.history._float64(0.0)
        if frozen:
            quiet = [params[i] for i in frozen]
            pieces = self.history._fisher_and_anchor(self._members(frozen), quiet)
            value = operators.diagonal_quadratic(quiet, *pieces)
            part = self._shards.sum_(value)
        self._frozen_part = _in_place_of(self._frozen_part, part)

    def _carried(self) -> Tensor:
        return self._frozen_part

    def _difference(self, before: Tensor, now: Tensor, params: Sequence[Tensor]) -> str | None:
        if bool(before == now):
            return None
        return f"the share of frozen parameters in sum S (theta - m)^2 was {before.item()} and is {now.item()}"

    def step_(self, make_operands: MakeOperands, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        history = self.history
        if self._decoupled:
            _, strength, ratios = self._proximal(lam, lr)
        else:
            strength, ratios = history._float64(lam), [1.0] * len(self._moving)
        total = self._frozen_part + history._residual
        if self._moving:
            state, roundings = make_operands(ratios, strength)
            pieces = history._fisher_and_anchor(self._members(self._moving), state.params)
            value = operators.diagonal_adamw_(state, *pieces, self._decoupled, roundings)
            total = total + self._shards.sum_(value)
        return total * (0.5 * history._float64(lam))


def _in_place_of(kept: Tensor, new: Tensor) -> Tensor:
    """``new``, in the memory of ``kept`` where it fits: a step that a CUDA graph has captured reads it there."""
    return kept.copy_(new) if (kept.shape, kept.device) == (new.shape, new.device) else new


def check_penalty(history: object, lam: float | Tensor, decoupled: bool) -> None:
    """Raises unless these are a history, a strength and a switch, as the trainers' callbacks and plugins take them."""
    if not isinstance(history, LowRankHistory | DiagonalHistory):
        raise TypeError(f"history is a {type(history).__name__}; expected a LowRankHistory or a DiagonalHistory.")
    require_switch("decoupled", decoupled)
    check_strength("lam", lam, finite=not decoupled)


def check_history(history: object, lam: float | Tensor, decoupled: bool) -> None:
    """The same, and raises for a history that an optimizer has by ``attach``."""
    check_penalty(history, lam, decoupled)
    assert isinstance(history, LowRankHistory | DiagonalHistory)
    if history._attachment is not None:
        raise ValueError("history is attached to an optimizer, and its penalty would count twice; call detach() first.")
    if isinstance(history, LowRankHistory) and history._tail is not None:
        raise ValueError(
            "history has tail='diagonal', and the step has room for directions or a diagonal, not for both; create the "
            "optimizer without history= and call history.attach(optimizer, lam)."
        )


def fold_history(history: LowRankHistory | DiagonalHistory | None, decoupled: bool) -> FoldedPenalty[Any] | None:
    if history is None:
        return None
    return (
        FoldedLowRank(history, decoupled) if isinstance(history, LowRankHistory) else FoldedDiagonal(history, decoupled)
    )
