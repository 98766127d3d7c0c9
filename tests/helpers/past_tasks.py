"""Random past tasks of both kinds of history, steps with a penalty, and trainings whose ends are compared."""

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck

# "int8" is low rank with directions in int8.
HISTORIES = {"low_rank": ck.LowRankHistory, "diagonal": ck.DiagonalHistory, "int8": ck.LowRankHistory}
KINDS = pytest.mark.parametrize("kind", HISTORIES)
MODES = pytest.mark.parametrize("decoupled", [False, True], ids=["gradient", "decoupled"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_like(params: Mapping[str, Tensor], seed: int | torch.Generator) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in params.items()}


def random_fisher(
    params: Mapping[str, Tensor], kind: str, seed: int | torch.Generator, **options
) -> ck.LowRankFisher | ck.DiagonalFisher:
    """A task whose anchor lies away from where the parameters are; ``options`` are those of a low-rank Fisher."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    gradient, anchor = random_like(params, generator), random_like(params, generator)
    if kind == "int8":
        options = {"storage_dtype": torch.int8} | options
    if kind != "diagonal":
        return ck.LowRankFisher.from_mean_gradient(gradient, 0.02, anchor, **options)
    return ck.DiagonalFisher({n: 0.1 * g**2 for n, g in gradient.items()}, anchor)


def history_of(
    model: nn.Module, kind: str, tasks: int = 2, unsharded: nn.Module | None = None, **options
) -> ck.LowRankHistory | ck.DiagonalHistory:
    """Past tasks of the model; ``unsharded`` has the shapes of the parameters of a sharded one."""
    history = HISTORIES[kind](model, **options)
    params = {n: p for n, p in trainable(unsharded or model).items() if n in history.names}
    generator = torch.Generator().manual_seed(1)
    for _ in range(tasks):
        history.append(random_fisher(params, kind, generator))
    return history


def task_loss(model: nn.Module, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    output = model(x)
    return (output - x[:, : output.shape[1]].sin()).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def penalized_step(optimizer: torch.optim.Optimizer, history, lam: float, clip: float, decoupled: bool) -> None:
    """A step whose penalty is not clipped: in the gradient after clipping, or after the step. Gradients end as zero."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if not decoupled:
        history.add_penalty_grad_(lam)
    optimizer.step()
    if decoupled:
        history.decoupled_step_(lam, optimizer.param_groups[0]["lr"])
    optimizer.zero_grad()


def train(
    model: nn.Module,
    optimizer,
    steps: Iterable[int],
    before_step: Callable[[int], object] | None = None,
    loss_of: Callable[[nn.Module, int], Tensor] = task_loss,
) -> Tensor:
    """The parameters after these steps; ``before_step(step)`` is called when the gradients of a step are there."""
    for step in steps:
        model.zero_grad()
        loss_of(model, step).backward()
        if before_step is not None:
            before_step(step)
        optimizer.step()
    return flat(model)
