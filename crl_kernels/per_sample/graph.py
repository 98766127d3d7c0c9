"""What autograd's graph shows: the losses that a pass starts from, and a signature of what the pass walks through."""

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
    start: tuple[Tensor, Any] | None = None  # of the block's pass, and its gradient

    @property
    def count(self) -> int:
        return self.shape[0]

    @cached_property
    def _block_gradient(self) -> Tensor | float:
        """The gradient that reaches the losses in the block's pass: 1 from their sum, 1 / N from their mean, and what
        a GradScaler multiplies them by, without which 16-bit gradients may vanish."""
        if self.start is None:
            return 1.0
        start, gradient = self.start
        if torch.autograd.graph.get_gradient_edge(start) == self.edge:
            return torch.ones_like(start) if gradient is None else gradient
        found: Tensor = torch.autograd.grad(start, [self.edge], gradient, retain_graph=True)[0]
        return found

    def seeds(self, weights: Tensor) -> Tensor:
        """The gradient of the tensor in a pass in which sample i has w_i times what it has in the block's."""
        kind = self.edge.node._input_metadata[self.edge.output_nr]
        weights = weights.to(kind.device, kind.dtype).reshape(-1, *(1,) * (len(self.shape) - 1)).expand(self.shape)
        return weights * self._block_gradient


# What a call has besides tensors, as something that can be hashed

INDEX_ARGUMENT = "an integer or boolean tensor, or what is not known"
_FIXED = (str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)


def call_constants(value: Any) -> Any:
    if isinstance(value, Tensor):
        floating = (value.is_floating_point() or value.is_complex()) and value.layout == torch.strided
        return (value.shape, "tensor" if floating and not value.is_nested else INDEX_ARGUMENT)
    if isinstance(value, (list, tuple)):
        return tuple(map(call_constants, value))
    if isinstance(value, dict):
        return tuple((name, call_constants(each)) for name, each in value.items())
    if isinstance(value, slice):
        return tuple(map(call_constants, (value.start, value.stop, value.step)))
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # which may change from step to step, and moves nothing
        return "number"
    return value if isinstance(value, _FIXED) else INDEX_ARGUMENT


def flattened(key: Any) -> Generator[Any, None, None]:
    if isinstance(key, tuple):
        for each in key:
            yield from flattened(each)
    else:
        yield key


# The graph


@dataclass
class Graph:
    """What autograd will walk from some edges."""

    signature: int  # of its nodes, in the order in which they were made, what they lead to, and its leaves
    leaves: list[Tensor]
    reentrant: bool  # whether it has a checkpoint with use_reentrant=True
    hidden: bool  # whether it has a part of which the signature knows too little


def graph_of(edges: Sequence[GradientEdge], known: Mapping[int, int], unseen: Sequence[range]) -> Graph:
    """``known``: by id, the leaves that the signature tells apart from others; ``unseen``: numbers of nodes that no
    call which was seen has made."""
    nodes, leaves = [edge.node for edge in edges], []
    seen = set(nodes)
    for node in nodes:
        if (leaf := _leaf(node)) is not None:
            leaves.append(leaf)
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
    made = {node: i for i, node in enumerate(sorted(nodes, key=lambda node: node._sequence_nr()))}
    parts = []
    for node in made:
        leaf = _leaf(node)
        ends = tuple((-1 if after is None else made[after], output) for after, output in node.next_functions)
        parts.append((node.name(), ends, None if leaf is None else known.get(id(leaf), -1)))
    starts = tuple((made[edge.node], edge.output_nr) for edge in edges)
    reentrant = any(name == "CheckpointFunctionBackward" for name, _, _ in parts)
    hidden = reentrant or any(node._sequence_nr() in numbers for numbers in unseen for node in made)
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
    """What a pass from a scalar sums or averages; None if the graph does not show it."""
    names = ("self", "gradient") if func is Tensor.backward else ("tensors", "grad_tensors")
    given = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    start, gradient = (each[0] if isinstance(each, (list, tuple)) and len(each) == 1 else each for each in given)
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
