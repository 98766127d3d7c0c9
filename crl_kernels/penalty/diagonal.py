"""DiagonalHistory: the exact sum of all past tasks' diagonal penalties, with the memory of one."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import operators
from ..fisher.forms import DiagonalFisher
from ..fisher.validation import require_scalars
from ..model.names import Layout
from .history import History
from .strength import Rate, check_strength
from .vectors import differentiable_through


def _halves(pieces: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]


class DiagonalHistory(History[DiagonalFisher]):
    """The exact sum of all past tasks' diagonal penalties, with the memory of one.

        (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R)

    S = sum_t F_t, m is the S-weighted mean of the anchors, and R (float64) is the remaining sum at theta = m. They are
    updated as in Welford's algorithm for a variance, because a difference of the sums of F theta* and F theta*^2 would
    lose accuracy. State: 8 bytes per parameter.

    Args:
        model, include, exclude: see ``LowRankHistory``.
        decay: see ``append``.
    """

    _fisher_type = DiagonalFisher
    _scalar_keys = ("num_tasks", "residual")
    _scalar_types: ClassVar = {"num_tasks": int, "residual": float}

    def __init__(
        self,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        *,
        decay: float = 1.0,
    ) -> None:
        super().__init__(model, include, exclude, decay)
        numel = sum(self._binding.shards.lengths)
        self._fisher = torch.zeros(numel, dtype=self._binding.dtype, device=self._device)
        self._anchor, self._residual = torch.zeros_like(self._fisher), self._float64(0.0)
        self._sums = [0.0, 0.0]  # see _set_vectors

    def __len__(self) -> int:
        """The number of tasks."""
        return self._num_tasks

    def penalty(self, lam: float | Tensor) -> Tensor:
        """(lam / 2) (sum_j S_j (theta_j - m_j)^2 + R); see ``diagonal_ewc_penalty``."""
        check_strength("lam", lam)
        value = self._value(self._total(), lam) if self._num_tasks else self._zero()
        return self._agree_in_backward(value, lam)

    def _total(self) -> Tensor:
        """sum_j S_j (theta_j - m_j)^2 + R, 0-dim float64; differentiable by the parameters."""
        params = self._params()
        pieces = self._pieces([self._fisher, self._anchor], None)
        local = operators.diagonal_quadratic(params, *_halves(pieces))
        return self._binding.shards.sum(local) + self._residual

    @torch.no_grad()
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor:
        """Adds the penalty's gradient, lam S (theta - m), to ``.grad``, in one pass; call it after backward.

        Creates missing gradients, as autograd does. Never waits for the device, but to compare ``lam`` with the other
        processes that share the model, once after a change; see ``append``.

        Returns:
            The penalty's value, a 0-dim float64 tensor.
        """
        check_strength("lam", lam)
        self._agree_on_strength(lam, "a gradient")
        if not self._num_tasks:
            return self._float64(0.0)
        strength = self._float64(lam)
        total = self._accumulate(
            lambda grads, params: operators.diagonal_accumulate_(
                grads, params, *self._fisher_and_anchor(None, params), strength
            )
        )
        return (self._binding.shards.sum_(total) + self._residual) * lam * 0.5

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: Rate) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate: a float, a 0-dim tensor, or ``optimizer.param_groups``.

            theta <- theta - w (theta - m),   w = lr lam S / (1 + lr lam S)

        ``lam`` may be infinite: theta = m wherever S > 0.
        """
        groups, rate = self._groups(lr)
        strength = self._proximal_strength(lam, rate)
        self._agree_on_strength(lam, "a decoupled step")
        if not self._num_tasks:
            return
        params = self._trainable_params()
        run = self._run_or_list(params)
        for ratio, members in groups:
            targets = run if members is None else [params[i] for i in members]
            operators.diagonal_shrink_(targets, *self._fisher_and_anchor(members, targets), ratio * strength)
        self._count_writes(params, run)

    def _fisher_and_anchor(
        self, members: tuple[int, ...] | None, along: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of S and m that belong to the parameters ``members``; see ``_constant_pieces``."""
        return _halves(self._constant_pieces([self._fisher, self._anchor], members, along))

    def _add_terms(self, fisher: DiagonalFisher, layout: Layout) -> None:
        vectors = (fisher.fisher_diagonal, fisher.anchor)
        new, anchor = (self._bound(layout, flat, fisher.shards).double() for flat in vectors)
        self._add(new, anchor, self._decay)

    def _add(self, new: Tensor, anchor: Tensor, decay: float) -> None:
        """Multiplies the present curvatures by ``decay`` and adds sum_j new_j (theta_j - anchor_j)^2; float64, flat."""
        old, distance = decay * self._fisher.double(), anchor - self._anchor.double()
        total = old + new
        share = torch.where(total > 0, new / total, 0.0)
        added_residual = self._binding.shards.sum_((old * share * distance.square()).sum())
        dtype = self._fisher.dtype
        self._set_vectors(
            total.to(dtype),
            (self._anchor + share * distance).to(dtype),
            decay * self._residual + added_residual,
        )
        self._require_numbers(f"the sum of curvatures in {dtype}", self._fisher)
        self._require_numbers(f"the mean anchor in {dtype}", self._anchor)
        require_scalars("the residual R", self._residual[None], 1)

    def _set_vectors(self, fisher: Tensor, anchor: Tensor, residual: Tensor) -> None:
        self._fisher, self._anchor, self._residual = map(differentiable_through, (fisher, anchor, residual))
        self._parts = {}
        largest = fisher.max() if fisher.numel() else fisher.new_zeros(())
        self._curvature = float(self._binding.shards.max_(largest))
        norm, total = torch.linalg.vector_norm(fisher, dtype=torch.float64), fisher.sum(dtype=torch.float64)
        self._sums = self._binding.shards.sum_(torch.stack([norm.square(), total])).tolist()  # of S^2 and of S

    def _mean_curvature(self) -> float:
        squares, total = self._sums
        return squares / total if total else 0.0

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"fisher_diagonal.{name}": tensor for name, tensor in self._named(self._fisher).items()}
        tensors |= {f"anchor.{name}": tensor for name, tensor in self._named(self._anchor).items()}
        return tensors | {"residual": self._residual}

    def _set_state(self, state: Mapping[str, Tensor], origin: str, grown: Container[str] = ()) -> None:
        num_tasks, residual = self._scalars_of(state, origin, "residual")
        prefixes, dtypes = ("fisher_diagonal.", "anchor."), (torch.float32, torch.float64)
        fisher, anchor = self._vectors_of(state, prefixes, dtypes, origin, grown)
        if fisher.dtype != anchor.dtype:
            raise ValueError(f"fisher_diagonal in {origin} is {fisher.dtype} and anchor {anchor.dtype}; expected one.")
        if residual.dim() != 0:
            raise ValueError(f"residual in {origin} has shape {tuple(residual.shape)}; expected one number.")
        require_scalars(f"residual in {origin}", residual[None], 1, nonnegative=True)
        self._set_vectors(fisher, anchor, residual.to(self._device))
        if num_tasks == 0 and (self._curvature or residual):
            raise ValueError(f"num_tasks in {origin} is 0, and its curvatures are not; expected the number of tasks.")
        self._num_tasks = int(num_tasks)

    def _map_vectors(self, function: Callable[[Tensor], Tensor]) -> None:
        self._fisher, self._anchor = function(self._fisher), function(self._anchor)
        self._parts = {}

    def _move_state(self, device: torch.device) -> None:
        self._map_vectors(lambda vector: vector.to(device))
        self._residual = self._residual.to(device)
