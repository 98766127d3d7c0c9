"""Per-sample gradients in one backward pass. (Stand-in with the final interface: vmap over the whole model.)"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .binding import Binding


@dataclass(frozen=True)
class LayerStatistics:
    """One parameter's share: sums over parameters give those of the whole model."""

    sq_norms: Tensor  # (N,) float64
    projections: Tensor  # as the whole model's
    gram: Tensor | None  # (N, N) float64


class SampleGradients:
    """Square norms, mean, projections and Gram matrix of the per-sample gradients g_i of a batch of N.

        with SampleGradients(model) as sg:
            losses = per_sample_loss(model, batch)      # (N,)
            losses.sum().backward()
        sg.sq_norms        (N,) float64           |g_i|^2
        sg.mean            name -> tensor         mu = mean_i g_i, for every bound parameter; zeros where none arrived
        sg.projections     (N,) float64           mu . g_i, or direction . g_i; (N, K) if direction has K leading rows
        sg.gram            (N, N) float64         g_i . g_j, with gram=True
        sg.diagonal        name -> tensor         mean_i g_ij^2, with diagonal=True
        sg.per_layer       name -> LayerStatistics   by parameter

    Readable after the block. `.grad` is what it is without the block. The graph may be retained
    (``losses.sum().backward(retain_graph=True)``) for weighted backward passes after the block:
    ``torch.autograd.grad((weights * losses).sum(), params)`` is an ordinary backward pass then.

    Args:
        model: its parameters that require a gradient (and pass include=, exclude=, as in LowRankHistory).
        direction: parameter name -> tensor of its shape, or (K, *shape).
        gram, diagonal: also compute those.
        loss_reduction: "sum", or "mean" if the backward pass starts from losses.mean().
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Mapping[str, Tensor] | None = None,
        gram: bool = False,
        loss_reduction: Literal["sum", "mean"] = "sum",
        *,
        diagonal: bool = False,
        include: Any = None,
        exclude: Any = None,
    ) -> None:
        self._model, self._direction, self._gram, self._reduction = model, direction, gram, loss_reduction
        self._want_diagonal = diagonal
        self._binding = Binding(model, include, exclude)

    def __enter__(self) -> "SampleGradients":
        self._calls: list[Any] = []
        self._handle = self._model.register_forward_hook(self._record, with_kwargs=True)
        return self

    def _record(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call: dict[str, Any] = {"inputs": (args, kwargs)}
        for leaf in tree_flatten(output)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad: call.__setitem__("grad", grad))
                break
        self._calls.append(call)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._handle.remove()
        if kind is not None:
            return
        call = self._calls[-1]
        holder = nn.Module()
        holder.model = self._model
        of = {id(p): name for name, p in holder.named_parameters()}
        names = [of[id(p)] for p in self._binding.params]
        leaves, structure = tree_flatten(call["inputs"])
        batched = [isinstance(leaf, Tensor) for leaf in leaves]
        count = next(leaf.shape[0] for leaf, b in zip(leaves, batched, strict=True) if b)

        class Call(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, args: Any, kwargs: Any) -> Any:
                return self.model(*args, **kwargs)

        wrapped = Call(self._model)

        def loss(params: Any, grad: Tensor, *sample: Any) -> Tensor:
            one = [leaf.unsqueeze(0) if b else leaf for leaf, b in zip(sample, batched, strict=True)]
            args, kwargs = tree_unflatten(one, structure)
            output = torch.func.functional_call(wrapped, dict(zip(names, params, strict=True)), (args, kwargs))
            first = next(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
            return (first[0] * grad).sum()

        with torch.enable_grad():
            gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, *(0 if b else None for b in batched)))(
                tuple(p.detach() for p in self._binding.params), call["grad"].detach(), *leaves
            )
        scale = count if self._reduction == "mean" else 1
        blocks = {
            name: g.reshape(count, -1).double() * scale
            for name, g in zip(self._binding.layout.names, gradients, strict=True)
        }
        shapes = dict(zip(self._binding.layout.names, self._binding.layout.shapes, strict=True))
        dtypes = dict(zip(self._binding.layout.names, (p.dtype for p in self._binding.params), strict=True))
        self.num_samples = count
        self.mean = {name: block.mean(0).reshape(shapes[name]).to(dtypes[name]) for name, block in blocks.items()}
        self.diagonal = {name: b.square().mean(0).reshape(shapes[name]).to(dtypes[name]) for name, b in blocks.items()}
        self.per_layer = {}
        for name, block in blocks.items():
            if self._direction is None:
                projections = block @ block.mean(0)
            else:
                u = self._direction[name].double()
                projections = block @ (u.reshape(-1) if u.shape == shapes[name] else u.reshape(len(u), -1).T)
            gram = block @ block.T if self._gram else None
            self.per_layer[name] = LayerStatistics(block.square().sum(1), projections, gram)
        layers = list(self.per_layer.values())
        self.sq_norms = torch.stack([layer.sq_norms for layer in layers]).sum(0)
        self.projections = torch.stack([layer.projections for layer in layers]).sum(0)
        self.gram = torch.stack([layer.gram for layer in layers]).sum(0) if self._gram else None
