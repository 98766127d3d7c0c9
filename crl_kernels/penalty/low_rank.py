"""LowRankHistory: the low-rank penalty terms of all past tasks."""

import copy
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from .. import operators
from ..backends.int8 import Int8Vector, dequantised
from ..fisher.forms import LowRankFisher
from ..fisher.validation import STORAGE_DTYPES, require_scalars
from ..model.arguments import require_integer, require_switch
from ..model.names import Layout
from .diagonal import DiagonalHistory
from .history import History
from .strength import ALL, Groups, Rate, check_strength
from .vectors import differentiable_through, split_key


def _is_of_tail(key: str) -> bool:
    """Whether a key of a state is of the diagonal of ``tail="diagonal"``."""
    return key == "residual" or split_key(key)[0] in ("fisher_diagonal.", "anchor.")


class LowRankHistory(History[LowRankFisher]):
    """The low-rank terms of all past tasks: (lam / 2) sum_k a_k (u_k . theta - b_k)^2.

    State: 4, 2 or about 1 bytes per parameter and term (the directions' storage dtype), and a few scalars. No copy of
    old parameters, but for the anchor of ``tail="diagonal"``.

    Args:
        model: its parameters that require a gradient now are bound, by identity.
        include, exclude: patterns that choose parameters: a parameter's name, the name of a module that holds it, or a
            glob such as ``"*.bias"``.
        first_order: also use each task's slope. The task's expansion along u_k is s_k x + a_k x^2 / 2 with
            x = u_k . theta - b_k, which equals a_k (x + s_k / a_k)^2 / 2 minus the constant s_k^2 / (2 a_k). So b_k
            becomes b_k - s_k / a_k, at no cost; the value does not contain the constant.
        decay: see ``append``.
        max_terms: the largest number of terms. When there are more, they are merged into the best approximation of
            sum_k a_k u_k u_k^T by ``max_terms`` orthogonal directions, each of which keeps its exact penalty up to the
            rounding of its storage. A term then no longer belongs to one task. Each merge rounds all directions again,
            to the first one's dtype, which adds up in 16 bits and int8: use float32 directions. The gradient's error
            grows with the number of tasks over ``max_terms``: on real streams up to a quarter with 30 terms for 50
            tasks, and half with 30 for 200. So keep all terms, or as many as memory and time allow.
        tail: what becomes of the directions v that merging leaves out. ``"drop"``: nothing. ``"diagonal"``: their
            diagonals are added to one term (lam / 2) sum_j S_j (theta_j - m_j)^2, which takes 8 more bytes per
            parameter (16 in float64). A direction with curvature E adds E v_j^2 to S_j, so the penalty's second
            derivative keeps its diagonal and its trace, whatever was left out. Its anchor is the point nearest to the
            parameters in ``append`` at which it is zero; m is the S-weighted mean of the anchors. ``len``,
            ``directions`` and ``drift`` tell of the other terms only. ``FusedAdamW`` does not take such a history:
            attach it. On the same streams this did not bring the gradient noticeably nearer to the exact one, and where
            old tasks were held it often took it further away. It is for holding every parameter a little, as a diagonal
            Fisher does.

    Raises:
        TypeError, ValueError: no such parameter, or parameters that cannot be bound, by name; options out of range.
    """

    _fisher_type = LowRankFisher
    _scalar_keys = ("num_tasks", "curvatures", "anchor_projections")
    _scalar_types: ClassVar = {"num_tasks": int}

    def __init__(
        self,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        *,
        first_order: bool = False,
        decay: float = 1.0,
        max_terms: int | None = None,
        tail: Literal["drop", "diagonal"] = "drop",
    ) -> None:
        super().__init__(model, include, exclude, decay)
        if max_terms is not None:
            require_integer("max_terms", max_terms, 1, ", or None for no limit")
        require_switch("first_order", first_order)
        if tail not in ("drop", "diagonal"):
            raise ValueError(f"tail is {tail!r}; expected 'drop' or 'diagonal'.")
        if tail == "diagonal" and max_terms is None:
            raise ValueError("tail is 'diagonal' and max_terms None, so nothing is ever left out; give max_terms=.")
        self._first_order, self._max_terms = first_order, max_terms
        self._tail: DiagonalHistory | None = None
        if tail == "diagonal":
            self._tail = DiagonalHistory(model, include, exclude)
            self._tail._binding = self._binding
        empty = torch.zeros(0, dtype=torch.float64, device=self._device)
        self._set_terms([], empty, empty)

    def __len__(self) -> int:
        """The number of terms K: one per task for rank 1."""
        return len(self._directions)

    @property
    def curvatures(self) -> Tensor:
        """a_k: (K,) float64."""
        return self._curvatures

    @property
    def anchor_projections(self) -> Tensor:
        """b_k = u_k . theta*_k, minus s_k / a_k if first_order: (K,) float64."""
        return self._anchor_projections

    def directions(self) -> list[dict[str, Tensor]]:
        """u_k by parameter name, one dict per term: views of the state; of directions in int8 the values, new float32
        tensors."""
        shapes = self._binding.shards.shapes
        return [
            self._named_row_major(u.floats(shapes)) if isinstance(u, Int8Vector) else self._named(u)
            for u in self._directions
        ]

    def penalty(self, lam: float | Tensor) -> Tensor:
        """(lam / 2) sum_k a_k (u_k . theta - b_k)^2; see ``rank1_ewc_penalty``."""
        check_strength("lam", lam)
        totals = []
        if self._directions:
            params = self._params()
            local = operators.low_rank_projections(params, self._pieces(self._directions, None), len(self))
            projections = self._binding.shards.sum(local)
            totals.append((self._curvatures * (projections - self._anchor_projections).square()).sum())
        if (tail := self._used_tail()) is not None:
            totals.append(tail._total())
        value = self._value(sum(totals[1:], totals[0]), lam) if totals else self._zero()
        return self._agree_in_backward(value, lam)

    def _used_tail(self) -> DiagonalHistory | None:
        """The diagonal of what merging has left out; None where there is none yet."""
        return None if self._tail is None or not len(self._tail) else self._tail

    @torch.no_grad()
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor:
        """Adds the penalty's gradient, lam sum_k a_k (u_k . theta - b_k) u_k, to ``.grad``; call it after backward.

        Creates missing gradients, as autograd does. Never waits for the device, but to compare ``lam`` with the other
        processes that share the model, once after a change; see ``append``.

        Returns:
            The penalty's value, a 0-dim float64 tensor.
        """
        check_strength("lam", lam)
        self._agree_on_strength(lam, "a gradient")
        tail = self._used_tail()
        value = self._float64(0.0) if tail is None else tail.add_penalty_grad_(lam)
        if not self._directions:
            return value
        strength = self._float64(lam)
        if not self._binding.shards.unsharded:
            return value + self._accumulate(lambda grads, params: self._accumulate_shards(grads, params, strength))
        scalars = self._curvatures, self._anchor_projections, strength
        return value + self._accumulate(
            lambda grads, params: operators.low_rank_penalty_accumulate_(
                grads, params, self._constant_pieces(self._directions, None, params), *scalars
            )
        )

    def _accumulate_shards(self, gradients: list[Tensor], params: list[Tensor], strength: Tensor) -> Tensor:
        """The same as low_rank_penalty_accumulate_, with a sum of projections over processes in between."""
        drift = self._constant_drift(params)
        force = strength * (self._curvatures * drift)
        operators.low_rank_accumulate_(gradients, self._pieces(self._directions, None), force)
        return 0.5 * (force * drift).sum()

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: Rate) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate: a float, a 0-dim tensor, or ``optimizer.param_groups``.

        With A = diag(sqrt(a)) U, r = diag(sqrt(a)) (U theta - b), groups g of parameters with rates eta_g, and
        A_g the columns of A that belong to group g:

            theta_g <- theta_g - eta_g lam A_g^T (I + lam sum_g eta_g A_g A_g^T)^-1 r

        ``lam`` may be infinite; the result is then the minimum-norm weighted least-squares point. Eigenvectors of
        A A^T with eigenvalues below 1e-12 of the largest are not moved along. Gradient clipping and the optimizer's
        scaling do not affect the penalty here.

        With ``tail="diagonal"`` the step is that of the diagonal, theta <- theta - w (theta - m) with w = lr lam S /
        (1 + lr lam S), and then the one above. Each is the minimum for its part of the penalty, so at every ``lam`` the
        two never push points apart; the exact step for the sum differs from them in second order of lr lam, and would
        take K^2 passes over the parameters.
        """
        groups, rate = self._groups(lr)
        strength = self._proximal_strength(lam, rate)
        self._agree_on_strength(lam, "a decoupled step")
        if (tail := self._used_tail()) is not None:
            tail.decoupled_step_(lam, lr)
        if not self._directions or not groups:
            return
        params = self._trainable_params()
        run = self._run_or_list(params)
        steps = self._proximal_coefficients(groups, strength, self._constant_drift(run))
        for ratio, members in groups:
            targets = run if members is None else [params[i] for i in members]
            directions = self._constant_pieces(self._directions, members, targets)
            operators.low_rank_accumulate_(targets, directions, ratio * steps)
        self._count_writes(params, run)

    def _proximal_coefficients(self, groups: Groups, strength: Tensor, drift: Tensor) -> Tensor:
        """The coefficients of u_k that the proximal step adds to parameters with the largest learning rate: (K,)."""
        if not groups:  # all rates are 0
            return torch.zeros_like(drift)
        eigenvalues, modes = self._spectrum(groups)
        return -modes @ (modes.T @ drift / (1 / strength + eigenvalues))

    @torch.no_grad()
    def drift(self) -> Tensor:
        """u_k . theta - b_k, how far the parameters have moved along each direction: (K,) float64; useful in logs."""
        return self._constant_drift(self._params()) if self._directions else self._curvatures.clone()

    def _constant_drift(self, params: list[Tensor]) -> Tensor:
        directions = self._constant_pieces(self._directions, None, params)
        return self._constant_projections(params, directions, len(self)) - self._anchor_projections

    def _constant_projections(self, params: list[Tensor], directions: list[Tensor], num_terms: int) -> Tensor:
        return self._binding.shards.sum_(operators.constant_projections(params, directions, num_terms))

    def _add_terms(self, fisher: LowRankFisher, layout: Layout) -> None:
        anchor_projections = fisher.anchor_projections
        if self._first_order:
            if fisher.slopes is None:
                raise ValueError("fisher has no slopes, which first_order=True needs; give it slopes=.")
            if bool(((fisher.curvatures == 0) & (fisher.slopes != 0)).any()):
                raise ValueError("fisher has a slope along a direction of curvature 0, which has no lowest point.")
            shift = fisher.slopes / torch.where(fisher.curvatures == 0, 1.0, fisher.curvatures)
            anchor_projections = anchor_projections - shift
            require_scalars("fisher's anchor_projections - slopes / curvatures", anchor_projections, len(fisher))
        stored, shards = fisher._stored, fisher.shards
        bound = (
            self._bound_int8(layout, stored, shards)
            if isinstance(stored, Int8Vector)
            else list(self._bound(layout, stored, shards))
        )
        if self._tail is not None:
            self._tail = copy.copy(self._tail)  # if anything fails below, the old one is as it was
            if self._decay < 1:
                old = self._tail
                old._set_vectors(self._decay * old._fisher, old._anchor, self._decay * old._residual)
        self._set_terms(
            [*self._directions, *bound],
            torch.cat([self._curvatures * self._decay, fisher.curvatures.to(self._device)]),
            torch.cat([self._anchor_projections, anchor_projections.to(self._device)]),
            self._grams.get(None),
        )
        if self._max_terms is not None and len(self) > self._max_terms:
            self._merge(self._max_terms)

    @torch.no_grad()
    def _merge(self, count: int) -> None:
        """Replaces the terms by the ``count`` strongest of an orthogonal form of the same penalty.

        With A A^T = Q E Q^T and modes W = diag(sqrt(a)) Q, the penalty sum_k a_k drift_k^2 = |W^T drift|^2 is, term by
        term, E_i (v_i . theta - c_i)^2 for v_i = (W^T U)_i / sqrt(E_i), whose drift is (W^T drift)_i / sqrt(E_i).
        """
        params = self._params()
        eigenvalues, modes = self._spectrum(ALL)
        finite = eigenvalues.isfinite().nonzero()[:, 0]
        ranked = finite[eigenvalues[finite].argsort(descending=True)]
        kept = ranked[:count]
        if not len(kept):  # all curvatures are 0
            self._set_terms([], self._curvatures[:0], self._anchor_projections[:0])
            return
        mixing = (modes[:, ranked] / eigenvalues[ranked].sqrt()).T.contiguous()
        if self._tail is not None and len(ranked) > count:
            self._fold(self._tail, eigenvalues[ranked[count:]], mixing[count:], params)
        mixing = mixing[:count]
        directions = [self._combined(row) for row in mixing]
        # c_i belongs to the stored, rounded v_i, so that the drift of the present parameters does not change.
        flat = [u for u in directions if isinstance(u, Tensor)]
        pieces = flat if self._are_flat() else self._split(directions, range(len(self.names)))
        projections = self._constant_projections(params, pieces, len(directions))
        self._set_terms(directions, eigenvalues[kept], projections - mixing @ self._constant_drift(params))

    def _combined(self, coefficients: Tensor) -> Tensor | Int8Vector:
        """sum_k c_k u_k, stored as the first direction is."""
        first = self._directions[0]
        if isinstance(first, Tensor):
            return self._sum_of(self._directions, coefficients, first)
        shapes = self._binding.shards.shapes
        like = torch.empty(sum(self._binding.shards.lengths), device=self._device)
        values = self._sum_of(self._directions, coefficients, like)
        if not self._order.is_row_major:
            values = torch.cat([part.reshape(-1) for part in self._order.split(values)])
        return Int8Vector.of(values, shapes)

    def _sum_of(self, directions: Sequence[Tensor | Int8Vector], coefficients: Tensor, like: Tensor) -> Tensor:
        """sum_k c_k u_k as a flat tensor in the state's order, of the dtype of ``like``, another such."""
        if not self._has_int8:
            return operators.low_rank_combine(cast(list[Tensor], directions), coefficients, [like])[0]
        every = range(len(self.names))
        pieces, likes = self._split(directions, every), self._split([like], every)[: len(every)]
        parts = operators.low_rank_combine(pieces, coefficients, likes)
        if self._order.is_row_major:
            return torch.cat([part.reshape(-1) for part in parts])
        return self._order.flatten(parts)

    def _fold(self, tail: DiagonalHistory, eigenvalues: Tensor, mixing: Tensor, params: list[Tensor]) -> None:
        """Adds the diagonals of terms E_i (v_i . theta - c_i)^2, with unit vectors v = mixing U, to ``tail``.

        Curvatures are the diagonal of the term's matrix, E_i v_ij^2, whose sum is its trace E_i. The anchor is the
        point nearest to the present parameters at which the term is zero, theta - v_i (v_i . theta - c_i).
        """
        tail._follow_memory_order()
        theta = self._order.flatten(params).double()
        drifts = mixing @ self._constant_drift(params)
        for eigenvalue, row, drift in zip(eigenvalues, mixing, drifts, strict=True):
            v = self._sum_of(self._directions, row, tail._fisher).double()
            tail._add(eigenvalue * v.square(), theta - drift * v, decay=1.0)
        tail._num_tasks += 1

    def _set_terms(
        self,
        directions: Sequence[Tensor | Int8Vector],
        curvatures: Tensor,
        anchor_projections: Tensor,
        known: Tensor | None = None,
    ) -> None:
        """Replaces the terms; ``known`` is the Gram matrix of the first directions, which are as they were."""
        self._directions = [
            Int8Vector(*map(differentiable_through, u)) if isinstance(u, Int8Vector) else differentiable_through(u)
            for u in directions
        ]
        self._has_int8 = any(isinstance(u, Int8Vector) for u in directions)
        self._curvatures, self._anchor_projections = map(differentiable_through, (curvatures, anchor_projections))
        self._parts = {}
        self._grams: dict[tuple[int, ...] | None, Tensor] = {}
        self._spectra: dict[Groups, tuple[Tensor, Tensor]] = {}
        if directions:
            self._gram(None, known)
        self._curvature = self._trace()
        if self._tail is not None:
            self._curvature += self._tail._curvature
            self._overlap = self._overlap_with(self._tail)
        if not math.isfinite(self._curvature):
            raise ValueError(
                f"the penalty's curvature, sum_k a_k |u_k|^2, is {self._curvature}; expected a finite value. Use "
                "directions of about unit length."
            )

    def _trace(self) -> float:
        return float(self._gram(None).diagonal() @ self._curvatures.cpu()) if self._directions else 0.0

    def _overlap_with(self, tail: DiagonalHistory) -> float:
        """The trace of the product of both parts' matrices, sum_k a_k sum_j S_j u_kj^2."""
        if not self._directions or not len(tail):
            return 0.0
        total, one = torch.zeros((), dtype=torch.float64, device=self._device), self._float64(1.0)[None]
        for u, curvature in zip(self._directions, self._curvatures, strict=True):
            values = self._sum_of([u], one, tail._fisher).double()
            if not tail._order.same_as(self._order):  # each follows the parameters when it next meets them
                values = tail._order.flatten(self._order.split(values))
            total += curvature * (tail._fisher * values.square()).sum()
        return float(self._binding.shards.sum_(total))

    def _mean_curvature(self) -> float:
        curvatures, trace = self._curvatures.cpu(), self._trace()
        squares = float(curvatures @ self._gram(None).square() @ curvatures) if self._directions else 0.0
        if self._tail is not None:
            squares, trace = squares + 2 * self._overlap + self._tail._sums[0], trace + self._tail._sums[1]
        return squares / trace if trace else 0.0

    def _gram(self, members: tuple[int, ...] | None, known: Tensor | None = None) -> Tensor:
        """U_g U_g^T over some of the parameters: (K, K) float64, on the CPU. ``known`` is that of the first terms."""
        if members not in self._grams:
            pieces, count = self._pieces(self._directions, members), len(self)
            size, rows, first = len(pieces) // count, [], 0 if known is None else len(known)
            for k in range(first, count):
                values = pieces[k * size : (k + 1) * size]
                if self._has_int8:
                    values = list(map(dequantised, values[: size // 2], values[size // 2 :]))
                rows.append(operators.constant_projections(values, pieces, count))
            gram = self._binding.shards.sum_(torch.stack(rows)).cpu()
            if known is not None:
                gram = torch.cat([torch.cat([known, gram[:, :first].T], dim=1), gram])
            self._grams[members] = (gram + gram.T) / 2
        return self._grams[members]

    def _spectrum(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """(E, W): with Q E Q^T = sum_g (eta_g / max eta) A_g A_g^T, its eigenvalues and the modes W = diag(sqrt(a)) Q.

        Eigenvalues below 1e-12 of the largest are replaced by infinity, so that their modes are not moved along. The
        factorization runs on the CPU, when terms or ratios of rates change; a step on a device only reads the result.
        """
        if groups not in self._spectra:
            if len(self._spectra) >= 16:  # the ratio of rates changes at every step
                self._spectra.clear()
            roots = self._curvatures.sqrt().cpu()
            gram = torch.stack([ratio * self._gram(members) for ratio, members in groups]).sum(0)
            values, vectors = torch.linalg.eigh(roots[:, None] * gram * roots)
            values = torch.where(values > 1e-12 * values.max(), values, math.inf)
            modes = roots[:, None] * vectors
            self._spectra[groups] = (
                values.to(self._device, non_blocking=True),
                modes.to(self._device, non_blocking=True),
            )
        return self._spectra[groups]

    def _state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for k, u in enumerate(self._directions):
            parts = self._named_row_major(u.q) if isinstance(u, Int8Vector) else self._named(u)
            tensors |= {f"directions.{k}.{name}": part for name, part in parts.items()}
            if isinstance(u, Int8Vector):
                scales = self._named_row_major(u.scales, scales=True)
                tensors |= {f"scales.{k}.{name}": part for name, part in scales.items()}
        tensors |= {"curvatures": self._curvatures, "anchor_projections": self._anchor_projections}
        return tensors if self._tail is None else tensors | self._tail._state()

    def _set_state(self, state: Mapping[str, Tensor], origin: str, grown: Container[str] = ()) -> None:
        num_tasks, curvatures, anchor_projections = self._scalars_of(state, origin, "curvatures", "anchor_projections")
        self._set_tail(state, origin, grown)
        state = {key: tensor for key, tensor in state.items() if not _is_of_tail(key)}
        count = curvatures.numel()
        prefixes = {prefix for prefix, _ in map(split_key, state) if prefix}
        stored = {prefix for prefix in prefixes if prefix.startswith("directions.")}
        if (
            stored != {f"directions.{k}." for k in range(count)}
            or (num_tasks == 0 and count)
            or (num_tasks > 0 and not count and not self._max_terms)
        ):
            raise ValueError(
                f"{origin} has {len(stored)} directions and curvatures of shape {tuple(curvatures.shape)} for "
                f"{int(num_tasks)} tasks; expected as many directions as curvatures, and none only for 0 tasks."
            )
        known = [f"directions.{k}." for k in range(count)]
        known += [prefix for prefix in (f"scales.{k}." for k in range(count)) if prefix in prefixes]
        vectors = dict(zip(known, self._vectors_of(state, known, STORAGE_DTYPES, origin, grown), strict=True))
        require_scalars(f"curvatures in {origin}", curvatures, count, nonnegative=True)
        require_scalars(f"anchor_projections in {origin}", anchor_projections, count)
        directions = [_paired(k, vectors, origin) for k in range(count)]
        self._set_terms(directions, curvatures.to(self._device), anchor_projections.to(self._device))
        self._num_tasks = int(num_tasks)

    def _set_tail(self, state: Mapping[str, Tensor], origin: str, grown: Container[str]) -> None:
        part = {key: tensor for key, tensor in state.items() if _is_of_tail(key)}
        if bool(part) != (self._tail is not None):
            kinds = ("tail='diagonal'", "tail='drop'")
            saved, own = kinds if part else reversed(kinds)
            raise ValueError(f"{origin} is of a history with {saved}, and this one has {own}; expected the same tail.")
        if self._tail is not None:
            tail = copy.copy(self._tail)
            tail._set_state(part | {"num_tasks": state["num_tasks"]}, origin, grown)
            if not tail._curvature and not tail._residual:  # nothing has been left out yet
                tail._num_tasks = 0
            self._tail = tail

    def _options(self) -> dict[str, Any]:
        options = super()._options() | {"first_order": self._first_order, "max_terms": self._max_terms}
        return options if self._tail is None else options | {"tail": "diagonal"}  # older versions read the others

    def _map_vectors(self, function: Callable[[Tensor], Tensor]) -> None:
        self._directions = [u if isinstance(u, Int8Vector) else function(u) for u in self._directions]
        self._parts = {}

    def _move_state(self, device: torch.device) -> None:
        self._directions = [u.to(device) for u in self._directions]
        self._parts = {}
        self._curvatures = self._curvatures.to(device)
        self._anchor_projections = self._anchor_projections.to(device)
        if self._tail is not None:
            self._tail.to(device)
        self._spectra = {groups: (e.to(device), q.to(device)) for groups, (e, q) in self._spectra.items()}


def _paired(k: int, vectors: Mapping[str, Tensor], origin: str) -> Tensor | Int8Vector:
    """Direction k of a state, with its scales."""
    u, scales = vectors[f"directions.{k}."], vectors.get(f"scales.{k}.")
    if (u.dtype == torch.int8) != (scales is not None):
        raise ValueError(
            f"directions.{k} in {origin} is {u.dtype} and has {'no ' if scales is None else ''}scales; expected scales "
            "beside int8, and beside nothing else."
        )
    return u if scales is None else Int8Vector(u, scales)
