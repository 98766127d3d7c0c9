"""All past tasks of one model, bound to its parameters.

    LowRankHistory    (lam / 2) sum_k a_k (u_k . theta - b_k)^2 over the terms of all tasks
    DiagonalHistory   (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R) = (lam / 2) sum_t sum_j F_tj (theta_j - theta*_tj)^2

Ways to use a history in a trainer: add ``rank1_ewc_penalty(history, lam=...)`` to the loss; call
``add_penalty_grad_(lam)`` after backward; call ``decoupled_step_(lam, lr)`` after the optimizer's step; or let
``attach(optimizer, lam)`` do one of the last two.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from . import _ops, storage
from .attachment import Attachment
from .binding import Binding, Layout, join_names
from .fisher import DiagonalFisher, LowRankFisher
from .flat_parameters import FlatRun

_Fisher = TypeVar("_Fisher", LowRankFisher, DiagonalFisher)
# A learning rate for all parameters, or an optimizer's param_groups, each with its own.
Rate = float | Tensor | Sequence[Mapping[str, Any]]
# (ratio to the largest rate, indices of the parameters that have it); None stands for all parameters.
Groups = tuple[tuple[float, tuple[int, ...] | None], ...]
_ALL: Groups = ((1.0, None),)


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
    if not number >= 0 or (finite and number == math.inf):  # comparisons: a float may be symbolic in compiled code
        raise ValueError(f"{argument} is {number}; expected a {'finite ' if finite else ''}value >= 0.")


class _History(ABC, Generic[_Fisher]):
    """What both histories share: the binding to a model, an optimizer's hooks, and files."""

    _fisher_type: type[_Fisher]

    def __init__(
        self, model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None, decay: float
    ) -> None:
        if not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ValueError(f"decay is {decay!r}; expected 0 < decay <= 1, where 1 keeps all tasks alike.")
        self._binding = Binding(model, include, exclude)
        self._device = self._binding.device
        self._decay = decay
        self._num_tasks = 0
        self._curvature = 0.0  # see stiffness
        self._attachment: Attachment | None = None
        self._parts: dict[tuple[int, ...], list[Tensor]] = {}  # what _pieces has cut, until the state changes
        self._parameter_run, self._gradient_run = (FlatRun(self._binding.layout.lengths) for _ in range(2))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bound parameters, without wrapper prefixes, in the order of the state."""
        return self._binding.layout.names

    def append(self, fisher: _Fisher) -> None:
        """Adds a task. The Fisher's parameters are matched by name; nothing changes when they do not fit.

        With ``decay`` = g < 1 the curvatures of the tasks so far are multiplied by g first (online EWC), so that a task
        counts g^n after n more.

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

    def attach(self, optimizer: Optimizer, lam: float | Tensor, *, decoupled: bool = False) -> None:
        """Puts the penalty into every ``optimizer.step()``, by hooks, until :meth:`detach`.

        As a gradient: adds the penalty's gradient just before the step, so after gradient accumulation and clipping,
        at the scale that a GradScaler has given the gradients. Decoupled: takes the proximal step just after it, each
        parameter group with its present learning rate; not when a GradScaler has made the optimizer skip.

        Args:
            optimizer: any torch optimizer that has all bound parameters.
            lam: strength; a 0-dim tensor may be changed in place between steps.
            decoupled: the proximal step of :meth:`decoupled_step_` instead of the gradient.

        Raises:
            TypeError, ValueError: not an optimizer, one that maximizes or lacks bound parameters, a wrong ``lam``.
            RuntimeError: attached already.

        Warns:
            UserWarning: once, when the penalty is too stiff to be a gradient; see :meth:`stiffness`.
        """
        check_strength("lam", lam, finite=not decoupled)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
        if self._attachment is not None:
            raise RuntimeError("this history is attached to an optimizer already; call detach() first.")
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("optimizer maximizes its objective (maximize=True), and would maximize the penalty too.")
        self._binding.rates(optimizer.param_groups)
        self._attachment = Attachment(self, optimizer, lam, decoupled)

    def detach(self) -> None:
        """Takes the hooks of :meth:`attach` out of the optimizer."""
        if self._attachment is None:
            raise RuntimeError("this history is not attached to an optimizer.")
        self._attachment.remove()
        self._attachment = None

    def stiffness(self, lam: float | Tensor, lr: float | Tensor) -> float | Tensor:
        """lr lam times the penalty's curvature, dimensionless.

        The curvature is sum_k a_k |u_k|^2 for a low-rank history, a bound on the steepest direction's, and max_j S_j
        for a diagonal one. As a gradient under plain SGD the penalty overshoots above 1 and diverges above 2;
        decoupled, it is stable at every value, and 1 / stiffness is its time constant in steps.
        """
        check_strength("lam", lam)
        check_strength("lr", lr)
        return lr * lam * self._curvature

    def to(self, device: torch.device | str) -> Self:
        """Moves the state, in place, to follow a model that was moved."""
        self._device = torch.empty(0, device=device).device  # with its index: "cuda" becomes "cuda:0"
        self._move_state(self._device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`state_dict` to a safetensors file, with the history's options."""
        storage.write(path, type(self).__name__, self.state_dict(), self._options())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Self:
        """Reads what :meth:`save` wrote and binds it to ``model``, by name, on the model's device.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, damaged, of another kind, or of another model; names what does not fit.
        """
        kind, tensors, options = storage.read(path)
        if kind != cls.__name__:
            raise ValueError(f"path {os.fspath(path)!r} holds a {kind}; expected a {cls.__name__}.")
        history = cls(model, **options)
        history._set_state(tensors, f"the file {os.fspath(path)!r}")
        return history

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors by parameter name, for a trainer's own checkpoints. They share memory with the state.

        Options (``include``, ``decay`` and so on) and what :meth:`attach` did are not in it.
        """
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
    def decoupled_step_(self, lam: float | Tensor, lr: Rate) -> None: ...

    @abstractmethod
    def _add_terms(self, fisher: _Fisher, layout: Layout) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None: ...

    @abstractmethod
    def _move_state(self, device: torch.device) -> None: ...

    def _options(self) -> dict[str, Any]:
        """The arguments that made this history, but for the model."""
        return {"include": self._binding.include, "exclude": self._binding.exclude, "decay": self._decay}

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

    def _run_or_list(self, params: list[Tensor]) -> list[Tensor]:
        """The parameters as kernels best take them: as one flat tensor after flatten_parameters, else as they are."""
        if torch.compiler.is_compiling():
            return params
        run = self._parameter_run.of(params)
        return params if run is None else [run]

    def _gradients(self, params: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """Their gradients, created where there is none, and the indices of those; for a parameter that was frozen since
        binding, a scratch tensor."""
        found = [parameter.grad for parameter in params]
        missing = [i for i, gradient in enumerate(found) if gradient is None]
        for i in missing:
            found[i] = torch.zeros_like(params[i])
            if params[i].requires_grad:
                params[i].grad = found[i]
        return cast(list[Tensor], found), missing

    def _require_dense(self, gradients: list[Tensor], params: list[Tensor]) -> None:
        for name, gradient, parameter in zip(self.names, gradients, params, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is {gradient.layout}, and the penalty's is dense. Make its layer's "
                    "gradient dense (nn.Embedding(sparse=False)), or leave the parameter out with exclude=."
                )
            if gradient.dtype != parameter.dtype:
                raise ValueError(
                    f"the gradient of {name!r} is {gradient.dtype} and the parameter {parameter.dtype}; expected one "
                    "dtype. Add rank1_ewc_penalty or diagonal_ewc_penalty to the loss instead."
                )

    def _accumulate(self, accumulate: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Tensor:
        """Runs ``accumulate(gradients, params)``, on flat tensors where both lie in one run."""
        params = self._params()
        gradients, missing = self._gradients(params)
        try:
            run = self._run_or_list(params)
            if run is params or (gradient_run := self._gradient_run.of(gradients)) is None:
                return accumulate(gradients, params)
            value = accumulate([gradient_run], run)
        except RuntimeError:
            for i in missing:
                params[i].grad = None
            self._require_dense(gradients, params)
            raise
        torch.autograd.graph.increment_version(gradients)
        return value

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

    def _groups(self, lr: Rate) -> tuple[Groups, float | Tensor]:
        """Which parameters move at which share of the largest learning rate, and that rate."""
        if isinstance(lr, (int, float, Tensor)):
            check_strength("lr", lr)
            return _ALL, lr
        if not isinstance(lr, Sequence) or not all(isinstance(g, Mapping) and {"params", "lr"} <= g.keys() for g in lr):
            raise TypeError(f"lr is a {type(lr).__name__}; expected a float, a 0-dim tensor or optimizer.param_groups.")
        rates = self._binding.rates(lr)
        for rate in rates:
            check_strength("lr", rate)
        if len(rates) == 1:
            return _ALL, next(iter(rates))
        largest = max(float(rate) for rate in rates)
        # Rounded, so that a schedule which scales all rates alike does not change the groups.
        shares = ((round(float(rate) / (largest or 1.0), 12), tuple(members)) for rate, members in rates.items())
        return tuple((share, members) for share, members in shares if share > 0), largest

    def _proximal_strength(self, lam: float | Tensor, lr: float | Tensor) -> Tensor:
        """lr * lam, which may be infinite; 0 where lr is 0."""
        check_strength("lam", lam, finite=False)
        rate = self._float64(lr)
        return torch.where(rate == 0, rate, rate * self._float64(lam))

    def _pieces(self, vectors: list[Tensor], members: tuple[int, ...] | None) -> list[Tensor]:
        """The parts of the state's vectors that belong to some parameters, vector by vector; whole ones for all."""
        if members is None:
            return vectors
        if members not in self._parts:
            split = [vector.split(self._binding.layout.lengths) for vector in vectors]
            self._parts[members] = [parts[i] for parts in split for i in members]
        return self._parts[members]

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
        first_order: keep each task's slope, too: its own expansion along u_k is s_k x + a_k x^2 / 2 with
            x = u_k . theta - b_k, which is a_k (x + s_k / a_k)^2 / 2 less the constant s_k^2 / (2 a_k). So b_k becomes
            b_k - s_k / a_k, at no cost; the constant is left out of the value.
        decay: see :meth:`append`.
        max_terms: at most so many terms are kept. Beyond that, terms are merged into the best approximation of
            sum_k a_k u_k u_k^T by ``max_terms`` orthogonal directions, each of which keeps its exact penalty. Terms are
            then no longer one task's.

    Raises:
        TypeError, ValueError: no such parameter, or parameters that cannot be bound, by name; options out of range.
    """

    _fisher_type = LowRankFisher

    def __init__(
        self,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        *,
        first_order: bool = False,
        decay: float = 1.0,
        max_terms: int | None = None,
    ) -> None:
        super().__init__(model, include, exclude, decay)
        if max_terms is not None and (not isinstance(max_terms, int) or max_terms < 1):
            raise ValueError(f"max_terms is {max_terms!r}; expected an integer >= 1, or None for no limit.")
        self._first_order, self._max_terms = first_order, max_terms
        nothing = torch.zeros(0, dtype=torch.float64, device=self._device)
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
        """b_k = u_k . theta*_k, less s_k / a_k if first_order: (K,) float64."""
        return self._anchor_projections

    def directions(self) -> list[dict[str, Tensor]]:
        """u_k by parameter name, one dict per term: views of the state."""
        return [self._binding.layout.split(u) for u in self._directions]

    def penalty(self, lam: float | Tensor) -> Tensor:
        """(lam / 2) sum_k a_k (u_k . theta - b_k)^2; see :func:`crl_kernels.rank1_ewc_penalty`."""
        check_strength("lam", lam)
        if not self._directions:
            return self._zero()
        projections = _ops.low_rank_projections(self._params(), self._directions, len(self))
        return self._value((self._curvatures * (projections - self._anchor_projections).square()).sum(), lam)

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
        state = self._directions, self._curvatures, self._anchor_projections, self._float64(lam)
        total = self._accumulate(lambda grads, params: _ops.low_rank_penalty_accumulate_(grads, params, *state))
        return self._value(total, lam)

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: Rate) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate: a float, a 0-dim tensor, or ``optimizer.param_groups``.

        With A = diag(sqrt(a)) U, r = diag(sqrt(a)) (U theta - b), groups g of parameters with rates eta_g, and
        A_g the columns of A that belong to group g:

            theta_g <- theta_g - eta_g lam A_g^T (I + lam sum_g eta_g A_g A_g^T)^-1 r

        ``lam`` may be infinite: the minimum-norm weighted least-squares point. Directions along which A is zero to
        1e-12 of its largest eigenvalue are left alone. Neither clipping nor the optimizer's scaling touches the penalty
        here.
        """
        groups, rate = self._groups(lr)
        strength = self._proximal_strength(lam, rate)
        if not self._directions or not groups:
            return
        params = self._trainable_params()
        eigenvalues, modes = self._spectrum(groups)
        run = self._run_or_list(params)
        residual = modes.T @ self._constant_drift(run)
        steps = -modes @ (residual / (1 / strength + eigenvalues))
        for ratio, members in groups:
            targets = run if members is None else [params[i] for i in members]
            _ops.low_rank_accumulate_(targets, self._pieces(self._directions, members), ratio * steps)
        if run is not params:
            torch.autograd.graph.increment_version(params)

    @torch.no_grad()
    def drift(self) -> Tensor:
        """u_k . theta - b_k, how far the parameters have moved along each term: (K,) float64. Worth logging."""
        return self._constant_drift(self._params()) if self._directions else self._curvatures.clone()

    def _constant_drift(self, params: list[Tensor]) -> Tensor:
        return _ops.constant_projections(params, self._directions, len(self)) - self._anchor_projections

    def _add_terms(self, fisher: LowRankFisher, layout: Layout) -> None:
        anchor_projections = fisher.anchor_projections
        if self._first_order:
            if fisher.slopes is None:
                raise ValueError("fisher has no slopes, which first_order=True needs; give it slopes=.")
            if bool(((fisher.curvatures == 0) & (fisher.slopes != 0)).any()):
                raise ValueError("fisher has a slope along a direction of curvature 0, which has no lowest point.")
            shift = fisher.slopes / torch.where(fisher.curvatures == 0, 1.0, fisher.curvatures)
            anchor_projections = anchor_projections - shift
        self._set_terms(
            self._directions + list(self._bound(layout, fisher.directions)),
            torch.cat([self._curvatures * self._decay, fisher.curvatures.to(self._device)]),
            torch.cat([self._anchor_projections, anchor_projections.to(self._device)]),
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
        eigenvalues, modes = self._spectrum(_ALL)
        finite = eigenvalues.isfinite().nonzero()[:, 0]
        kept = finite[eigenvalues[finite].argsort(descending=True)[:count]]
        mixing = (modes[:, kept] / eigenvalues[kept].sqrt()).T.contiguous()
        directions = [_ops.low_rank_combine(self._directions, row, self._directions[:1])[0] for row in mixing]
        # c_i belongs to v_i as it is stored, rounded, so that the drift of the present parameters stays what it was.
        projections = _ops.constant_projections(params, directions, len(directions))
        self._set_terms(directions, eigenvalues[kept], projections - mixing @ self._constant_drift(params))

    def _set_terms(self, directions: list[Tensor], curvatures: Tensor, anchor_projections: Tensor) -> None:
        self._directions, self._curvatures, self._anchor_projections = directions, curvatures, anchor_projections
        self._parts = {}
        self._grams: dict[tuple[int, ...] | None, Tensor] = {}
        self._spectra: dict[Groups, tuple[Tensor, Tensor]] = {}
        self._curvature = float(self._gram(None).diagonal() @ curvatures.cpu()) if directions else 0.0

    def _gram(self, members: tuple[int, ...] | None) -> Tensor:
        """U_g U_g^T over some of the parameters: (K, K) float64, on the CPU."""
        if members not in self._grams:
            pieces, count = self._pieces(self._directions, members), len(self)
            size = len(pieces) // count
            rows = [_ops.constant_projections(pieces[k * size : (k + 1) * size], pieces, count) for k in range(count)]
            gram = torch.stack(rows).cpu()
            self._grams[members] = (gram + gram.T) / 2
        return self._grams[members]

    def _spectrum(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """(E, W): with Q E Q^T = sum_g (eta_g / max eta) A_g A_g^T, its eigenvalues and the modes W = diag(sqrt(a)) Q.

        Eigenvalues below 1e-12 of the largest are infinite here, which leaves their modes alone. Factored on the CPU
        when terms or ratios of rates change, so that a step on a device only reads what is there.
        """
        if groups not in self._spectra:
            if len(self._spectra) >= 16:  # rates that change their ratio at every step
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
        tensors = {f"directions.{k}.{name}": u for k, term in enumerate(self.directions()) for name, u in term.items()}
        return tensors | {"curvatures": self._curvatures, "anchor_projections": self._anchor_projections}

    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None:
        curvatures, anchor_projections, num_tasks = self._scalars_of(
            state, origin, "curvatures", "anchor_projections", "num_tasks"
        )
        directions = [self._vector_of(state, f"directions.{k}.", origin) for k in range(len(curvatures))]
        self._set_terms(directions, curvatures, anchor_projections)
        self._num_tasks = int(num_tasks)

    def _options(self) -> dict[str, Any]:
        return super()._options() | {"first_order": self._first_order, "max_terms": self._max_terms}

    def _move_state(self, device: torch.device) -> None:
        self._directions = [u.to(device) for u in self._directions]
        self._curvatures = self._curvatures.to(device)
        self._anchor_projections = self._anchor_projections.to(device)
        self._spectra = {groups: (e.to(device), q.to(device)) for groups, (e, q) in self._spectra.items()}
        self._parts = {}


class DiagonalHistory(_History[DiagonalFisher]):
    """The exact sum of all past tasks' diagonal penalties in the state of one.

        (lam / 2) (sum_j S_j (theta_j - m_j)^2 + R)

    S = sum_t F_t, m the S-weighted mean of the anchors, and R, float64, what is left at theta = m. They are updated
    like Welford's variance, because the sums of F theta* and F theta*^2 cancel. State: 8 bytes per parameter.

    Args:
        model, include, exclude: see :class:`LowRankHistory`.
        decay: see :meth:`append`.
    """

    _fisher_type = DiagonalFisher

    def __init__(
        self,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
        *,
        decay: float = 1.0,
    ) -> None:
        super().__init__(model, include, exclude, decay)
        fisher = torch.zeros(self._binding.layout.numel, dtype=self._binding.dtype, device=self._device)
        self._set_vectors(fisher, torch.zeros_like(fisher), fisher.new_zeros((), dtype=torch.float64))

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
        state = [self._fisher], [self._anchor], self._float64(lam)
        total = self._accumulate(lambda grads, params: _ops.diagonal_accumulate_(grads, params, *state))
        return self._value(total + self._residual, lam)

    @torch.no_grad()
    def decoupled_step_(self, lam: float | Tensor, lr: Rate) -> None:
        """Moves the parameters to argmin |theta' - theta|^2 / (2 lr) + penalty(theta'); call it after the optimizer's
        step, with that step's learning rate: a float, a 0-dim tensor, or ``optimizer.param_groups``.

            theta <- theta - w (theta - m),   w = lr lam S / (1 + lr lam S)

        ``lam`` may be infinite: theta = m wherever S > 0.
        """
        groups, rate = self._groups(lr)
        strength = self._proximal_strength(lam, rate)
        if not self._num_tasks:
            return
        params = self._trainable_params()
        run = self._run_or_list(params)
        for ratio, members in groups:
            targets = run if members is None else [params[i] for i in members]
            pieces = self._pieces([self._fisher, self._anchor], members)
            half = len(pieces) // 2
            _ops.diagonal_shrink_(targets, pieces[:half], pieces[half:], ratio * strength)
        if run is not params:
            torch.autograd.graph.increment_version(params)

    def _add_terms(self, fisher: DiagonalFisher, layout: Layout) -> None:
        new, anchor = (self._bound(layout, flat).double() for flat in (fisher.fisher_diagonal, fisher.anchor))
        old, distance = self._decay * self._fisher.double(), anchor - self._anchor.double()
        total = old + new
        share = torch.where(total > 0, new / total, 0.0)
        dtype = self._fisher.dtype
        self._set_vectors(
            total.to(dtype),
            (self._anchor + share * distance).to(dtype),
            self._decay * self._residual + (old * share * distance.square()).sum(),
        )

    def _set_vectors(self, fisher: Tensor, anchor: Tensor, residual: Tensor) -> None:
        self._fisher, self._anchor, self._residual = fisher, anchor, residual
        self._parts = {}
        self._curvature = float(fisher.max()) if fisher.numel() else 0.0

    def _state(self) -> dict[str, Tensor]:
        layout = self._binding.layout
        tensors = {f"fisher_diagonal.{name}": tensor for name, tensor in layout.split(self._fisher).items()}
        tensors |= {f"anchor.{name}": tensor for name, tensor in layout.split(self._anchor).items()}
        return tensors | {"residual": self._residual}

    def _set_state(self, state: Mapping[str, Tensor], origin: str) -> None:
        residual, num_tasks = self._scalars_of(state, origin, "residual", "num_tasks")
        fisher, anchor = (self._vector_of(state, prefix, origin) for prefix in ("fisher_diagonal.", "anchor."))
        self._set_vectors(fisher, anchor, residual)
        self._num_tasks = int(num_tasks)

    def _move_state(self, device: torch.device) -> None:
        self._fisher, self._anchor = self._fisher.to(device), self._anchor.to(device)
        self._residual = self._residual.to(device)
        self._parts = {}
