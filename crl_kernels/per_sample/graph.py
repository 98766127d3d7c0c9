"""What autograd's graph shows: the losses that a backward pass starts from, and a signature of the graph."""

import numbers
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


@dataclass
class Losses:
    """A tensor in the graph whose first dimension is the sample, and from whose sum or mean a pass starts."""

    edge: GradientEdge
    shape: torch.Size
    start: tuple[Tensor, Any] | None = None  # the tensor that the block's pass starts from, and its gradient

    @property
    def count(self) -> int:
        return self.shape[0]

    @cached_property
    def _block_gradient(self) -> Tensor | float:
        """The gradient that reaches the losses in the block's pass: 1 from their sum, 1 / N from their mean, times the
        factor of a GradScaler, without which 16-bit gradients may vanish."""
        if self.start is None:
            return 1.0
        start, gradient = self.start
        if torch.autograd.graph.get_gradient_edge(start) == self.edge:
            return torch.ones_like(start) if gradient is None else gradient
        reaching: Tensor = torch.autograd.grad(start, [self.edge], gradient, retain_graph=True)[0]
        return reaching

    def seeds(self, weights: Tensor) -> Tensor:
        """The gradient of the losses in a pass in which sample i has w_i times its gradient in the block's pass."""
        kind = self.edge.node._input_metadata[self.edge.output_nr]
        weights = weights.to(kind.device, kind.dtype).reshape(-1, *(1,) * (len(self.shape) - 1)).expand(self.shape)
        return weights * self._block_gradient


# The arguments of a call, as something that can be hashed

INDEX_ARGUMENT = "an integer or boolean tensor, or an unknown object"
_FIXED = (str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)


def call_constants(value: Any) -> Any:
    if isinstance(value, Tensor):
        floating = (value.is_floating_point() or value.is_complex()) and value.layout == torch.strided
        return (value.shape, "tensor" if floating and not value.is_nested else INDEX_ARGUMENT)
    if isinstance(value, (list, tuple)):
        return tuple(map(call_constants, value))
    if isinstance(value, dict):
        return tuple((name, call_constants(argument)) for name, argument in value.items())
    if isinstance(value, slice):
        return tuple(map(call_constants, (value.start, value.stop, value.step)))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # may change from step to step, and moves nothing
        return "number"
    return value if isinstance(value, _FIXED) else INDEX_ARGUMENT


def flattened(key: Any) -> Generator[Any, None, None]:
    if isinstance(key, tuple):
        for part in key:
            yield from flattened(part)
    else:
        yield key


# The graph


@dataclass
class Graph:
    """The part of autograd's graph that can be reached from some edges."""

    signature: int  # of its nodes, in the order in which they were made, what they lead to, and its leaves
    leaves: list[Tensor]
    reentrant: bool  # whether it has a checkpoint with use_reentrant=True
    hidden: bool  # whether it has a part of which the signature knows too little


def graph_of(edges: Sequence[GradientEdge], known: Mapping[int, int], unseen: Sequence[range]) -> Graph:
    """``known``: the leaves that the signature tells apart, by id; ``unseen``: numbers of nodes that no recorded call
    has made."""
    nodes, leaves = [edge.node for edge in edges], []
    seen = set(nodes)
    for node in nodes:
        if (leaf := _leaf(node)) is not None:
            leaves.append(leaf)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
    order = {node: i for i, node in enumerate(sorted(nodes, key=lambda node: node._sequence_nr()))}
    parts = []
    for node in order:
        leaf = _leaf(node)
        ends = tuple((-1 if after is None else order[after], output) for after, output in node.next_functions)
        parts.append((node.name(), ends, None if leaf is None else known.get(id(leaf), -1)))
    starts = tuple((order[edge.node], edge.output_nr) for edge in edges)
    reentrant = any(name == "CheckpointFunctionBackward" for name, _, _ in parts)
    hidden = reentrant or any(node._sequence_nr() in numbers for numbers in unseen for node in order)
    return Graph(hash((starts, tuple(parts))), leaves, reentrant, hidden)


def _leaf(node: Node) -> Tensor | None:
    return node.variable if node.name() == "torch::autograd::AccumulateGrad" else None  # type: ignore[attr-defined]


_SAME_SAMPLES = {
    *("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0", "NegBackward0"),
    *(
        "CloneBackward0",
        "ToCopyBackward0",
        "AliasBackward0",
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
    ),
    *("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0"),
}
_REDUCTIONS = {"SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1"}


def losses_of_pass(func: Any, args: Any, kwargs: Any) -> Losses | None:
    """The losses that a backward pass from a scalar sums or averages; None if the graph does not show them."""
    names = ("self", "gradient") if func is Tensor.backward else ("tensors", "grad_tensors")
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    start, gradient = (x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x for x in values)
    if not isinstance(start, Tensor) or start.grad_fn is None:
        return None
    if start.dim() == 1:
        return Losses(torch.autograd.graph.get_gradient_edge(start), start.shape, (start, gradient))
    node = start.grad_fn
    if start.numel() != 1:
        return None
    while node is not None:
        edges = [(after, output) for after, output in node.next_functions if after is not None]
        if len(edges) != 1:
            return None
        if node.name() in _REDUCTIONS:
            shape = torch.Size(node._saved_self_sym_sizes)  # type: ignore[attr-defined]
            partial = node.name().endswith("1") and len(shape) > 1  # over some dimensions
            return Losses(GradientEdge(*edges[0]), shape, (start, gradient)) if shape and not partial else None
        if node.name() not in _SAME_SAMPLES:
            return None
        node = edges[0][0]
    return None
