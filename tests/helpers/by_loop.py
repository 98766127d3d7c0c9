"""The truth about per-sample gradients: one backward pass per sample, on the graph that the losses have."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from crl_kernels import SampleGradients

Rows = dict[str, Tensor]


class Parts(nn.Module):
    """A module whose forward is a function of itself and of its inputs."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class HiddenScale(torch.autograd.Function):
    """x * scale, (..., D) and (D,); the scale is in no graph of torch's own functions."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).flatten(0, -2).sum(0)


def swap(x: Tensor) -> Tensor:
    """(N, T, ...) <-> (T, N, ...), torch's own layout of sequences."""
    return x.transpose(0, 1)


def squared(model: nn.Module, *batch: Tensor) -> Tensor:
    """Losses (N,) with another target for each output."""
    output = model(*batch).flatten(1)
    return (output - torch.arange(output.shape[1]).cos()).square().sum(1)


def rows_by_loop(model: nn.Module, losses: Tensor | Sequence[Tensor]) -> Rows:
    """name -> (N, *shape): the gradient of losses[i] alone, for every i. ``.grad`` is None afterwards."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in named}
    for _, p in named:
        p.grad = None
    for i in range(len(losses)):
        losses[i].backward(retain_graph=True)
        for name, p in named:
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone())
            p.grad = None
    return {name: torch.stack(row).double() for name, row in rows.items()}


def rows_of_single_samples(model: nn.Module, losses_of: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Rows:
    """name -> (N, *shape) float64, each row from a batch of one."""
    return rows_by_loop(model, [losses_of(model, *(x[i : i + 1] for x in batch)).sum() for i in range(len(batch[0]))])


def flat(rows: Rows) -> Tensor:
    """(N, P)"""
    return torch.cat([row.reshape(len(row), -1) for row in rows.values()], 1)


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor", scale: Tensor | None = None
) -> None:
    """max |actual - expected| <= tolerance max |scale|; ``scale`` is ``expected`` unless given: it is the whole model's
    where one gradient is zero but for rounding."""
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}; expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    largest = float((expected if scale is None else scale).abs().max()) or 1.0
    error = float((actual.double() - expected.double()).abs().max()) / largest
    assert error <= tolerance, f"{name} is off by {error:.2g}, relative to the largest"


def assert_statistics(sg: SampleGradients, rows: Rows, tolerance: float) -> None:
    """Of a block with gram and diagonal, all that it says."""
    gradients = flat(rows)
    gram, mean = gradients @ gradients.T, gradients.mean(0)
    assert sg.num_samples == len(gradients)
    assert_close(sg.sq_norms, gram.diagonal(), tolerance, "sq_norms")
    assert_close(sg.projections, gradients @ mean, tolerance, "projections", gram.diagonal())
    assert_close(sg.gram, gram, tolerance, "gram")
    for name, row in rows.items():
        squares = row.reshape(len(row), -1).square()
        assert_close(sg.mean[name], row.mean(0), tolerance, f"mean[{name!r}]", gradients)
        assert_close(sg.diagonal[name].flatten(), squares.mean(0), tolerance, f"diagonal[{name!r}]", gram)
        assert_close(sg.per_layer[name].sq_norms, squares.sum(1), tolerance, f"per_layer[{name!r}]", gram)


def assert_grads(model: nn.Module, rows: Rows, scale: float, tolerance: float) -> None:
    """``.grad`` is ``scale`` times the mean of the rows."""
    for name, p in model.named_parameters():
        if name in rows:
            grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            assert_close(grad, scale * rows[name].mean(0), tolerance, f"{name}.grad", scale * flat(rows))


def random_directions(rows: Rows, count: int) -> Rows:
    """name -> (count, *shape)"""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(count, *row.shape[1:], generator=generator, dtype=torch.float64) for name, row in rows.items()
    }
