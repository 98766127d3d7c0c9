"""All that a SampleGradients block gives, against one backward pass per sample, with every combination of options."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from crl_kernels import SampleGradients
from helpers.by_loop import assert_close, assert_grads, flat, rows_of_single_samples, squared


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
    expected = rows_of_single_samples(model, losses_of, batch) if expected is None else expected
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
            assert_close(sg.sq_norms, rows.square().sum(1), tolerance, "sq_norms")
            assert_grads(model, expected, 1 if reduction == "mean" else len(losses), tolerance)
            for name, gradient in expected.items():
                assert_close(sg.mean[name], gradient.mean(0), tolerance, f"mean[{name!r}]", rows)
                squares = gradient.flatten(1).square()
                assert_close(
                    sg.per_layer[name].sq_norms, squares.sum(1), tolerance, f"per_layer[{name!r}]", sg.sq_norms
                )
            if direction is None:
                assert_close(sg.projections, rows @ mean, tolerance, "projections")
                assert_close(sg.gram, rows @ rows.T, tolerance, "gram")
                assert_close(sg.gram.mean(0), sg.projections, tolerance, "gram.mean(0)")
                assert_close(sg.projections.mean(), mean.square().sum(), tolerance, "projections.mean()")
                assert_close(torch.linalg.eigvalsh(sg.gram).sum(), sg.sq_norms.sum(), tolerance, "trace of gram")
                for name, gradient in expected.items():
                    assert_close(
                        sg.diagonal[name], gradient.square().mean(0), tolerance, f"diagonal[{name!r}]", rows.square()
                    )
            else:
                expected_projections = rows @ (along.T if single is None else along[single])
                assert_close(sg.projections, expected_projections, tolerance, "projections")
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
            weighted = torch.einsum("kn,n...->k...", weights, gradient)
            assert_close(sums[name], weighted, 10 * tolerance, f"weighted sum of {name!r}", largest)
        for p, grad in zip(model.parameters(), grads, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
