"""What the rules of all kinds of layer share: what a rule is given, and how it hands over an operand's gradient."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..layer_gradients import SampleGradient
from ..rows import Rows


class Call(Protocol):
    """A call of a function with a rule, and its operands by slot."""

    def rows(self, b: Tensor, dims: Sequence[int]) -> Rows | None: ...
    def skips(self, slot: int) -> bool: ...
    def note_gradient(self, slot: int, gradient: Tensor) -> None: ...
    def takes(self, slot: int) -> bool: ...
    def settle(self, slot: int, gradient: SampleGradient, edge: GradientEdge | None) -> Tensor: ...


class Recorder(Protocol):
    """What rules need of whoever records."""

    def binds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a bound parameter or a view of one."""
        ...

    def operand(self, tensor: Any) -> Any:
        """The tensor as an operand whose per-sample gradients may be taken, or None."""
        ...

    def call(self, *operands: Any) -> Call: ...

    def weights_of_rows(self, count: int) -> Tensor:
        """(K, N): the weights of each of the K rows that are wanted; of N single samples, the unit matrix."""
        ...

    def take_rows(
        self,
        seeds: Callable[[int], tuple[list[GradientEdge], list[Tensor]]],
        count: int,
        inputs: Sequence[Tensor],
    ) -> None:
        """One backward pass for each of ``count`` rows."""
        ...

    def say_slow(self, function: str, inputs: Sequence[Tensor], count: int) -> None: ...


def _edge(ctx: Any, inputs: Sequence[Tensor | None], which: int) -> GradientEdge | None:
    """Of the which-th of a Function's tensor arguments, in the graph."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]
    node, output = ctx.next_functions[present.index(which)]
    return None if node is None else GradientEdge(node, output)


def settle_operand(
    ctx: Any,
    call: Call,
    slot: int,
    inputs: Sequence[Tensor | None],
    gradient: Callable[[], SampleGradient],
) -> Tensor | None:
    """The operand's gradient, if per-sample ones are taken of it. Operands are a Function's tensor arguments after the
    first, the input."""
    operand = inputs[slot + 1]
    if operand is None or not call.takes(slot):
        return None
    return call.settle(slot, gradient(), _edge(ctx, inputs, slot + 1)).to(operand.dtype)


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], b: Tensor
) -> list[Tensor | None]:
    """The gradients of ``function`` by its inputs, which can be differentiated in turn."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        result = function(*inputs)
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, b, create_graph=True, allow_unused=True))
        return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


def device_autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def as_matrix(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)"""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def sum_tokens(b: Tensor) -> Tensor:
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    return b.sum(1, dtype=dtype) if b.shape[1] != 1 else b[:, 0]


# Every other function


def is_in_place(function: Callable[..., Any]) -> bool:
    name: str = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
