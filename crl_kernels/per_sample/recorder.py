"""``CallRecorder`` records which function is called with which parameter inside a SampleGradients block, and runs
backward passes for a given purpose.

A ``TorchFunctionMode`` sees every call of torch's API. So parameters are found by identity wherever they are used: in
subclasses, tied weights, functional calls, and views such as the thirds of an attention's input projection. A call of
a function with a rule (``rules/``) goes through the rule. Any other call that takes a parameter goes through
``any_function``, which is exact and slow. A tensor computed from parameters alone, such as a normalised weight or a
table of positions, counts as a parameter where it meets the samples.

The recorder assumes nothing about where the samples are: passes with weights measure it (``rows.py``).
"""

import enum
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten

from ..model.names import join_names
from ..model.preserved import without_gradient_hooks
from .collector import GradientCollector
from .graph import INDEX_ARGUMENT, Graph, Losses, call_constants, flattened, graph_of, losses_of_pass
from .layer_gradients import MatrixGradient, SampleGradient
from .operands import Derived, Operand, ParameterUse, contiguous_strides
from .rows import Rows
from .rules import RULES
from .rules.any_function import any_function
from .sample_layout import Measurement, SampleLayout

_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
# Functions with an integer or boolean tensor among their arguments that move no rows.
_KEEP_ROWS = {
    *(F.cross_entropy, F.nll_loss, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill),
    *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_),
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
    *(torch.div, Tensor.div, Tensor.__truediv__),
}
_SORTS = {torch.sort, Tensor.sort, torch.topk, Tensor.topk}
# Functions that move rows if a factor is a permutation or a table of routes.
_NAMED_INDICES = {torch.einsum, torch.tensordot}
_CONTRACTIONS = {*_NAMED_INDICES, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}


class Pass(enum.Enum):
    """What a backward pass is for."""

    ORDINARY = enum.auto()
    MEASURE = enum.auto()  # find where the samples are
    CHECK = enum.auto()  # the same, and compute the parameters' gradients, which prove it
    STATISTICS = enum.auto()  # take per-sample gradients in the block's own pass
    SUMS = enum.auto()  # take sums of per-sample gradients with weights


def _false(*_: Any) -> bool:
    return False


def _inside_transform() -> bool:
    """Whether a transform of torch.func runs, which cannot handle our Functions; the proof finds uses in it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _nodes_made() -> int:
    """How many nodes autograd has made in this thread; each has the number of those before it."""
    return torch._C._autograd._get_sequence_nr()


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class LayerCall:
    """A call of a function with a rule, or by ``any_function``."""

    recorder: "CallRecorder"
    operands: tuple[Operand | None, ...]
    key: Any = None  # its number in the forward pass; of a checkpoint's second run, set when its gradient arrives

    def rows(self, b: Tensor, dims: Sequence[int]) -> Rows | None:
        """The samples of the rows along some of ``dims`` of the output whose gradient is ``b``; None if no per-sample
        gradients are taken there in this pass."""
        return self.recorder.rows_of_output(self, b, tuple(dims))

    def skips(self, slot: int) -> bool:
        """Whether the operand's gradient is not needed in this pass."""
        return self.recorder.purpose is Pass.MEASURE and isinstance(self.operands[slot], ParameterUse)

    def note_gradient(self, slot: int, gradient: Tensor) -> None:
        """Notes the gradient of a derived operand for the measurement."""
        if self.recorder.purpose in (Pass.MEASURE, Pass.CHECK) and isinstance(self.operands[slot], Derived):
            self.recorder.measurement.note(self.key, slot, gradient, range(gradient.dim()))

    def wants(self, slot: int) -> bool:
        """Whether to take per-sample gradients of the operand, where ``rows`` returned rows."""
        operand, layout = self.operands[slot], self.recorder.sample_layout
        if operand is None or layout is None:
            return False
        if isinstance(operand, ParameterUse):
            return operand.index not in layout.by_passes
        return (self.key, slot) in layout.shared

    def take(self, slot: int, gradient: SampleGradient, edge: GradientEdge | None) -> Tensor:
        """Takes the operand's per-sample gradients and returns their sum. ``edge``: the operand's in the graph."""
        operand = self.operands[slot]
        if isinstance(operand, ParameterUse):
            return self.recorder.take(operand, gradient)
        assert edge is not None
        matrix = gradient.matrix()
        self.recorder.pull_back(edge, matrix)
        return matrix.sum(0)


class CallRecorder(TorchFunctionMode):
    """Records the calls of one block, and runs its backward passes; see the module's docstring."""

    def __init__(
        self,
        params: Sequence[Tensor],
        names: Sequence[str],
        collector: GradientCollector,
        prepare: Callable[[Losses | None], None],
    ) -> None:
        """``prepare`` is called with the losses before the block's backward pass."""
        super().__init__()
        # Weak references: their owner keeps the recorder, and a cycle would wait for the garbage collector.
        self._collector, self._prepare = weakref.ref(collector), weakref.WeakMethod(prepare)
        self._params, self.names = list(params), names
        self._index = {id(parameter): i for i, parameter in enumerate(params)}
        self.recording = False
        self.purpose = Pass.ORDINARY
        self.sample_layout: SampleLayout | None = None
        self.signature = 0  # hash of the differentiable calls in the forward pass
        # Whether indices or products, which differ from batch to batch, or an unseen function may move rows.
        self.moves_rows = False
        self._nodes = _nodes_made()  # by the end of the last call
        self._unseen: list[range] = []  # numbers of nodes that no recorded call has made
        self.first_size: int | None = None  # of the first differentiable tensor's first dimension
        self.calls: list[LayerCall] = []
        self.measurement = Measurement()
        self.arrivals = 0  # calls whose gradient has arrived in the current pass
        self.finished_passes = 0
        self._second_runs = 0  # calls of checkpoints' second runs in the current pass
        self._graph = Graph(0, [], False, False)  # of the current losses

    @property
    def collector(self) -> GradientCollector:
        collector = self._collector()
        assert collector is not None  # a backward pass of its block, or of weighted_sums, is running
        return collector

    # Calls in the forward pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return self._backward(func, args, kwargs)
        if not torch.is_grad_enabled() or not self.recording or _inside_transform():
            return func(*args, **kwargs)
        if any(isinstance(arg, Tensor) and arg.is_nested for arg in args):  # found by the proof
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.run_recorded(func, args, kwargs)
        self._note_unseen_nodes()
        rule = RULES.get(func)
        result = NotImplemented if rule is None else rule(self, *args, **kwargs)
        if result is NotImplemented:
            result = (
                any_function(self, func, args, kwargs) if self._takes_parameter(args, kwargs) else func(*args, **kwargs)
            )
        if not in_backward():
            if (nodes := _nodes_made()) > self._nodes:
                self._add_to_signature(func, args, kwargs, result)
            self._nodes = nodes
        return result

    def _note_unseen_nodes(self) -> None:
        """Notes nodes that appeared between two calls, for example of an autograd.Function, which may move rows."""
        if (nodes := _nodes_made()) > self._nodes and not in_backward():
            self._unseen.append(range(self._nodes, nodes))
            self._nodes = nodes

    def _add_to_signature(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Adds a call that is part of the graph to the signature, and notes whether it may move rows."""
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        shape = first.shape if isinstance(first, Tensor) else None
        if self.first_size is None and shape:
            self.first_size = shape[0]
        key = call_constants((args, kwargs))
        self.signature = hash((self.signature, func, shape, key))
        if self.moves_rows:
            return
        if func in _CONTRACTIONS:
            self.moves_rows = (func in _NAMED_INDICES or not shape or len(shape) <= 2) and not self._takes_parameter(
                args, kwargs
            )
        elif func in (torch.where, Tensor.where):  # between two routes
            routes = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad and not self.binds(arg)]
            self.moves_rows = len(routes) > 1
        elif func in _SORTS or (func not in _KEEP_ROWS and INDEX_ARGUMENT in flattened(key)):
            self.moves_rows = not self._takes_parameters_only(args, kwargs)

    def run_recorded(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs one of torch's Python functions and records the calls that it makes.

        Such a function first asks whether a mode handles it, and would return here; so a copy of it runs, for which
        that question is answered with no.
        """
        answers = dict.fromkeys(
            ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _false
        )
        body = types.FunctionType(func.__code__, {**func.__globals__, **answers}, func.__name__, func.__defaults__)
        body.__kwdefaults__ = func.__kwdefaults__
        with nullcontext() if self in _get_current_function_mode_stack() else self:  # a call is handled once
            return body(*args, **kwargs)

    def _takes_parameter(self, args: Any, kwargs: Any) -> bool:
        for arg in (*args, *kwargs.values()):
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor) and self.binds(tensor):
                    return True
        return False

    def _takes_parameters_only(self, args: Any, kwargs: Any) -> bool:
        """Whether every argument with a gradient is a parameter: a lookup in a table, for example, moves no samples."""
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
        return all(map(self.binds, tensors))

    def _index_of(self, tensor: Tensor) -> int | None:
        if not tensor.requires_grad:
            return None
        index = self._index.get(id(tensor))
        if index is None and tensor._base is not None:
            base = tensor._base
            # Otherwise its views' strides are not those of its elements.
            if base.is_contiguous() and base.dtype == tensor.dtype:
                index = self._index.get(id(base))
        return index

    def binds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a bound parameter or a view of one."""
        return self._index_of(tensor) is not None

    def operand(self, tensor: Any) -> Operand | None:
        """``tensor`` as an operand of a call; None if it has no gradient to take."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        index = self._index_of(tensor)
        if index is None:
            return Derived() if tensor.grad_fn is not None else None
        parameter = self._params[index]
        if tensor is parameter:
            return ParameterUse(index, tensor.shape, contiguous_strides(tensor.shape), 0)
        offset = int(tensor.storage_offset() - parameter.storage_offset())
        return ParameterUse(index, tensor.shape, tensor.stride(), offset)

    def call(self, *operands: Operand | None) -> LayerCall:
        """Registers a call, for the backward pass."""
        if in_backward():  # in a checkpoint's second run, whose gradients may arrive too
            return LayerCall(self, operands)
        self.calls.append(LayerCall(self, operands, len(self.calls)))
        for use in operands:
            place = (use.index, use.offset, use.strides) if isinstance(use, ParameterUse) else use is None
            self.signature = hash((self.signature, place))
        return self.calls[-1]

    # Backward passes

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.autograd.grad or in_backward() or not self.recording or self.purpose is not Pass.ORDINARY:
            return self.run_recorded(func, args, kwargs)
        _require_plain(func, args, kwargs)
        if not self.finished_passes:
            prepare = self._prepare()
            assert prepare is not None  # the block is on the stack
            prepare(losses_of_pass(func, args, kwargs))
        with self.for_purpose(Pass.STATISTICS):
            result = self.run_recorded(func, args, kwargs)
            self.finished_passes += bool(self.arrivals)
        return result

    @contextmanager
    def for_purpose(self, purpose: Pass) -> Generator[None, None, None]:
        """Sets the purpose of the backward pass in the ``with`` block."""
        before = self.purpose, self._second_runs, self.arrivals
        self.purpose, self._second_runs, self.arrivals = purpose, 0, 0
        try:
            yield
        finally:
            self.purpose, self._second_runs, self.arrivals = before

    def rows_of_output(self, call: LayerCall, b: Tensor, dims: tuple[int, ...]) -> Rows | None:
        """See ``LayerCall.rows``; in a measurement, notes the gradient's fingerprint."""
        if self.purpose is Pass.ORDINARY or torch.is_grad_enabled():
            return None
        if self.purpose is Pass.STATISTICS and self.finished_passes:
            raise RuntimeError(
                "a second backward pass went through the model inside of one SampleGradients block. Make one pass from "
                "the sum of all losses, or use a block for each."
            )
        self.arrivals += 1
        if call.key is None:
            call.key = f"second run {self._second_runs}"
            self._second_runs += 1
        if self.purpose in (Pass.MEASURE, Pass.CHECK):
            self.measurement.note(call.key, None, b, dims)
            return None
        assert self.sample_layout is not None
        if self.sample_layout.assumed:
            first = dims[:1] == (0,) and b.shape[0] == self.sample_layout.count
            return Rows.batch_first(self.sample_layout.count, b.device) if first else None
        return self.sample_layout.calls.get(call.key)

    def key_of(self, losses: Losses) -> Any:
        """A key that blocks share whose samples are in the same places, unless rows move."""
        self._note_unseen_nodes()
        self._graph = graph_of([losses.edge], self._index, self._unseen)
        self.moves_rows = self.moves_rows or self._graph.hidden
        return self.signature, self._graph.signature, tuple(losses.shape)

    def differentiate(self, losses: Losses, weights: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Gradients of sum_i w_i loss_i, with the graph retained."""
        return self._gradients([losses.edge], [losses.seeds(weights)], inputs)

    def _gradients(
        self, edges: list[GradientEdge], seeds: list[Tensor], inputs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        if not in_backward() and self._graph.reentrant:
            return self._accumulated(edges, seeds, inputs, self._graph.leaves)
        options = {"retain_graph": True, "allow_unused": True}
        gradients: Sequence[Tensor | None] = self.run_recorded(
            torch.autograd.grad, (edges, list(inputs), seeds), options
        )
        return gradients

    def _accumulated(
        self, edges: list[GradientEdge], seeds: list[Tensor], inputs: Sequence[Tensor], leaves: list[Tensor]
    ) -> Sequence[Tensor | None]:
        """Gradients by ``backward``, the only pass that reentrant checkpoints support; restores every ``.grad``."""
        touched = {id(leaf): leaf for leaf in (*leaves, *self._params, *inputs)}.values()
        before = [(leaf, leaf.grad) for leaf in touched]
        with without_gradient_hooks(touched):
            try:
                for leaf in touched:
                    leaf.grad = None
                self.run_recorded(torch.autograd.backward, (edges, seeds), {"retain_graph": True})
                return [tensor.grad for tensor in inputs]
            finally:
                for leaf, gradient in before:
                    leaf.grad = gradient

    def weights_of_rows(self, count: int) -> Tensor:
        weights = self.collector.weights()
        return torch.eye(count, dtype=torch.float64, device=self._params[0].device) if weights is None else weights

    def take(self, use: ParameterUse, gradient: SampleGradient) -> Tensor:
        """Hands over the per-sample gradients of a use and returns their sum."""
        assert self.sample_layout is not None
        return self.collector.take(use, gradient, self.sample_layout)

    def pull_back(self, edge: GradientEdge, matrix: Tensor) -> None:
        """Takes per-sample gradients of parameters, from those of a tensor computed from them: (N, *shape)."""
        weights = self.collector.weights()
        rows = matrix if weights is None else torch.einsum("kn,n...->k...", weights.to(matrix.dtype), matrix)
        self.take_rows(lambda i: ([edge], [rows[i]]), len(rows), self._params)

    def warn_slow(self, function: str, inputs: Sequence[Tensor], count: int) -> None:
        if count == 1:
            return
        names = {self.names[use.index] for use in map(self.operand, inputs) if isinstance(use, ParameterUse)}
        warn_once(
            f"there is no rule for the per-sample gradients of {join_names(sorted(names))} in {function}: they take a "
            "backward pass through it for each sample of a batch.",
        )

    def take_rows(
        self, seeds: Callable[[int], tuple[list[GradientEdge], list[Tensor]]], count: int, inputs: Sequence[Tensor]
    ) -> None:
        """Makes one backward pass for each of ``count`` rows, and takes the gradients of those ``inputs`` that it
        reaches: bound parameters, or their stand-ins in one call."""
        rows: dict[int, list[Tensor]] = {}
        with self.for_purpose(Pass.ORDINARY):
            reached = list(range(len(inputs)))
            for i in range(count):
                edges, gradients = seeds(i)
                row = self._gradients(edges, gradients, [inputs[k] for k in reached])
                if i == 0:
                    reached = [k for k, gradient in zip(reached, row, strict=True) if gradient is not None]
                    row = [gradient for gradient in row if gradient is not None]
                    rows = {k: [] for k in reached}
                    if not reached:
                        return
                for k, gradient in zip(reached, row, strict=True):
                    assert gradient is not None  # all rows reach the same inputs
                    rows[k].append(dense(gradient))
        for k, gradients in rows.items():
            use = self.operand(inputs[k])
            assert isinstance(use, ParameterUse)
            self.take(use, _TakenRows(torch.stack(gradients), self.collector.weights() is not None))


_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


class _TakenRows(MatrixGradient):
    """Rows of single samples; or, if ``summed``, rows that are already the sums with weights."""

    def __init__(self, matrix: Tensor, summed: bool) -> None:
        super().__init__(matrix)
        self._summed = summed

    def weighted_sums(self, weights: Tensor) -> Tensor:
        return self._matrix if self._summed else super().weighted_sums(weights)


def dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach()


def _require_plain(func: Any, args: Any, kwargs: Any) -> None:
    options = dict(zip(inspect.signature(func).parameters, args, strict=False)) | kwargs
    if options.get("create_graph"):
        raise NotImplementedError(
            "backward(create_graph=True) inside of a SampleGradients block: per-sample gradients have no graph. Put a "
            "derivative that the loss needs into the loss, with torch.autograd.grad(..., create_graph=True)."
        )
    if options.get("inputs") is not None:
        raise NotImplementedError(
            "backward(inputs=...) inside of a SampleGradients block: choose parameters with include= or exclude=."
        )
