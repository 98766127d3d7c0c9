"""The rule for every function without one of its own: exact, with one backward pass through the function a sample."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .interface import Call, Recorder, is_in_place

# Attributes such as .shape, queries, and views, which ``binds`` recognises.
_NOT_DIFFERENTIABLE = {"__get__", "__set__", "__len__", "__hash__", "__repr__", "detach", "requires_grad_"}
_NOT_DIFFERENTIABLE |= {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "is_complex",
    "data_ptr",
}


class _Arrival(torch.autograd.Function):
    """A copy of a function's output, where the gradient of the output arrives."""

    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, call: Call, name: str, stand_ins: Sequence[Tensor], output: Tensor
    ) -> Tensor:
        ctx.recorder, ctx.call, ctx.function, ctx.stand_ins = recorder, call, name, stand_ins
        return output.clone()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Any:
        rows = None if torch.is_grad_enabled() else ctx.call.rows(b, range(b.dim()))
        if rows is not None:
            edge = GradientEdge(*ctx.next_functions[-1])
            weights = ctx.recorder.weights_of_rows(rows.count)
            ctx.recorder.warn_slow(ctx.function, ctx.stand_ins, rows.count)
            ctx.recorder.take_rows(lambda i: ([edge], [rows.weigh(b, weights[i])]), len(weights), ctx.stand_ins)
        return None, None, None, None, b


def any_function(recorder: Recorder, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs a function that takes parameters. If the samples are apart in an output, the backward pass goes from it
    through the function once for each sample."""
    name = getattr(function, "__name__", repr(function))
    if name in _NOT_DIFFERENTIABLE or is_in_place(function) or kwargs.get("out") is not None:
        return function(*args, **kwargs)
    stand_ins: list[Tensor] = []

    def stand_in(tensor: Tensor) -> Tensor:
        if not recorder.binds(tensor):
            return tensor
        stand_ins.append(tensor.view_as(tensor))  # a tensor that no other call has
        return stand_ins[-1]

    args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
    result = function(*args, **kwargs)
    leaves, structure = tree_flatten(result)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not recorder.binds(leaf):
            call = recorder.call(*(recorder.operand(tensor) for tensor in stand_ins))
            leaves[i] = _Arrival.apply(recorder, call, name, tuple(stand_ins), leaf)
    return tree_unflatten(leaves, structure)
