"""A history's penalty folded into the pass of an AdamW step, and what is carried from one step to the next.

Low rank. The pass that writes theta also sums u_k . theta, so the next step starts with its projections p and reads
nothing for them. It adds sum_k c_k u_k: to the gradient, c_k = lam a_k (p_k - b_k); or, decoupled, to theta before the
step, with the c of ``LowRankHistory.decoupled_step_``. Diagonal. Every element has all that it needs.

Bound parameters that do not move, because they were frozen, are read once: their part of the projections, or of the
value, is carried too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .. import operators
from ..distributed.shards import Shards
from .diagonal import DiagonalHistory
from .low_rank import LowRankHistory
from .strength import Groups, Rate

_SAME = 1e-12  # what sums of one vector in two orders may differ by, relative to |u| |theta|

_History = TypeVar("_History", LowRankHistory, DiagonalHistory)
# From each moving parameter's share, as a number, and what all are multiplied by, if not 1, to the pass's operands.
Prepare = Callable[[list[float], Tensor | None], operators.AdamWState]


class FoldedPenalty(ABC, Generic[_History]):
    """What is carried belongs to a state of the history and to the parameters that moved; both are remembered."""

    def __init__(self, history: _History, decoupled: bool) -> None:
        self.history: _History = history
        self._decoupled = decoupled
        self._terms: object = None
        self._moving: tuple[int, ...] = ()

    @property
    def _shards(self) -> Shards:
        return self.history._binding.shards

    def is_current(self, moving: tuple[int, ...]) -> bool:
        """Whether what is carried still fits: no terms were appended, loaded or moved, nothing was frozen or freed."""
        return self._terms is self._state() and self._moving == moving

    def read(self, params: Sequence[Tensor], moving: tuple[int, ...]) -> None:
        """Computes what is carried from the bound parameters; those at ``moving`` will be moved."""
        self._terms, self._moving = self._state(), moving
        still = tuple(sorted(set(range(len(params))) - set(moving)))
        self._read([params[i] for i in moving], self._members(moving), [params[i] for i in still], still)

    def find_difference(self, params: Sequence[Tensor], moving: tuple[int, ...]) -> str | None:
        """Reads anew; says in words how far what was carried had gone from it, if it had. Waits for the device."""
        before = self._carried()
        self.read(params, moving)
        squares = torch.stack([p.detach().double().square().sum() for p in params]).sum()
        return self._difference(before, self._carried(), self._shards.sum_(squares).sqrt())

    @abstractmethod
    def step_(self, prepare: Prepare, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        """Takes the step of the moving parameters; returns the penalty before it, 0-dim float64."""

    @abstractmethod
    def _state(self) -> object: ...

    @abstractmethod
    def _read(
        self, moving: list[Tensor], members: tuple[int, ...] | None, still: list[Tensor], others: tuple[int, ...]
    ) -> None: ...

    @abstractmethod
    def _carried(self) -> Tensor: ...

    @abstractmethod
    def _difference(self, before: Tensor, now: Tensor, norm: Tensor) -> str | None: ...

    def _members(self, moving: tuple[int, ...]) -> tuple[int, ...] | None:
        """As ``History._pieces`` takes them: None for all."""
        return None if len(moving) == len(self.history.names) else moving

    def _proximal(self, lam: float | Tensor, lr: Rate) -> tuple[Groups, Tensor, list[float]]:
        """(groups of moving parameters, the largest rate times lam, each one's ratio to that)."""
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
    def _state(self) -> object:
        return self.history._directions  # a new list whenever terms change

    def _read(
        self, moving: list[Tensor], members: tuple[int, ...] | None, still: list[Tensor], others: tuple[int, ...]
    ) -> None:
        self._projections = self._project(moving, members)
        self._of_still = self._project(still, others)

    def _project(self, params: list[Tensor], members: tuple[int, ...] | None) -> Tensor:
        if not params:
            return torch.zeros_like(self.history.curvatures)
        projections = operators.constant_projections(params, self._pieces(members), len(self.history))
        return self._shards.sum_(projections)

    def _pieces(self, members: tuple[int, ...] | None) -> list[Tensor]:
        return self.history._pieces(self.history._directions, members)

    def _carried(self) -> Tensor:
        return self._projections + self._of_still

    def _difference(self, before: Tensor, now: Tensor, norm: Tensor) -> str | None:
        lengths = self.history._gram(None).diagonal().sqrt().to(now.device)
        if bool(((before - now).abs() <= _SAME * lengths * norm).all()):
            return None
        return f"the projections u_k . theta were {before.tolist()} and are {now.tolist()}"

    def step_(self, prepare: Prepare, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        history = self.history
        drift = self._carried() - history.anchor_projections
        force = history._float64(lam) * (history.curvatures * drift)
        if self._decoupled:
            groups, strength, ratios = self._proximal(lam, lr)
            coefficients = history._proximal_coefficients(groups, strength, drift)
        else:
            coefficients, ratios = force, [1.0] * len(self._moving)
        if self._moving:
            state = prepare(ratios, None)
            directions = self._pieces(self._members(self._moving))
            projections = operators.low_rank_adamw_(state, directions, coefficients, self._decoupled)
            self._projections = self._shards.sum_(projections)
        return 0.5 * (force * drift).sum()


class FoldedDiagonal(FoldedPenalty[DiagonalHistory]):
    def _state(self) -> object:
        return self.history._fisher  # a new tensor whenever tasks change

    def _read(
        self, moving: list[Tensor], members: tuple[int, ...] | None, still: list[Tensor], others: tuple[int, ...]
    ) -> None:
        self._of_still = self.history._float64(0.0)
        if still:
            self._of_still = self._shards.sum_(operators.diagonal_quadratic(still, *self._pieces(others)))

    def _pieces(self, members: tuple[int, ...] | None) -> tuple[list[Tensor], list[Tensor]]:
        pieces = self.history._pieces([self.history._fisher, self.history._anchor], members)
        return pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]

    def _carried(self) -> Tensor:
        return self._of_still

    def _difference(self, before: Tensor, now: Tensor, norm: Tensor) -> str | None:
        if bool(before == now):
            return None
        return f"the share of frozen parameters in sum S (theta - m)^2 was {before.item()} and is {now.item()}"

    def step_(self, prepare: Prepare, lam: float | Tensor, lr: Sequence[Mapping[str, Any]]) -> Tensor:
        history = self.history
        if self._decoupled:
            _, strength, ratios = self._proximal(lam, lr)
        else:
            strength, ratios = history._float64(lam), [1.0] * len(self._moving)
        total = self._of_still + history._residual
        if self._moving:
            pieces = self._pieces(self._members(self._moving))
            moved = operators.diagonal_adamw_(prepare(ratios, strength), *pieces, self._decoupled)
            total = total + self._shards.sum_(moved)
        return total * (0.5 * history._float64(lam))


def fold_history(history: LowRankHistory | DiagonalHistory | None, decoupled: bool) -> FoldedPenalty[Any] | None:
    if history is None:
        return None
    return (
        FoldedLowRank(history, decoupled) if isinstance(history, LowRankHistory) else FoldedDiagonal(history, decoupled)
    )
