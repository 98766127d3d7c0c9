"""The parameters of a Fisher or a history: matched by identity in the process, by name on disk, never by position.

Files, optimizers and calls order parameters differently, and many tensors of a model share a shape, so a match by
position can give silently wrong numbers. Everything here matches by name or raises an error with the names.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.reference import mean_dtype
from ..distributed.agreement import Agreement, agreement_in, agreement_on
from ..distributed.shards import Shards, is_sharded
from .names import (
    Layout,
    ParameterNames,
    as_patterns,
    earlier_name,
    join_names,
    matches,
    matching,
    without_outer_wrappers,
)
from .zero import require_elements, require_no_engine, require_own_gradient


class Binding:
    """The parameters of one model that a history is bound to.

    ``include`` and ``exclude`` are patterns: a parameter's name, the name of a module that holds it, or a shell-style
    glob (``"*.bias"``). Only parameters that require a gradient at the time of binding are bound; a parameter that
    several modules share is bound once.
    """

    def __init__(
        self,
        model: nn.Module,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        spellings = ParameterNames(model)
        named = dict(_named_parameters(model, spellings))
        params = dict(_select(named.items(), self.include, self.exclude))
        trainable = {name: parameter for name, parameter in params.items() if parameter.requires_grad}
        if not trainable:
            raise ValueError("model has no parameter that requires a gradient and passes include= and exclude=.")
        for name, parameter in trainable.items():
            require_elements(name, parameter)
            if not parameter.is_floating_point():
                raise TypeError(f"parameter {name!r} is {parameter.dtype}; expected a real floating-point dtype.")
        devices = {parameter.device for parameter in trainable.values()}
        if len(devices) > 1:
            raise ValueError(
                f"model has parameters on {', '.join(sorted(map(str, devices)))}; expected one device. "
                "Bind one history per device, with include=."
            )
        self.layout = Layout(list(trainable), [parameter.shape for parameter in trainable.values()])
        self._bind(model, list(trainable.values()))
        self._store_names(model, spellings, {id(parameter): name for name, parameter in named.items()})
        self._unbound = {
            name: "does not require a gradient" if name in params else "is left out by include= or exclude="
            for name in named
            if name not in trainable
        }

    def _bind(self, model: nn.Module, params: list[nn.Parameter]) -> None:
        """Binds to these parameters of ``model``, which have the layout's names."""
        self.params = params
        self._shapes = list(self.layout.shapes)
        self.shards = Shards(self.layout.names, self.params)
        self.agreement = _replicas(model, self.params) if self.shards.unsharded else self.shards.agreement
        self._widest = next((p for p in self.params if p.dtype == torch.float64), self.params[0])
        self._model: nn.Module | None = model  # None: a copy that has not yet searched for its model
        self._find_places(model)

    def _store_names(self, model: nn.Module, spellings: ParameterNames, first_name: Mapping[int, str]) -> None:
        """Stores all names of each parameter: without wrapper prefixes, with them, and as in earlier versions; of a
        shared parameter each name. Includes unbound parameters, so that their names are not taken for bound ones."""
        self.aliases: dict[str, str] = {}
        raw_names: dict[str, str] = {}
        earlier_names: dict[str, str] = {}
        ambiguous = set()
        for raw, parameter in model.named_parameters(remove_duplicate=False):
            if (name := first_name.get(id(parameter))) is None:
                continue
            earlier = earlier_name(raw)
            self.aliases[spellings.name_of(raw)] = raw_names[raw] = name
            if earlier_names.setdefault(earlier, name) != name:
                ambiguous.add(earlier)
        for earlier in ambiguous:
            del earlier_names[earlier]
        owners = list(self.aliases.values())
        # Without an unknown wrapper.
        inner_names = [dict(zip(names, owners, strict=True)) for names in without_outer_wrappers(self.aliases)]
        self._known_names = [self.aliases, raw_names, *inner_names, earlier_names]

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles: names and the model, in which the copy finds its parameters by name."""
        if not self.shards.unsharded:
            raise TypeError(
                "a history of sharded parameters cannot be copied or pickled. Save it with history.save, or with "
                "torch.distributed.checkpoint from its state_dict, and load it for the other model."
            )
        model = self._copied_model() if self._model is None else self._model
        return {
            "include": self.include,
            "exclude": self.exclude,
            "layout": self.layout,
            "aliases": self.aliases,
            "_known_names": self._known_names,
            "_unbound": self._unbound,
            "model": model,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keeps only a weak reference to the model: a model that nothing else uses is then gone when it is needed."""
        model = state.pop("model")
        self.__dict__.update(state)
        self._model = None
        self._copied_model: Callable[[], nn.Module | None] = (lambda: None) if model is None else weakref.ref(model)
        placeholders = [torch.empty(shape, device="meta") for shape in self.layout.shapes]
        self.shards = Shards(self.layout.names, placeholders)
        self.agreement = Agreement()

    def require_model(self) -> None:
        """Binds a copy, at its first use, to the model that was copied together with it.

        Raises:
            RuntimeError: the copy was made without the model.
            ValueError: the model has lost parameters since, by name.
        """
        if self._model is not None:
            return
        if self._copied_model() is not None:
            gc.collect()  # modules may be in reference cycles, which stay alive until then
        model = self._copied_model()
        if model is None:
            raise RuntimeError(
                "this history was copied or unpickled without its model, so it has no parameters. Copy them together, "
                "as in copy.deepcopy((model, history, optimizer)), or call history.rebind(model)."
            )
        named = dict(_named_parameters(model, ParameterNames(model)))
        if missing := [name for name in self.layout.names if name not in named]:
            raise ValueError(
                f"the model that was copied with this history has lost {join_names(missing)} since. Call "
                "history.rebind(model)."
            )
        self._bind(model, [named[name] for name in self.layout.names])

    def _find_places(self, model: nn.Module) -> list[str]:
        """Stores the place of each parameter in the module tree, to detect that it or a module above was replaced.
        Returns the names of parameters that are not in the tree; if there are any, stores nothing."""
        places, parents = {}, {}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                places[id(parameter)] = (module, attribute)
            for attribute, child in module._modules.items():
                if child is not None:
                    parents[child] = (module, attribute)
        if lost := [name for name, p in zip(self.layout.names, self.params, strict=True) if id(p) not in places]:
            return lost
        owners_and_names = [places[id(parameter)] for parameter in self.params]
        self._owners, self._attributes = (
            [module._parameters for module, _ in owners_and_names],
            [name for _, name in owners_and_names],
        )
        chain: dict[nn.Module, None] = {}  # the modules between the parameters and the model, each once
        for module, _ in owners_and_names:
            while module in parents and module not in chain:
                chain[module] = None
                module = parents[module][0]
        self._chain = list(chain)
        self._parents = [parents[module][0]._modules for module in chain]
        self._children = [parents[module][1] for module in chain]
        return []

    def require_whole(self) -> None:
        """Raises ValueError if no process has the parameters' full per-sample gradients, or not as autograd gives them:
        sharded parameters, and DeepSpeed's engine."""
        if self._model is not None:
            require_no_engine(self._model)
        if not self.shards.unsharded:
            raise ValueError(
                f"model has sharded parameters, such as {self.layout.names[0]!r}, of which no process has whole "
                "per-sample gradients. Look at them in a block of crl_kernels.whole_parameters(model)."
            )

    @property
    def device(self) -> torch.device:
        self.require_model()
        return self.params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of values and of a new state: float64 if a parameter is float64, else float32. If dtypes were mixed
        at binding, the first float64 parameter of that time decides."""
        self.require_model()
        return mean_dtype(self._widest.dtype)

    def rename(self, layout: Layout) -> Layout:
        """``layout`` with this model's names of its parameters, if it has other names of them: those of a shared
        parameter, or names with wrapper prefixes. All names are interpreted in the same way, or stay."""
        readings = [layout.names, *without_outer_wrappers(layout.names), [earlier_name(name) for name in layout.names]]
        for known in self._known_names:
            for names in readings:
                if len({known.get(name) for name in names} - {None}) == len(names):
                    return Layout([known[name] for name in names], layout.shapes)
        # If some do not fit, the caller raises an error.
        names = [self.aliases.get(name, name) for name in layout.names]
        return Layout(names, layout.shapes) if len(set(names)) == len(names) else layout

    def is_known(self, pattern: str) -> bool:
        """Whether a pattern matches a bound parameter."""
        return any(matches(alias, pattern) for alias, name in self.aliases.items() if name not in self._unbound)

    def named_by(self, argument: str, patterns: Iterable[str]) -> set[str]:
        """The bound parameters with a name that any of the patterns matches. Raises ValueError for a pattern that
        matches none."""
        bound = {alias: name for alias, name in self.aliases.items() if name not in self._unbound}
        for pattern in patterns:
            if not self.is_known(pattern) and (
                reason := self.why_unbound(name for name in self._unbound if matches(name, pattern))
            ):
                raise ValueError(f"{argument} pattern {pattern!r} matches no bound parameter: {reason.strip()}")
        return {bound[alias] for alias in matching(argument, patterns, bound)}

    def why_unbound(self, names: Iterable[str]) -> str:
        """For an error message: the reason why the first of ``names`` that the model has is not bound; or an empty
        string."""
        first = next((name for name in names if name in self._unbound), None)
        return "" if first is None else f"{first!r} is a parameter that {self._unbound[first]}. "

    def check(self, state_device: torch.device, *, all_devices: bool = True) -> None:
        """Raises ValueError if a bound parameter was replaced, resized, or moved away from the state, since binding.

        ``all_devices=False`` checks only the first parameter's device, for callers whose operator refuses mixed
        devices.
        """
        self.require_model()
        if torch.compiler.is_compiling() or not self._unchanged(state_device, all_devices):
            self._refuse_changes(state_device)

    def _unchanged(self, device: torch.device, all_devices: bool) -> bool:
        """A quick check for every call."""
        params = self.params
        return (
            params[0].device == device
            and (not self.shards.unsharded or self._all_in_place())
            and [parameter.shape for parameter in params] == self._shapes
            and (not all_devices or len(set(map(Tensor.get_device, params))) == 1)
        )

    def _all_in_place(self) -> bool:
        return all(map(is_, map(dict.get, self._owners, self._attributes), self.params)) and all(
            map(is_, map(dict.get, self._parents, self._children), self._chain)
        )

    def _refuse_changes(self, state_device: torch.device) -> None:
        # While compiling, Dynamo's guards detect a replaced parameter. FSDP replaces sharded parameters by full ones
        # between a module's forward and backward. A module may have been wrapped, with the same parameters.
        model = self._model
        assert model is not None  # check has called require_model
        if not torch.compiler.is_compiling() and self.shards.unsharded and (lost := self._find_places(model)):
            raise ValueError(
                f"parameter {lost[0]!r} is no longer the object that the history was bound to: something replaced it "
                "or its module (a larger embedding, sharding, pruning, functional_call, a move to another kind of "
                "device). Call history.rebind(model) after that, which keeps the terms."
            )
        for name, shape, parameter in zip(self.layout.names, self.layout.shapes, self.params, strict=True):
            require_elements(name, parameter)
            if parameter.shape != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(parameter.shape)} now and had {tuple(shape)} when the "
                    "history was bound. Call history.rebind(model, grown=[...]) if it has got more rows."
                )
            if parameter.device != state_device:
                raise ValueError(
                    f"parameter {name!r} is on {parameter.device} and the history's state on {state_device}. "
                    "Call history.to(device)."
                )

    def members(self, param_groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """For each of an optimizer's groups, the indices of its bound parameters.

        Raises:
            ValueError: a bound parameter that is in no group, by name.
        """
        self.require_model()
        index = {id(parameter): i for i, parameter in enumerate(self.params)}
        members = [[index.pop(id(p)) for p in group["params"] if id(p) in index] for group in param_groups]
        if index:
            self.require_own_gradients()
            raise ValueError(
                f"{join_names(self.layout.names[i] for i in index.values())}, which the history has, are in no "
                "parameter group of the optimizer. Bind a history to what it moves, with include= or exclude=."
            )
        return members

    def require_own_gradients(self) -> None:
        """Raises ValueError if DeepSpeed's ZeRO trains the parameters; it trains all of a model or none."""
        require_own_gradient(self.layout.names[0], self.params[0])

    def rates(self, param_groups: Sequence[Mapping[str, Any]]) -> dict[float | Tensor, list[int]]:
        """Learning rate -> indices of the bound parameters that an optimizer's groups move with it.

        Raises:
            TypeError: a group without a learning rate.
            ValueError: a bound parameter that is in no group, by name.
        """
        rates: dict[float | Tensor, list[int]] = {}
        for group, members in zip(param_groups, self.members(param_groups), strict=True):
            if not members:
                continue
            lr = group.get("lr")
            if not isinstance(lr, (int, float, Tensor)):
                raise TypeError(
                    f"lr of a parameter group is {lr!r}, and the decoupled step and suggest_lam need a number. Give "
                    "the optimizer a learning rate (Adafactor: relative_step=False, lr=...), or attach with "
                    "decoupled=False."
                )
            if isinstance(lr, Tensor) and lr.device.type != "cpu" and len(param_groups) == 1:
                rate: float | Tensor = lr.reshape(())  # stays there: reading it would wait for the device
            else:
                rate = float(lr)
            rates.setdefault(rate, []).extend(members)
        return {rate: sorted(members) for rate, members in rates.items()}


def agreement_about(model: object) -> Agreement:
    """Of the processes that share ``model``, if they share all of its sharded parameters; of none if it is no model."""
    if not isinstance(model, nn.Module):
        return Agreement()
    params = list(model.parameters())
    meshes = {parameter.device_mesh for parameter in params if is_sharded(parameter)}
    if not meshes:
        return _replicas(model, params)
    return agreement_on(meshes.pop()) if len(meshes) == 1 else Agreement()


def _replicas(model: nn.Module, params: Sequence[Tensor]) -> Agreement:
    """The processes that have copies of these parameters, where a DistributedDataParallel in ``model`` says so."""
    bound = set(map(id, params))
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and bound & set(map(id, module.parameters())):
            return agreement_in(module.process_group)
    return Agreement()


def _named_parameters(model: nn.Module, spellings: ParameterNames) -> Iterator[tuple[str, nn.Parameter]]:
    seen: dict[str, str] = {}
    for raw, parameter in model.named_parameters():
        name = spellings.name_of(raw)
        if name in seen:
            raise ValueError(
                f"{seen[name]!r} and {raw!r} are both called {name!r} without wrapper prefixes; rename one."
            )
        seen[name] = raw
        yield name, parameter


def _select(
    named: Iterable[tuple[str, nn.Parameter]], include: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> Iterator[tuple[str, nn.Parameter]]:
    parameters = dict(named)
    included, excluded = matching("include", include, parameters), matching("exclude", exclude, parameters)
    for name, parameter in parameters.items():
        if (include is None or name in included) and name not in excluded:
            yield name, parameter
