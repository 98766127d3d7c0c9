"""Which function is called with which parameter, and what is to be done about it, while per-sample gradients are read.

A ``TorchFunctionMode`` sees every call of torch's API, so parameters are found by identity wherever they are used:
in subclasses, tied weights, functional calls, and views such as the thirds of an attention's input projection. A call
that has a rule (layer_rules.py) goes through it. Any other call that makes something differentiable of a parameter is
noted with the module that was running; that module's inputs and the gradients of its outputs are kept, and the
per-sample gradients of those parameters are taken by vmap over the module once the backward pass is done.
"""

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layer_gradients import SampleGradient
from .layer_rules import RULES

Settle = Callable[["ParameterUse", SampleGradient], Tensor]

_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


def _no(*_: Any) -> bool:
    return False


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """In elements, of a tensor in row-major order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


@dataclass(eq=False)
class ParameterUse:
    """A bound parameter, or the view of one that a call took: elements offset + sum_d i_d strides[d] of it."""

    index: int  # of the parameter
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    settle_with: Settle
    registered: bool = False
    settled: bool = False
    covered: bool = False  # a module that is run again under vmap has it

    def settle(self, gradient: SampleGradient) -> Tensor:
        return self.settle_with(self, gradient)

    def overlaps(self, other: "ParameterUse") -> bool:
        (first, last), (start, stop) = self._extent(), other._extent()
        return first < stop and start < last

    def _extent(self) -> tuple[int, int]:
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset, self.offset + span + 1 if self.shape.numel() else self.offset

    def of(self, whole: Tensor) -> Tensor:
        """The same view of each row of (rows, numel of the parameter), whose columns are adjacent."""
        strides = (whole.stride(0), *self.strides)
        return whole.as_strided((len(whole), *self.shape), strides, whole.storage_offset() + self.offset)

    def overlaps_itself(self) -> bool:
        """Whether an element of the parameter may be in several places of the view."""
        covered = 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1 and stride <= covered:
                return True
            covered += (size - 1) * stride
        return False

    def add_to(self, whole: Tensor, rows: Tensor) -> None:
        """Adds (rows, *shape) to the same view of each row of ``whole``, as in ``of``."""
        if not self.overlaps_itself():
            self.of(whole).add_(rows)
            return
        elements = torch.arange(whole.shape[1], device=whole.device)
        places = elements.as_strided(self.shape, self.strides, self.offset).flatten()
        whole.index_add_(1, places, rows.reshape(len(whole), len(places)).to(whole.dtype))


@dataclass(eq=False)
class ModuleCall:
    """A call of a module in which parameters were used in ways that have no rule."""

    module: nn.Module
    args: Any
    kwargs: Any
    indices: list[int]  # of the parameters
    versions: list[int]  # of the inputs' tensors
    grads: dict[int, Tensor] = field(default_factory=dict)  # by position among the outputs


@dataclass(eq=False)
class _Running:
    """A module that is running."""

    module: nn.Module
    first_use: int  # how many uses there were before
    first_call: int
    inputs: list[Tensor]
    versions: list[int]  # of the inputs, before it ran
    noted: set[int] = field(default_factory=set)  # parameters that are used in it without a rule


class Recorder(TorchFunctionMode):
    """See the module's docstring. ``settle(use, gradient)`` is called in the backward pass for each use that has a
    rule, and returns the sum of the per-sample gradients."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor], names: Sequence[str], settle: Settle) -> None:
        super().__init__()
        self._model, self._names, self._settle_with = model, names, settle
        self._index = {id(parameter): i for i, parameter in enumerate(params)}
        self._params = list(params)
        self.recording = False
        self.num_samples: int | None = None
        self.uses: list[ParameterUse] = []
        self.calls: list[ModuleCall] = []
        self._stack: list[_Running] = []
        self._attention: int | None = None
        self._handles: list[Any] = []
        self.stray: dict[int, str] = {}  # parameters used without a rule outside of every module, and by which function

    # What is called with what

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:  # what checkpoints run again in it is to be seen
            return self._inside(func, args, kwargs)
        if not torch.is_grad_enabled() or not self.recording:
            return func(*args, **kwargs)
        found = self._bound_among(args, kwargs)
        if not found and func is not F.batch_norm:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend(func, args, kwargs)
        rule = RULES.get(func)
        if rule is not None:
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor) and tensor.requires_grad and not self.binds(tensor):
                self._note(found, func)
                break
        return result

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a Python function of torch's and sees what it calls. It asks first whether a mode wants it, and would
        come back here; so a copy of it runs, which is told that none does."""
        answers = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _no)
        body = types.FunctionType(func.__code__, {**func.__globals__, **answers}, func.__name__, func.__defaults__)
        body.__kwdefaults__ = func.__kwdefaults__
        with self:
            return body(*args, **kwargs)

    def _bound_among(self, args: Any, kwargs: Any) -> set[int]:
        found = set()
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    index = self._index_of(tensor)
                    if index is not None:
                        found.add(index)
        return found

    def _index_of(self, tensor: Tensor) -> int | None:
        index = self._index.get(id(tensor))
        base = tensor._base if index is None else None
        if base is not None and base.is_contiguous():  # or its views' strides would not be those of its elements
            index = self._index.get(id(base))
        return index

    def binds(self, tensor: Tensor) -> bool:
        return self._index_of(tensor) is not None

    def use(self, tensor: Tensor | None) -> ParameterUse | None:
        index = None if tensor is None or not tensor.requires_grad else self._index_of(tensor)
        if tensor is None or index is None:
            return None
        parameter = self._params[index]
        if tensor is parameter:
            strides, offset = contiguous_strides(tensor.shape), 0
        else:
            strides, offset = tensor.stride(), int(tensor.storage_offset() - parameter.storage_offset())
        use = ParameterUse(index, tensor.shape, strides, offset, self._settle_with)
        if not _in_backward():  # a checkpointed segment's second run is no second use
            self.register(use)
        return use

    def register(self, use: ParameterUse) -> None:
        use.registered = True
        self.uses.append(use)

    def samples(self, tensor: Tensor, dim: int = 0) -> int | None:
        size = tensor.shape[dim]
        if self.num_samples is None:
            self.num_samples = size
        return size if size == self.num_samples else None

    # Multi-head attention

    def attention_samples(self) -> int | None:
        return self._attention

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        query = args[0] if args else kwargs["query"]
        if query.dim() != 3 or self.samples(query, 1) is None:
            result = func(*args, **kwargs)
            self._note(self._bound_among(args, kwargs), func)
            return result
        self._attention = query.shape[1]
        try:
            return self._inside(func, args, kwargs)
        finally:
            self._attention = None

    # Modules, for what has no rule

    def watch(self) -> None:
        """Begins to record."""
        self.recording = True
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter_module, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave_module, with_kwargs=True, always_call=True))

    def unwatch(self) -> None:
        self.recording = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled() or _in_backward():
            return
        if module is self._model and self.num_samples is None:
            sizes = (
                leaf.shape[0] for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.dim()
            )
            self.num_samples = next(sizes, None)
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        versions = [leaf._version for leaf in inputs]
        self._stack.append(_Running(module, len(self.uses), len(self.calls), inputs, versions))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._stack or self._stack[-1].module is not module or _in_backward():
            return
        running = self._stack.pop()
        noted = running.noted
        if not noted or output is None:
            return
        # A module that has neither the parameters nor the samples, such as a parametrisation, is part of one that has;
        # so is one that is given its parameter as an argument.
        own = {id(parameter) for parameter in module.parameters()}
        above = {index for index in noted if id(self._params[index]) not in own}
        above |= noted & self._bound_among(running.inputs, {})
        if not all(map(self._has_samples, ((args, kwargs), output))):
            above = noted
        self._note_in_running_module(above, type(module).__name__)
        noted = noted - above
        if not noted:
            return
        if [leaf._version for leaf in running.inputs] != running.versions:
            raise RuntimeError(_changed(type(module).__name__))
        leaves, structure = tree_flatten((args, kwargs))
        # Detached, they do not keep the graph, which keeps this recorder; and their versions are the inputs'.
        detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(detached, structure)
        call = ModuleCall(module, args, kwargs, sorted(noted), running.versions)
        # The module is run again as a whole: that has all uses of these parameters in it.
        for use in self.uses[running.first_use :]:
            use.covered = use.covered or use.index in noted
        for inner in self.calls[running.first_call :]:
            inner.indices = [index for index in inner.indices if index not in noted]
        for position, leaf in enumerate(tree_flatten(output)[0]):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._keep_grad(call, position))
        self.calls.append(call)

    @staticmethod
    def _keep_grad(call: ModuleCall, position: int) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            call.grads[position] = grad

        return keep

    def _has_samples(self, values: Any) -> bool:
        leaves = (leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor) and leaf.dim())
        return any(leaf.shape[0] == self.num_samples for leaf in leaves)

    def _note(self, indices: set[int], func: Any) -> None:
        name = getattr(func, "__name__", repr(func))
        if _in_backward():
            # A checkpointed segment runs again. Its first run has been noted, unless that was without gradients.
            if new := indices - {index for call in self.calls for index in call.indices}:
                raise NotImplementedError(
                    f"parameter {self._names[min(new)]!r} is used by {name}, which has no rule, inside of a reentrant "
                    "checkpoint. Use torch.utils.checkpoint with use_reentrant=False."
                )
            return
        self._note_in_running_module(indices, name)
        if self._stack:
            _say_once(name, [self._names[index] for index in sorted(indices)], type(self._stack[-1].module).__name__)

    def _note_in_running_module(self, indices: set[int], name: str) -> None:
        if self._stack:
            self._stack[-1].noted.update(indices)
        else:
            self.stray.update(dict.fromkeys(indices, name))

    # The second run

    def gradients_of_calls(self) -> list[tuple[int, Tensor]]:
        """(index of a parameter, its per-sample gradients (N, *shape)) of each call that the backward pass reached; the
        next backward pass begins anew."""
        found = []
        recording, self.recording = self.recording, False
        try:
            for call in self.calls:
                if call.indices and call.grads:
                    found += list(zip(call.indices, _gradients_of(call, self._params, self.num_samples), strict=True))
        finally:
            self.recording = recording
            self.forget_calls()
        return found

    def forget_calls(self) -> None:
        """As if no backward pass had reached any call."""
        for call in self.calls:
            call.grads.clear()


def _changed(module: str) -> str:
    return (
        f"an input of {module}, which has to be run again for its per-sample gradients, was changed in place. Avoid "
        "the in-place operation."
    )


_said: set[str] = set()


def _say_once(function: str, names: Sequence[str], module: str) -> None:
    if function not in _said:
        _said.add(function)
        warnings.warn(
            f"there is no rule for the per-sample gradients of {', '.join(map(repr, names))} in {function}: "
            f"{module}, or the module around it, is run again under torch.func.vmap to have them, which costs about as "
            "much as that module once more, and memory for the matrix of their per-sample gradients.",
            stacklevel=2,
        )


def _gradients_of(call: ModuleCall, params: Sequence[Tensor], count: int | None) -> list[Tensor]:
    module = call.module
    leaves, structure = tree_flatten((call.args, call.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    what = type(module).__name__
    if [tensor._version for tensor in tensors] != call.versions:
        raise RuntimeError(_changed(what))
    in_dims = [0 if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count else None for leaf in leaves]
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [of[id(params[index])] for index in call.indices if id(params[index]) in of]
    if len(names) < len(call.indices):
        raise NotImplementedError(
            f"a parameter that does not belong to {what} is used in it in a way that has no rule, so its per-sample "
            "gradients cannot be taken. Exclude it with exclude=."
        )
    positions = sorted(call.grads)
    if any(call.grads[position].shape[:1] != (count,) for position in positions):
        raise NotImplementedError(
            f"{what} has to be run again for its per-sample gradients, and the first dimension of its output is not "
            f"the batch of {count}. Exclude its parameters with exclude=."
        )

    def product(values: tuple[Tensor, ...], grads: tuple[Tensor, ...], *sample: Any) -> Tensor:
        one = [leaf.unsqueeze(0) if dim == 0 else leaf for leaf, dim in zip(sample, in_dims, strict=True)]
        args, kwargs = tree_unflatten(one, structure)
        output = torch.func.functional_call(module, dict(zip(names, values, strict=True)), args, kwargs)
        flat = tree_flatten(output)[0]
        return torch.stack([(flat[p][0] * grad).sum() for p, grad in zip(positions, grads, strict=True)]).sum()

    values = tuple(params[index].detach() for index in call.indices)
    grads = tuple(call.grads[position] for position in positions)
    with torch.enable_grad():
        try:
            gradients = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, *in_dims))(values, grads, *leaves)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise NotImplementedError(
                f"{what} uses {', '.join(map(repr, names))} in a way that has no rule, and torch.func.vmap cannot run "
                f"it: {error}"
            ) from error
    return [gradient.detach() for gradient in gradients]
