"""The base class of LowRankHistory and DiagonalHistory: all past tasks of one model, bound to its parameters.

There are four ways to use a history in a trainer: add ``rank1_ewc_penalty(history, lam=...)`` to the loss; call
``add_penalty_grad_(lam)`` after backward; call ``decoupled_step_(lam, lr)`` after the optimizer's step; or let
``attach(optimizer, lam)`` do one of the last two.
"""

import inspect
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from .. import files
from ..distributed.agreement import Agreement, digest
from ..distributed.shards import local_part
from ..fisher.forms import DiagonalFisher, LowRankFisher
from ..fisher.validation import require_tensor
from ..model.arguments import require_integer, require_switch
from ..model.binding import Binding, agreement_about
from ..model.names import Layout, as_patterns, join_names, matching
from .attachment import Attachment, find_stepped, is_wrapper
from .strength import ALL, Groups, Rate, check_strength
from .vectors import CACHES, StateVectors

_ONE_FISHER = (
    "Append one Fisher in all of them: estimate it together, or save it in one process and load_fisher the file in all."
)
_ONE_STATE = "Load one state into equal histories in all of them."
_ONE_STRENGTH = "Apply one penalty with one lam in all of them."

_Fisher = TypeVar("_Fisher", LowRankFisher, DiagonalFisher)


class History(StateVectors, Generic[_Fisher]):
    """The parts that both kinds share: the binding to a model, an optimizer's hooks, and files."""

    _fisher_type: type[_Fisher]
    # The keys of single numbers, and their types; a file has them in its metadata.
    _scalar_types: ClassVar[Mapping[str, type[int] | type[float]]]

    def __init__(
        self, model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None, decay: float
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise ValueError(f"decay is {decay!r}; expected 0 < decay <= 1, where 1 weighs all tasks alike.")
        super().__init__(Binding(model, include, exclude))
        self._decay = decay
        self._num_tasks = 0
        self._curvature = 0.0  # see stiffness
        self._attachment: Attachment | None = None
        self._is_new = False  # changed since the processes that share the model have last agreed on lam

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, without caches and without the attachment, which comes with a copy of the
        optimizer."""
        return {name: value for name, value in self.__dict__.items() if name not in (*CACHES, "_attachment")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.setdefault("_attachment", None)  # the copied attachment may have set it already
        self.__dict__.setdefault("_is_new", False)  # in pickles of earlier versions
        self._clear_caches()

    def append(self, fisher: _Fisher) -> None:
        """Adds a task. The Fisher's parameters are matched by name; nothing changes when they do not fit.

        With ``decay`` = g < 1 the curvatures of earlier tasks are first multiplied by g (online EWC), so a task has the
        weight g^n after n more tasks.

        Several processes: those that share the model, because it is sharded or the history was made of its
        DistributedDataParallel, all append the same Fisher to equal histories. They compare both before anything
        changes, and ``lam`` at the next step. A history of a model without its wrapper compares nothing.

        Raises:
            TypeError: a Fisher of the other kind.
            ValueError: parameters that are missing, unknown or of another shape, by name; values that a Fisher cannot
                have, or that overflow.
            RuntimeError: another process that shares the model differs, has failed, or has not called within the
                timeout of init_process_group; in all of them, and nothing has changed.
        """
        agreement = self._binding.agreement
        with agreement.on("append", _ONE_FISHER) as facts:
            layout = self._layout_of(fisher)
            if agreement.several:
                facts |= {"history": self._described(), "Fisher": fisher._described()}
        fisher._require_valid()
        self._is_new = agreement.several  # also after an error, which the others may not have
        with self._unchanged_by_errors():
            self._add_terms(fisher, layout)
            self._num_tasks += 1

    def _require_same_among(self, agreement: Agreement, lam: float | Tensor, decoupled: bool) -> None:
        """Raises RuntimeError unless these processes, for which a trainer has wrapped the model after the history was
        made of it, have the same history and penalty."""
        with agreement.on("the beginning of training", f"{_ONE_STATE} {_ONE_STRENGTH}") as facts:
            if agreement.several:
                facts |= {"history": self._described(), "state": f"the digest {digest(self.state_dict())}"}
                facts |= {"penalty": "a decoupled step" if decoupled else "a gradient", "lam": f"{float(lam):.9g}"}

    def _layout_of(self, fisher: _Fisher) -> Layout:
        """The Fisher's layout with this model's names. Raises TypeError or ValueError if it does not fit."""
        if not isinstance(fisher, self._fisher_type):
            raise TypeError(
                f"fisher is a {type(fisher).__name__}; {type(self).__name__} takes a {self._fisher_type.__name__}."
            )
        layout = self._binding.rename(fisher.layout)
        self._binding.layout.require_same_parameters(
            layout,
            "the history's model",
            "the Fisher",
            if_unknown=self._binding.why_unbound(layout.names)
            + "If they have joined the model since the history was bound, call history.rebind(model, grown=[...]). ",
        )
        return layout

    def _described(self) -> str:
        """What all processes that share the model have alike."""
        first, options = self.names[0], {name: value for name, value in self._options().items() if value is not None}
        return (
            f"{type(self).__name__}({self._num_tasks} tasks, {len(self)} terms, {len(self.names)} parameters from "
            f"{first!r}, {options})"
        )

    def _take(
        self,
        call: str,
        state: Mapping[str, Tensor],
        origin: str,
        grown: Container[str] = (),
        among: Agreement | None = None,
    ) -> None:
        """Sets the state, which all processes that share the model have alike, or changes nothing. ``among`` them, if
        it is several."""
        agreement = among if among is not None and among.several else self._binding.agreement
        with agreement.on(call, _ONE_STATE) as facts:
            if agreement.several:
                (count,) = self._scalars_of(state, origin)
                self._require_shapes(state, origin, grown)
                facts["history"] = self._described()
                facts["state"] = f"{int(count)} tasks in {len(state)} tensors with the digest {digest(state)}"
        self._is_new = agreement.several
        with self._unchanged_by_errors():
            self._set_state(state, origin, grown)

    def _agree_on_strength(self, lam: float | Tensor, how: str) -> None:
        """At the first penalty after a change of the state: all processes that share the model apply it with the same
        ``lam``. Raises RuntimeError otherwise. Later penalties exchange nothing."""
        if torch.compiler.is_compiling() or not self._is_new:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        try:
            number = float(lam.detach() if isinstance(lam, Tensor) else lam)
        except RuntimeError:  # batched by vmap: it has no single value
            return
        with self._binding.agreement.on("the first penalty after append or load", _ONE_STRENGTH) as facts:
            facts |= {"history": self._described(), "penalty": how, "lam": f"{number:.9g}"}
        self._is_new = False

    def _agree_in_backward(self, value: Tensor, lam: float | Tensor) -> Tensor:
        """The same for a penalty in the loss, in its backward pass; a value that is only looked at needs no others."""
        if not torch.compiler.is_compiling() and self._is_new and value.requires_grad:
            value.register_hook(lambda _: self._agree_on_strength(lam, "in the loss"))
        return value

    @contextmanager
    def _unchanged_by_errors(self) -> Generator[None, None, None]:
        """Restores the state if the block raises. The block replaces tensors of the state and never writes to them, so
        references are enough."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def attach(self, optimizer: Optimizer, lam: float | Tensor, *, decoupled: bool = False) -> None:
        """Puts the penalty into every ``optimizer.step()``, by hooks, until ``detach``.

        In gradient mode the hook adds the penalty's gradient just before the step, so after gradient accumulation and
        clipping, at the scale that a GradScaler has given the gradients. In decoupled mode the hook takes the proximal
        step just after the optimizer's step, each parameter group with its present learning rate; it does nothing when
        a GradScaler made the optimizer skip its step.

        If the step is given a closure, the penalty's gradient is added each time when the closure has computed the
        task's, and its value to the closure's loss; a trainer that clips inside the closure does not clip the penalty.

        Some wrappers, such as those of accelerate, Lightning, SAM or Lookahead, keep the optimizer of these parameters
        in an attribute and step it. The hooks go to that inner optimizer, so each of its steps has the penalty. With
        SAM, therefore, the penalty's gradient is computed at the parameters and not at the perturbed point, and only
        the task's gradient gives the perturbation; add the penalty to the loss to include it in the perturbation.

        A copy or pickle of the optimizer together with the model, ``copy.deepcopy((model, history, optimizer))``, is
        attached to the copied history. A copy without the model has a history without parameters, and its step raises
        RuntimeError.

        Args:
            optimizer: any torch optimizer that has all bound parameters, or a wrapper around one.
            lam: strength, see ``suggest_lam``; a 0-dim tensor may be changed in place between steps.
            decoupled: take the proximal step of ``decoupled_step_`` instead of adding the gradient.

        Raises:
            TypeError, ValueError: not an optimizer; one that maximizes, lacks bound parameters, calls no hooks or has
                this history's penalty in its step; an invalid ``lam``; in decoupled mode, a group without a learning
                rate.
            RuntimeError: the history is already attached; in the first step after ``append`` or a load, another process
                that shares the model has another lam.

        Warns:
            UserWarning: once, if the penalty is too stiff for gradient mode; see ``stiffness``.
        """
        require_switch("decoupled", decoupled)
        check_strength("lam", lam, finite=not decoupled)
        if not isinstance(optimizer, Optimizer) and not is_wrapper(optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer.")
        if self._attachment is not None:
            raise RuntimeError("this history is attached to an optimizer already; call detach() first.")
        if decoupled:
            self._binding.rates(optimizer.param_groups)
        else:
            self._binding.members(optimizer.param_groups)
        stepped = find_stepped(optimizer, self._binding.params)
        if getattr(stepped, "history", None) is self:
            raise ValueError(
                "optimizer is a FusedAdamW that has this history's penalty in its step, and it would count twice; do "
                "not attach the history, or create the optimizer without history=."
            )
        if any(group.get("maximize") for group in stepped.param_groups):
            raise ValueError("optimizer maximizes its objective (maximize=True), and would maximize the penalty too.")
        self._attachment = Attachment(self, stepped, lam, decoupled)

    def detach(self) -> None:
        """Removes the hooks of ``attach`` from the optimizer."""
        if self._attachment is None:
            raise RuntimeError("this history is not attached to an optimizer.")
        self._attachment.remove()
        self._attachment = None

    def stiffness(self, lam: float | Tensor, lr: float | Tensor) -> float | Tensor:
        """lr * lam * curvature of the penalty, dimensionless.

        For a low-rank history the curvature is sum_k a_k |u_k|^2, an upper bound on the largest one; for a diagonal
        history it is max_j S_j. In gradient mode with plain SGD, the penalty overshoots above 1 and diverges above 2.
        In decoupled mode it is stable at every value, and 1 / stiffness is its time constant in steps.
        """
        check_strength("lam", lam)
        check_strength("lr", lr)
        return lr * lam * self._curvature

    def suggest_lam(self, lr: Rate, steps: int, strength: float = 1.0) -> float:
        """The lam at which drift halves ``strength`` times in a task of ``steps`` steps: where to begin a sweep.

            lam = strength ln 2 / (lr steps c),   c = tr H^2 / tr H

        H is the penalty's second derivative at lam = 1, so c is the mean of its curvatures, weighted by themselves. Low
        rank: H = sum_k a_k u_k u_k^T. One term has c = a |u|^2; terms along nearly the same direction add up; of terms
        along different directions the steep ones count most. Diagonal: c = sum_j S_j^2 / sum_j S_j.

        Assumption: nothing but the penalty moves the parameters. A step then multiplies the drift along a direction of
        curvature c by 1 - lr lam c (gradient mode, under plain SGD) or by 1 / (1 + lr lam c) (decoupled mode, any
        optimizer). Both are 2^-strength after ``steps`` steps, up to a relative error of (strength ln 2)^2 / (2 steps).

        - A drift that the task itself builds up at a constant pace, from zero, ends at 72 % of what it would have been
          at strength 1, and at 14 % at strength 10: (1 - 2^-strength) / (strength ln 2).
        - Under Adam, gradient mode is rescaled in each coordinate, so the assumption does not hold: use the decoupled
          mode, or sweep from here. SGD with momentum m multiplies gradient mode's strength by about 1 / (1 - m).
        - A diagonal has no single direction. What halves at strength 1 is sqrt(sum_j S_j d_j^2), the root of the
          penalty, for a displacement d as SGD makes it, larger where S is larger. Steep coordinates return sooner and
          flat ones hardly move; of a displacement of equal size everywhere, less than half is undone.
        - In gradient mode, look at ``stiffness``: with few steps and curvatures of very different size, the steepest
          one may overshoot.

        Args:
            lr: the learning rate of the next task: a float, a 0-dim tensor, or ``optimizer.param_groups``, of which the
                largest rate counts. With a schedule, give its mean over the task. A tensor's value is read, which waits
                for its device.
            steps: the optimizer's steps in the next task, an integer >= 1.
            strength: half-lives per task, above 0.

        Returns:
            lam as a float. It depends on the terms so far: ask again after ``append``. With sharded parameters, each
            process computes the same number without exchanging anything.

        Raises:
            TypeError, ValueError: an argument out of range; a history without tasks; curvatures that are all 0, or so
                small or large that lam would not be finite and above 0.
        """
        _, rate = self._groups(lr)
        for name, value in (("lr", rate), ("strength", strength)):
            check_strength(name, value)
            if not float(value) > 0:
                raise ValueError(f"{name} is {float(value)}; expected a finite value above 0.")
        require_integer("steps", steps, 1, ", the optimizer's steps in the next task")
        if not self._num_tasks:
            raise ValueError("the history has no tasks, so there is nothing to hold; append a Fisher first.")
        curvature = self._mean_curvature()
        if curvature == 0:
            raise ValueError("the history's curvatures are all 0, so its penalty is 0 at every lam.")
        decay = float(rate) * steps * curvature
        lam = float(strength) * math.log(2) / decay if decay else math.inf
        if not 0 < lam < math.inf:
            raise ValueError(
                f"lr * steps * curvature is {decay:.3g}, for which lam would be {lam:.3g}; expected a finite lam above "
                "0. Check lr, and the scale of the loss."
            )
        return lam

    def to(self, device: torch.device | str) -> Self:
        """Moves the state to a device, in place; call it after moving the model."""
        self._device = torch.empty(0, device=device).device  # with its index: "cuda" becomes "cuda:0"
        self._move_state(self._device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes ``state_dict`` to a safetensors file, with the history's options and a digest.

        With sharded parameters, all processes must call it. Tensors are gathered one by one; the first process writes.
        """
        shards = self._binding.shards
        shards.require_all("save")
        tensors = shards.gathered_on_first(self.state_dict())

        def write() -> None:
            scalars = {name: tensors.pop(name).item() for name in self._scalar_types}
            files.write(path, type(self).__name__, tensors, self._options() | scalars)

        shards.on_first(write)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, *, grown: Iterable[str] = ()) -> Self:
        """Reads a file of ``save`` and binds the history to ``model``, by name, on the model's device.

        A file that was saved before parameters joined the model or got more rows loads if ``grown`` names these
        parameters. A file that was saved afterwards needs no ``grown``, and does not load into the smaller model.

        Args:
            path, model: the file, and a model with the same parameters.
            grown: see ``rebind``.

        Raises:
            OSError: a file that cannot be opened: FileNotFoundError, IsADirectoryError, PermissionError.
            ValueError: not a safetensors file; a file that is damaged, was changed after it was saved, or belongs to
                another kind of history or another model. The message names the file and the mismatch.
            RuntimeError: another process that shares the model loads something else; see ``append``.
        """
        agreement = agreement_about(model)
        with agreement.told_errors("load"):
            kind, tensors, facts = files.read(path)
            if kind != cls.__name__:
                raise ValueError(f"path {os.fspath(path)!r} holds a {kind}; expected a {cls.__name__}.")
            origin, patterns = files.described(path), as_patterns("grown", grown) or ()
            options, scalars = cls._split_facts(facts, origin)
            try:
                history = cls._bound_to(model, options, patterns)
                names = history._binding.named_by("grown", patterns)
            except ValueError as error:
                raise ValueError(f"{origin} does not fit: {error}") from error
        history._take("load", tensors | scalars, origin, names, agreement)
        return history

    def rebind(self, model: nn.Module, *, grown: Iterable[str] = ()) -> None:
        """Binds the history, by name, to a model whose parameters are other objects than before: a model that was
        sharded, pruned, moved to another kind of device, or that has grown.

        Parameters that ``grown`` names may be new: another head, a block that is trained from now on, the next adapter.
        Or they may have more rows (a larger first dimension), such as a class embedding after
        ``nn.Embedding(20, width)`` has replaced ``nn.Embedding(10, width)``; the history's rows are the first ones.
        Existing penalties are unchanged, and new parameters and rows are unconstrained: directions, diagonal curvatures
        and anchors are zero there. Fishers that are appended later must contain all parameters. All other parameters
        must have their old names and shapes. A parameter that ``grown`` names but that has not grown is unchanged.

        A new parameter is bound unless ``exclude`` matches it. A ``grown`` pattern that matches no parameter of
        ``include`` is added to ``include``. Give new parameters to the optimizer with ``add_param_group``.

        Args:
            model: the model as it is now.
            grown: patterns, as those of ``include``.

        Raises:
            RuntimeError: the history is attached to an optimizer; another process that shares the model differs, see
                ``append``.
            ValueError: parameters that are missing, unknown or of another shape, by name. Nothing has changed then.
        """
        if self._attachment is not None:
            raise RuntimeError("this history is attached to an optimizer; call detach() first.")
        agreement = agreement_about(model)
        with agreement.told_errors("rebind"):
            patterns = as_patterns("grown", grown) or ()
            rebound = self._bound_to(model, self._options(), patterns)
            names = rebound._binding.named_by("grown", patterns)
        rebound._take("rebind", self.state_dict(), "the history", names, agreement)
        self.__dict__ = rebound.__dict__

    @classmethod
    def _bound_to(cls, model: nn.Module, options: Mapping[str, Any], grown: tuple[str, ...]) -> Self:
        """A history without tasks. Patterns of ``grown`` that match nothing in ``include`` are added to it."""
        history = cls(model, **options)
        unmatched = tuple(pattern for pattern in grown if not history._binding.is_known(pattern))
        if history._binding.include is None or not unmatched:
            return history
        matching("grown", unmatched, history._binding.aliases)  # raises for names that the model lacks
        widened = dict(options)
        widened["include"] = history._binding.include + unmatched
        return cls(model, **widened)

    @classmethod
    def _split_facts(cls, facts: Mapping[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(options, scalars of the state) of a file's facts, with checked types. In files of version 1 the scalars are
        among the tensors."""
        options = dict(facts)
        scalars = {name: options.pop(name) for name in cls._scalar_types if name in facts}
        for name, value in scalars.items():
            if type(value) is not cls._scalar_types[name] or (type(value) is int and abs(value) >= 2**63):
                raise ValueError(f"{name} in {origin} is {value!r}; expected {cls._scalar_types[name].__name__}.")
        if unknown := options.keys() - inspect.signature(cls).parameters.keys() or "model" in options:
            raise ValueError(f"{origin} has unknown options, {unknown}; expected those of {cls.__name__}.")
        for name in ("include", "exclude"):
            value = options.get(name)
            if value is not None and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
                raise ValueError(f"{name} in {origin} is {value!r}; expected a list of patterns, or None.")
        dtypes = {int: torch.int64, float: torch.float64}
        return options, {name: torch.tensor(value, dtype=dtypes[type(value)]) for name, value in scalars.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors by parameter name, for a trainer's own checkpoints. They share memory with the state,
        have the parameters' memory order (such as channels_last) and are sharded as the parameters are. Save sharded
        tensors with torch.distributed.checkpoint; torch.save fails on them (a DTensor over a part of a storage), and
        ``save`` writes full tensors.

        Options (``include``, ``decay`` and so on) and the attachment of ``attach`` are not in it.
        """
        return self._state() | {"num_tasks": torch.tensor(self._num_tasks)}

    def load_state_dict(self, state: Mapping[str, Tensor], *, grown: Iterable[str] = ()) -> None:
        """Loads a state of ``state_dict``, by parameter name; if it does not fit, nothing changes.

        Args:
            state: of a history of the same parameters, except for those that ``grown`` names.
            grown: see ``rebind``.

        Raises:
            TypeError: not a mapping to tensors.
            ValueError: parameters that are missing, unknown or of another shape, by name; tensors of another dtype;
                numbers that are not finite or, of curvatures, below zero.
            RuntimeError: another process that shares the model loads something else; see ``append``.
        """
        with self._binding.agreement.told_errors("load_state_dict"):
            names = self._binding.named_by("grown", as_patterns("grown", grown) or ())
        self._take("load_state_dict", state, "the state", names)

    @property
    def nbytes(self) -> int:
        """Bytes of the state in this process."""
        return sum(local_part(tensor).nbytes for tensor in self._state().values())

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
    def _mean_curvature(self) -> float:
        """tr H^2 / tr H, see ``suggest_lam``; the same in every process, without an exchange."""

    @abstractmethod
    def _add_terms(self, fisher: _Fisher, layout: Layout) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _set_state(self, state: Mapping[str, Tensor], origin: str, grown: Container[str] = ()) -> None: ...

    @abstractmethod
    def _move_state(self, device: torch.device) -> None: ...

    def _options(self) -> dict[str, Any]:
        """The constructor's arguments, without the model."""
        return {"include": self._binding.include, "exclude": self._binding.exclude, "decay": self._decay}

    def _scalars_of(self, state: Mapping[str, Tensor], origin: str, *keys: str) -> list[Tensor]:
        """The tensors of a state that belong to no parameter: num_tasks, checked, and the float64 ones of ``keys``."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{origin} is a {type(state).__name__}; expected a mapping from names to tensors.")
        if missing := [key for key in (*keys, "num_tasks") if key not in state]:
            raise ValueError(f"{origin} lacks {join_names(missing)}; expected what {type(self).__name__} saved.")
        count = require_tensor(f"num_tasks in {origin}", state["num_tasks"], torch.int64)
        if count.dim() != 0 or count < 0:
            raise ValueError(f"num_tasks in {origin} is {count.tolist()}; expected one integer >= 0.")
        return [count, *(require_tensor(f"{key} in {origin}", state[key], torch.float64) for key in keys)]

    def _bound_params(self) -> list[Tensor]:
        """The bound parameters, after a check that they are still the model's."""
        self._binding.check(self._device)
        self._follow_memory_order()
        return list(self._binding.params)

    def _params(self) -> list[Tensor]:
        """This process's parts of the bound parameters, after the same check."""
        return self._binding.shards.local(self._bound_params())

    def _gradients(self, params: list[Tensor]) -> tuple[list[Tensor], list[int]]:
        """(gradients, indices of those that were missing). A missing gradient is created; for a parameter that was
        frozen since binding, it is a scratch tensor."""
        gradients = [parameter.grad for parameter in params]
        missing = [i for i, gradient in enumerate(gradients) if gradient is None]
        for i in missing:
            gradients[i] = torch.zeros_like(params[i])
            if params[i].requires_grad:
                params[i].grad = gradients[i]
        return cast(list[Tensor], gradients), missing

    def _require_dense(self, gradients: list[Tensor], params: list[Tensor]) -> None:
        for name, gradient, parameter in zip(self.names, gradients, params, strict=True):
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is {gradient.layout}, and the penalty's is dense. Make its layer's "
                    "gradient dense (nn.Embedding(sparse=False)), or leave the parameter out with exclude=."
                )
            if any(size > 1 and stride == 0 for size, stride in zip(gradient.shape, gradient.stride(), strict=True)):
                raise ValueError(
                    f"the gradient of {name!r} was expanded, so its elements share memory and cannot be written to. "
                    "Set .grad to a clone() of it."
                )
            if gradient.dtype != parameter.dtype:
                raise ValueError(
                    f"the gradient of {name!r} is {gradient.dtype} and the parameter {parameter.dtype}; expected one "
                    "dtype. Add rank1_ewc_penalty or diagonal_ewc_penalty to the loss instead."
                )

    def _accumulate(self, accumulate: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Tensor:
        """Runs ``accumulate(gradients, params)``, on one flat tensor each if both lie in one buffer."""
        self._binding.check(self._device, all_devices=False)
        self._binding.require_own_gradients()
        self._follow_memory_order()
        bound: list[Tensor] = list(self._binding.params)
        shards = self._binding.shards
        bound_gradients, missing = self._gradients(bound)
        try:
            gradients, params = shards.local_gradients(self.names, bound_gradients), shards.local(bound)
            run = self._run_or_list(params)
            if run is params or (gradient_run := self._gradient_run.find(gradients)) is None:
                return accumulate(gradients, params)
            value = accumulate([gradient_run], run)
        except (RuntimeError, ValueError):
            for i in missing:
                bound[i].grad = None
            self._binding.check(self._device)
            self._require_dense(bound_gradients, bound)
            raise
        torch.autograd.graph.increment_version(gradients)
        return value

    def _trainable_params(self) -> list[Tensor]:
        params = self._params()
        self._binding.require_own_gradients()
        if frozen := [name for name, p in zip(self.names, self._binding.params, strict=True) if not p.requires_grad]:
            raise ValueError(
                f"{join_names(frozen)} no longer require a gradient, and a decoupled step would move them. "
                "Bind a new history with exclude=."
            )
        return params

    def _count_writes(self, params: list[Tensor], run: list[Tensor]) -> None:
        """Increments the parameters' version counters if writes went through other tensors (a flat one, or shards)."""
        if run is not params or not self._binding.shards.unsharded:
            torch.autograd.graph.increment_version(self._binding.params)

    def _float64(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(dtype=torch.float64, device=self._device)
        if torch.compiler.is_compiling():  # which specialises on the float that fills a tensor
            return torch.ones((), dtype=torch.float64, device=self._device) * value
        return torch.full((), value, dtype=torch.float64, device=self._device)

    def _groups(self, lr: Rate, moving: tuple[int, ...] | None = None) -> tuple[Groups, float | Tensor]:
        """(groups of parameters by their share of the largest learning rate, that rate). ``moving`` are the indices of
        the parameters to consider; None for all."""
        if isinstance(lr, (int, float, Tensor)):
            check_strength("lr", lr)
            return ALL, lr
        if not isinstance(lr, Sequence) or not all(isinstance(g, Mapping) and {"params", "lr"} <= g.keys() for g in lr):
            raise TypeError(f"lr is a {type(lr).__name__}; expected a float, a 0-dim tensor or optimizer.param_groups.")
        rates = self._binding.rates(lr)
        for rate in rates:
            check_strength("lr", rate)
        if moving is not None:
            kept = {rate: sorted(set(members) & set(moving)) for rate, members in rates.items()}
            rates = {rate: members for rate, members in kept.items() if members}
        if len(rates) == 1:
            return ((1.0, moving),), next(iter(rates))
        largest = max(float(rate) for rate in rates)
        # Rounded, so that a schedule which scales all rates alike does not change the groups.
        shares = ((round(float(rate) / (largest or 1.0), 12), tuple(members)) for rate, members in rates.items())
        return tuple((share, members) for share, members in shares if share > 0), largest

    def _proximal_strength(self, lam: float | Tensor, lr: float | Tensor) -> Tensor:
        """lr * lam, which may be infinite; 0 if lr is 0."""
        check_strength("lam", lam, finite=False)
        rate = self._float64(lr)
        return torch.where(rate == 0, rate, rate * self._float64(lam))

    def _value(self, total: Tensor, lam: float | Tensor) -> Tensor:
        # From a tensor on: older compilers specialise on a float that meets another number first.
        return (total * lam * 0.5).to(self._binding.dtype)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self._binding.dtype, device=self._device)
