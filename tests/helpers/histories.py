"""A small network, random Fishers of its parameters, and the value and gradient of a history."""

import torch
from torch import Tensor, nn

import crl_kernels as ck


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.LayerNorm(4)).double()


def random_named(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for n, p in model.named_parameters()
    }


def fisher_of(model: nn.Module, seed: int, terms: int = 1, slopes: Tensor | None = None) -> ck.LowRankFisher:
    rows = [random_named(model, 10 * seed + k) for k in range(terms)]
    directions = {name: torch.stack([row[name] for row in rows]) / 7 for name in rows[0]}
    return ck.LowRankFisher(
        directions, torch.arange(1.0, terms + 1) + seed, random_named(model, 900 + seed), slopes=slopes
    )


def flatten(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def flat_parameters(model: nn.Module) -> Tensor:
    return flatten(model.parameters())


def penalized_step(optimizer: torch.optim.Optimizer, history, lam: float, clip: float, decoupled: bool) -> None:
    """A step whose penalty is not clipped: in the gradient after clipping, or after the step. Gradients end as zero."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    if not decoupled:
        history.add_penalty_grad_(lam)
    optimizer.step()
    if decoupled:
        history.decoupled_step_(lam, optimizer.param_groups[0]["lr"])
    optimizer.zero_grad()


def value_and_gradient(history, model: nn.Module, lam: float = 2.0) -> tuple[Tensor, Tensor]:
    params = list(model.parameters())
    value = history.penalty(lam)
    return value.detach(), flatten(torch.autograd.grad(value, params))
