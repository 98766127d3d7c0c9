"""All that a SampleGradients block gives, against one backward pass per sample, with every combination of options."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crl_kernels import SampleGradients
from helpers.by_loop import Rows, assert_grads, flat, rows_by_loop, squared


def by_loop(model: nn.Module, losses_of: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> Rows:
    """name -> (N, *shape) float64, each row from a batch of one."""
    return rows_by_loop(model, [losses_of(model, *(x[i : i + 1] for x in batch)).sum() for i in range(len(batch[0]))])


def close(actual: Tensor, expected: Tensor, tolerance: float, largest_of: Tensor | None = None) -> None:
    """Relative to the largest element; of the whole model's, if given: some gradients are zero but for rounding."""
    scale = float((expected if largest_of is None else largest_of).abs().max()) or 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * scale)


def check(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    losses_of: Callable[..., Tensor] = squared,
    *,
    tolerance: float = 1e-10,
    expected: dict[str, Tensor] | None = None,
    weighted: bool = True,
) -> None:
    """All statistics, with every combination of options that changes which code runs."""
    expected = by_loop(model, losses_of, batch) if expected is None else expected
    rows = flat(expected)
    mean = rows.mean(0)
    generator = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in model.named_parameters() if name in expected}
    dtype = next(iter(model.parameters())).dtype
    # Views of one matrix, which is what a Fisher keeps.
    matrix = torch.randn(2, rows.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    pieces = matrix.split([shape.numel() for shape in shapes.values()], 1)
    u = {name: piece.view(2, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    along = flat({name: u[name].double() for name in expected})
    for direction, single in ((None, None), (u, None), (u, 0)):
        for reduction in ("sum", "mean"):
            model.zero_grad()
            chosen = direction if single is None else {name: tensor[single] for name, tensor in u.items()}
            options = direction is None
            with SampleGradients(model, chosen, gram=options, loss_reduction=reduction, diagonal=options) as sg:
                losses = losses_of(model, *batch)
                getattr(losses, reduction)().backward()
            close(sg.sq_norms, rows.square().sum(1), tolerance)
            assert_grads(model, expected, 1 if reduction == "mean" else len(losses), tolerance)
            for name, gradient in expected.items():
                close(sg.mean[name], gradient.mean(0), tolerance, rows)
                close(sg.per_layer[name].sq_norms, gradient.flatten(1).square().sum(1), tolerance, sg.sq_norms)
            if direction is None:
                close(sg.projections, rows @ mean, tolerance)
                close(sg.gram, rows @ rows.T, tolerance)
                close(sg.gram.mean(0), sg.projections, tolerance)
                close(sg.projections.mean(), mean.square().sum(), tolerance)
                close(torch.linalg.eigvalsh(sg.gram).sum(), sg.sq_norms.sum(), tolerance)
                for name, gradient in expected.items():
                    close(sg.diagonal[name], gradient.square().mean(0), tolerance, rows.square())
            else:
                close(sg.projections, rows @ (along.T if single is None else along[single]), tolerance)
    if weighted:
        check_weighted_sums(model, batch, losses_of, tolerance, expected)


def check_weighted_sums(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    losses_of: Callable[..., Tensor],
    tolerance: float,
    expected: dict[str, Tensor],
) -> None:
    """After the block's backward pass, and instead of it."""
    weights = torch.randn(3, len(batch[0]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    largest = flat(expected)
    for after in (True, False):
        model.zero_grad()
        with SampleGradients(model) as sg:
            losses = losses_of(model, *batch)
            if after:
                losses.sum().backward(retain_graph=True)
            else:
                sums = sg.weighted_sums(losses, weights)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        sums = sg.weighted_sums(losses, weights) if after else sums
        assert list(sums) == list(expected)
        for name, gradient in expected.items():
            close(sums[name], torch.einsum("kn,n...->k...", weights, gradient), 10 * tolerance, largest)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
