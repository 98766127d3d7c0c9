"""All past tasks of one model, bound to its parameters.

    LowRankHistory    (lam / 2) sum_k a_k (u_k . theta - b_k)^2 over the terms of all tasks
    DiagonalHistory   (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R) = (lam / 2) sum_t sum_j F_tj (theta_j - theta*_tj)^2

Three ways to use a history in a trainer: add ``rank1_ewc_penalty(history, lam=...)`` to the loss; call
``add_penalty_grad_(lam)`` after backward; or call ``decoupled_step_(lam, lr)`` after the optimizer's step.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import _ops, storage
from .binding import Binding, Layout, join_names
from .fisher import DiagonalFisher, LowRankFisher

_Fisher = TypeVar("_Fisher", LowRankFisher, DiagonalFisher)


def check_strength(argument: str, value: float | Tensor, *, finite: bool = True) -> None:
    """Raises unless ``value`` is a real number >= 0, or a 0-dim tensor of one.

    A tensor's value is looked at where that costs nothing: on the CPU, outside of compiled code and of transforms.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"{argument} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                "expected a float or a 0-dim floating-point tensor."
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        try:
            number = value.item()
        except RuntimeError:  # batched by vmap: there is no one value to look at
            return
    elif isinstance(value, (int, float)):
        number = value
    else:
        raise TypeError(f"{argument} is a {type(value).__name__}; expected a float or a 0-dim tensor.")
    if math.isnan(number) or number < 0 or (finite and math.isinf(number)):
        raise ValueError(f"{argument} is {number}; expected a {'finite ' if finite else ''}value >= 0.")


class _History(ABC, Generic[_Fisher]):
    """What both histories share: the binding to a model, and files."""

    _fisher_type: type[_Fisher]

    def __init__(
        self, model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> None:
        self._binding = Binding(model, include, exclude)
        self._device = self._binding.device
        self._num_tasks = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bound parameters, without wrapper prefixes, in the order of the state."""
        return self._binding.layout.names

    def append(self, fisher: _Fisher) -> None:
        """Adds a task. The Fisher's parameters are matched by name; nothing changes when they do not fit.

        Raises:
            TypeError: a Fisher of the other kind.
            ValueError: parameters that are missing, unknown or of another shape, by name.
        """
        if not isinstance(fisher, self._fisher_type):
            raise TypeError(
                f"fisher is a {type(fisher).__name__}; {type(self).__name__} takes a {self._fisher_type.__name__}."
            )
        layout = self._binding.rename(fisher.layout)
        self._binding.layout.require_same_parameters(layout, "the history's model", "the Fisher")
        self._add_terms(fisher, layout)
        self._num_tasks += 1

    def to(self, device: torch.device | str) -> Self:
        """Moves the state, in place, to follow a model that was moved."""
        self._device = torch.empty(0, device=device).device  # with its index: "cuda" becomes "cuda:0"
        self._move_state(self._device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` to a safetensors file, with what include= and exclude= were."""
        facts = {"include": self._binding.include, "exclude": self._binding.exclude}
        storage.write(path, type(self).__name__, self.state_dict(), facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """Reads what :meth:`save` wrote and binds it to ``model``, by name, on the model's device.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, damaged, of another kind, or of another model; names what does not fit.
        """
        kind, tensors, facts = storage.read(path)
        if kind != cls.__name__:
            raise ValueError(f"path {os.fspath(path)!r} holds a {kind}; expected a {cls.__name__}.")
        history = cls(model, facts["include"], facts["exclude"])
        history._set_state(tensors, f"the file {os.fspath(path)!r}")
        return history

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors by parameter name, for a trainer's own checkpoints. They share memory with the state."""
        return self._state() | {"num_tasks": torch.tensor(self._num_tasks)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave, by parameter name; nothing changes when it does not fit.

        Raises:
            ValueError: parameters that are missing, unknown or of another shape, by name.
        """
        self._set_state(state, "the state")

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return sum(tensor.nbytes for tensor in self._state().values())

    def __repr__(self) -> str:
        layout = self._binding.layout
        return f"{type(self).__name__}(tasks={self._num_tasks}, parameters={layout.numel}, bytes={self.nbytes})"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def penalty(self, lam: float | Tensor) -> Tensor: ...

    @abstractmethod
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor: ...

    @abstractmethod
    def decoupled_step_(self, lam: float | Tensor, lr: float | Tensor) -> None: ...

    @abstractmethod
    def _add_terms(self, fisher: _Fisher, layout: Layout) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None: ...

    @abstractmethod
    def _move_state(self, device: torch.device) -> None: ...

    def _bound(self, layout: Layout, flat: Tensor) -> Tensor:
        """A flat tensor of another layout in the order, and on the device, of this history."""
        return self._binding.layout.reorder(flat, layout).to(self._device)

    def _vector_of(self, state: Mapping[str, Tensor], prefix: str, origin: str) -> Tensor:
        """The flat vector whose parts a state holds as ``prefix`` + parameter name, checked against the model."""
        named = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        stored = Layout(list(named), [tensor.shape for tensor in named.values()])
        layout = self._binding.rename(stored)
        self._binding.layout.require_same_parameters(layout, "the model", origin)
        return self._bound(layout, stored.flatten(named))

    def _scalars_of(self, state: Mapping[str, Tensor], origin: str, *keys: str) -> list[Tensor]:
        if missing := [key for key in keys if key not in state]:
            raise ValueError(f"{origin} lacks {join_names(missing)}; expected what {type(self).__name__} saved.")
        return [state[key].to(self._device) for key in keys]

    def _params(self) -> list[Tensor]:
        """The bound parameters, checked."""
        self._binding.check(self._device)
        return list(self._binding.params)

    def _gradients(self, params: list[Tensor]) -> list[Tensor]:
        """Their gradients, created where there is none; for a parameter that was frozen since, a scratch tensor."""
        targets = []
        for parameter in params:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            targets.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        return targets

    def _trainable_params(self) -> list[Tensor]:
        params = self._params()
        if frozen := [name for name, p in zip(self.names, params, strict=True) if not p.requires_grad]:
            raise ValueError(
                f"{join_names(frozen)} no longer require a gradient, and a decoupled step would move them. "
                "Bind a new history with exclude=."
            )
        return params

    def _float64(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(dtype=torch.float64, device=self._device)
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _proximal_strength(self, lam: float | Tensor, lr: float | Tensor) -> Tensor:
        """lr * lam, which may be infinite; 0 where lr is 0."""
        check_strength("lam", lam, finite=False)
        check_strength("lr", lr)
        rate = self._float64(lr)
        return torch.where(rate == 0, rate, rate * self._float64(lam))

    def _value(self, total: Tensor, lam: float | Tensor) -> Tensor:
        return (0.5 * lam * total).to(self._binding.dtype)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self._binding.dtype, device=self._device)


class LowRankHistory(_History[LowRankFisher]):
    """The low-rank terms of all past tasks: (lam / 2) sum_k a_k (u_k . theta - b_k)^2.

    State: 2 or 4 bytes per parameter and term (the directions' storage dtype), and a few scalars. No copy of old
    parameters.

    Args:
        model: its parameters that require a gradient now are bound, by identity.
        include, exclude: patterns that choose parameters: a parameter's name, the name of a module that holds it, or a
            glob such as ``"*.bias"``.

    Raises:
        TypeError, ValueError: no such parameter, or parameters that cannot be bound, by name.
    """

    _fisher_type = LowRankFisher

    def __init__(
        self, model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> None:
        super().__init__(model, include, exclude)
        nothing = torch.zeros(0, dtype=torch.float64, device=self._device)
        self._directions: list[Tensor] = []
        self._set_terms([], nothing, nothing)

    def __len__(self) -> int:
        """The number of terms K: one per task for rank 1."""
        return len(self._directions)

    @property
    def curvatures(self) -> Tensor:
        """a_k: (K,) float64."""
        return self._curvatures

    @property
    def anchor_projections(self) -> Tensor:
        """b_k = u_k . theta*_k: (K,) float64."""
        return self._anchor_projections

    def directions(self) -> list[dict[str, Tensor]]:
        """u_k by parameter name, one dict per term: views of the state."""
        return [self._binding.layout.split(u) for u in self._directions]

    def penalty(self, lam: float | Tensor) -> Tensor:
        """(lam / 2) sum_k a_k (u_k . theta - b_k)^2; see :func:`crl_kernels.rank1_ewc_penalty`."""
        check_strength("lam", lam)
        if not self._directions:
            return self._zero()
        return self._value((self._curvatures * self._drift(self._params()).square()).sum(), lam)

    @torch.no_grad()
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor:
        """Adds the penalty's gradient, lam sum_k a_k (u_k . theta - b_k) u_k, to ``.grad``; call it after backward.

        Creates a gradient where there is none, as autograd would. Never waits for the device.

        Returns:
            The penalty's value, a 0-dim tensor.
        """
        check_strength("lam", lam)
        if not self._directions:
            return self._zero()
        params = self._params()
        drift = self._drift(params)
        force = self._curvatures * drift
        _ops.low_rank_accumulate_(self._gradients(params), self._directions, self._float64(lam) * force)
        return self._value(force @ drift, lam)

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: float | Tensor) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate.

        With A = diag(sqrt(a)) U and r = diag(sqrt(a)) (U theta - b):

            theta <- theta - lr lam A^T (I + lr lam A A^T)^-1 r

        ``lam`` may be infinite: the minimum-norm weighted least-squares point, eigenvalues of A A^T below 1e-12 of the
        largest dropped. Neither clipping nor the optimizer's scaling touches the penalty here.
        """
        strength = self._proximal_strength(lam, lr)
        if not self._directions:
            return
        params = self._trainable_params()
        roots, eigenvalues, eigenvectors = self._curvatures.sqrt(), self._eigenvalues, self._eigenvectors
        kept = eigenvalues > 1e-12 * eigenvalues.max()
        hard = torch.where(kept, 1 / eigenvalues, 0.0)
        shares = torch.where(strength.isinf(), hard, strength / (1 + strength * eigenvalues))
        residual = eigenvectors.T @ (roots * self._drift(params))
        _ops.low_rank_accumulate_(params, self._directions, -roots * (eigenvectors @ (shares * residual)))

    @torch.no_grad()
    def drift(self) -> Tensor:
        """u_k . theta - b_k, how far the parameters have moved along each term: (K,) float64. Worth logging."""
        return self._drift(self._params()) if self._directions else self._curvatures.clone()

    def _drift(self, params: list[Tensor]) -> Tensor:
        return _ops.low_rank_projections(params, self._directions, len(self)) - self._anchor_projections

    def _add_terms(self, fisher: LowRankFisher, layout: Layout) -> None:
        self._set_terms(
            self._directions + list(self._bound(layout, fisher.directions)),
            torch.cat([self._curvatures, fisher.curvatures.to(self._device)]),
            torch.cat([self._anchor_projections, fisher.anchor_projections.to(self._device)]),
        )

    def _set_terms(self, directions: list[Tensor], curvatures: Tensor, anchor_projections: Tensor) -> None:
        """Sets the state and, for the decoupled step, factors A A^T, a K x K matrix, once."""
        self._directions, self._curvatures, self._anchor_projections = directions, curvatures, anchor_projections
        gram = curvatures.new_zeros(len(directions), len(directions))
        for row, u in zip(gram, directions, strict=True):
            row.copy_(_ops.low_rank_projections([u], directions, len(directions)))
        roots = curvatures.sqrt()
        self._eigenvalues, self._eigenvectors = torch.linalg.eigh(roots[:, None] * (gram + gram.T) / 2 * roots)
        self._eigenvalues = self._eigenvalues.clamp(min=0.0)

    def _state(self) -> dict[str, Tensor]:
        tensors = {f"directions.{k}.{name}": u for k, term in enumerate(self.directions()) for name, u in term.items()}
        return tensors | {"curvatures": self._curvatures, "anchor_projections": self._anchor_projections}

    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None:
        curvatures, anchor_projections, num_tasks = self._scalars_of(
            state, origin, "curvatures", "anchor_projections", "num_tasks"
        )
        directions = [self._vector_of(state, f"directions.{k}.", origin) for k in range(len(curvatures))]
        self._set_terms(directions, curvatures, anchor_projections)
        self._num_tasks = int(num_tasks)

    def _move_state(self, device: torch.device) -> None:
        self._set_terms(
            [u.to(device) for u in self._directions], self._curvatures.to(device), self._anchor_projections.to(device)
        )


class DiagonalHistory(_History[DiagonalFisher]):
    """The exact sum of all past tasks' diagonal penalties in the state of one.

        (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R)

    S = sum_t F_t, m the S-weighted mean of the anchors, and R, float64, what is left at theta = m. They are updated
    like Welford's variance, because the sums of F theta* and F theta*^2 cancel. State: 8 bytes per parameter.

    Args:
        model, include, exclude: see :class:`LowRankHistory`.
    """

    _fisher_type = DiagonalFisher

    def __init__(
        self, model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> None:
        super().__init__(model, include, exclude)
        self._fisher = torch.zeros(self._binding.layout.numel, dtype=self._binding.dtype, device=self._device)
        self._anchor = torch.zeros_like(self._fisher)
        self._residual = torch.zeros((), dtype=torch.float64, device=self._device)

    def __len__(self) -> int:
        """The number of tasks."""
        return self._num_tasks

    def penalty(self, lam: float | Tensor) -> Tensor:
        """(lam / 2) (sum_j S_j (theta_j - m_j)^2 + R); see :func:`crl_kernels.diagonal_ewc_penalty`."""
        check_strength("lam", lam)
        if not self._num_tasks:
            return self._zero()
        total = _ops.diagonal_quadratic(self._params(), [self._fisher], [self._anchor]) + self._residual
        return self._value(total, lam)

    @torch.no_grad()
    def add_penalty_grad_(self, lam: float | Tensor) -> Tensor:
        """Adds the penalty's gradient, lam S (theta - m), to ``.grad``, in one pass; call it after backward.

        Creates a gradient where there is none, as autograd would. Never waits for the device.

        Returns:
            The penalty's value, a 0-dim tensor.
        """
        check_strength("lam", lam)
        if not self._num_tasks:
            return self._zero()
        params = self._params()
        state = [self._fisher], [self._anchor]
        total = _ops.diagonal_accumulate_(self._gradients(params), params, *state, self._float64(lam))
        return self._value(total + self._residual, lam)

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: float | Tensor) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate.

            theta <- theta - w (theta - m),   w = lr lam S / (1 + lr lam S)

        ``lam`` may be infinite: theta = m wherever S > 0.
        """
        strength = self._proximal_strength(lam, lr)
        if self._num_tasks:
            _ops.diagonal_shrink_(self._trainable_params(), [self._fisher], [self._anchor], strength)

    def _add_terms(self, fisher: DiagonalFisher, layout: Layout) -> None:
        new, anchor = (self._bound(layout, flat).double() for flat in (fisher.fisher_diagonal, fisher.anchor))
        old, distance = self._fisher.double(), anchor - self._anchor.double()
        total = old + new
        share = torch.where(total > 0, new / total, 0.0)
        self._residual = self._residual + (old * share * distance.square()).sum()
        self._anchor = (self._anchor + share * distance).to(self._fisher.dtype)
        self._fisher = total.to(self._fisher.dtype)

    def _state(self) -> dict[str, Tensor]:
        layout = self._binding.layout
        tensors = {f"fisher_diagonal.{name}": tensor for name, tensor in layout.split(self._fisher).items()}
        tensors |= {f"anchor.{name}": tensor for name, tensor in layout.split(self._anchor).items()}
        return tensors | {"residual": self._residual}

    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None:
        residual, num_tasks = self._scalars_of(state, origin, "residual", "num_tasks")
        fisher, anchor = (self._vector_of(state, prefix, origin) for prefix in ("fisher_diagonal.", "anchor."))
        self._fisher, self._anchor, self._residual, self._num_tasks = fisher, anchor, residual, int(num_tasks)

    def _move_state(self, device: torch.device) -> None:
        self._fisher, self._anchor = self._fisher.to(device), self._anchor.to(device)
        self._residual = self._residual.to(device)
