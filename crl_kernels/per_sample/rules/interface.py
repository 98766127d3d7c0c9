"""What a rule may ask of the recorder, how it hands over an operand's gradient, and what several rules compute."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ...backends.reference import mean_dtype
from ..layer_gradients import SampleGradient
from ..rows import Rows


class Call(Protocol):
    """One call of a function, and its operands by slot. ``recorder.LayerCall`` documents the methods."""

    def rows(self, b: Tensor, dims: Sequence[int]) -> Rows | None: ...
    def skips(self, slot: int) -> bool: ...
    def note_gradient(self, slot: int, gradient: Tensor) -> None: ...
    def wants(self, slot: int) -> bool: ...
    def take(self, slot: int, gradient: SampleGradient, edge: GradientEdge | None) -> Tensor: ...


class Recorder(Protocol):
    """The part of ``recorder.CallRecorder`` that rules use."""

    def binds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a bound parameter or a view of one."""
        ...

    def operand(self, tensor: Any) -> Any:
        """The tensor as an operand whose per-sample gradients may be taken, or None."""
        ...

    def call(self, *operands: Any) -> Call: ...

    def weights_of_rows(self, count: int) -> Tensor:
        """(K, N): the weights of the K sums of per-sample gradients that are taken; the unit matrix for the gradients
        of N single samples."""
        ...

    def take_rows(
        self,
        seeds: Callable[[int], tuple[list[GradientEdge], list[Tensor]]],
        count: int,
        inputs: Sequence[Tensor],
    ) -> None:
        """Makes one backward pass for each of ``count`` rows."""
        ...

    def warn_slow(self, function: str, inputs: Sequence[Tensor], count: int) -> None: ...


def _edge(ctx: Any, inputs: Sequence[Tensor | None], index: int) -> GradientEdge | None:
    """The edge of tensor argument ``index`` of an ``autograd.Function`` in the graph."""
    present = [i for i, tensor in enumerate(inputs) if tensor is not None]
    node, output = ctx.next_functions[present.index(index)]
    return None if node is None else GradientEdge(node, output)


def take_gradient(
    ctx: Any,
    call: Call,
    slot: int,
    inputs: Sequence[Tensor | None],
    gradient: Callable[[], SampleGradient],
) -> Tensor | None:
    """Hands over an operand's per-sample gradients and returns their sum; None if nobody wants them.

    ``inputs`` are the Function's tensor arguments: the layer's input first, then the operands in the order of slots.
    """
    operand = inputs[slot + 1]
    if operand is None or not call.wants(slot):
        return None
    return call.take(slot, gradient(), _edge(ctx, inputs, slot + 1)).to(operand.dtype)


def complete_gradients(
    call: Call,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    taken: Sequence[Tensor | None],
    backward: Callable[[list[bool]], Sequence[Tensor | None]],
) -> list[Tensor | None]:
    """The gradients of a layer's ``inputs`` (its input, then the operands in the order of slots), in their dtypes.
    ``taken`` has those of the operands whose per-sample gradients were taken; ``backward`` computes the needed rest, by
    a mask over ``inputs``."""
    mask = [needs[0]]
    for slot, gradient in enumerate(taken):
        mask.append(needs[slot + 1] and gradient is None and not call.skips(slot))
    gradients = [None, *taken]
    for index, gradient in enumerate(backward(mask) if any(mask) else ()):
        tensor = inputs[index]
        if mask[index] and gradient is not None and tensor is not None:
            gradients[index] = gradient = gradient.to(tensor.dtype)
            if index > 0:
                call.note_gradient(index - 1, gradient)
    return gradients


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], b: Tensor
) -> list[Tensor | None]:
    """The gradients of ``function`` by its inputs, which can be differentiated in turn."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        result = function(*inputs)
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        gradients = iter(torch.autograd.grad(result, wanted, b, create_graph=True, allow_unused=True))
        return [next(gradients) if tensor is not None and tensor.requires_grad else None for tensor in inputs]


def device_autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def as_matrix(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)"""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def sum_tokens(b: Tensor) -> Tensor:
    """(N, T, C) -> (N, C), summed in at least float32."""
    return b.sum(1, dtype=mean_dtype(b.dtype)) if b.shape[1] != 1 else b[:, 0]


def is_in_place(function: Callable[..., Any]) -> bool:
    name: str = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
