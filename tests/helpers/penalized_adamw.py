"""Networks, histories, and a reference for FusedAdamW: torch's AdamW with the penalty added by history calls."""

from functools import partial

import torch
from torch import Tensor, nn

import crl_kernels as ck
from helpers import past_tasks

LAM = 1.5


class Network(nn.Module):
    """Layers of several shapes, one parameter without elements and one that the loss does not use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 3, 3)
        self.first, self.second = nn.Linear(12, 17), nn.Linear(17, 3)
        self.empty, self.unused = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.randn(5))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.convolution(x).flatten(1)).tanh())


def task_loss(model: Network, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step % 7)
    x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(model.unused.dtype)
    return (model(x) - x[:, 0, 0, :3].sin()).square().mean()


def fisher_of(model: nn.Module, names, seed: int, kind: str, storage_dtype: torch.dtype | None = None):
    """A task of the named parameters."""
    params = {name: p for name, p in model.named_parameters() if name in names}
    kind = "diagonal" if kind == "diagonal" else "low_rank"
    return past_tasks.random_fisher(params, kind, seed, storage_dtype=storage_dtype)


def history_of(model: nn.Module, kind: str, exclude: list[str] | None = None):
    history = (ck.DiagonalHistory if kind == "diagonal" else ck.LowRankHistory)(model, exclude=exclude)
    for seed in range(2 if kind == "diagonal" else int(kind)):
        history.append(fisher_of(model, history.names, seed, kind))
    return history


def groups_of(model: Network) -> list[dict]:
    """Groups with hyperparameters of their own, in another order than the model's."""
    params = list(reversed(list(model.parameters())))
    return [
        {"params": [p for p in params if p.dim() > 1], "lr": 3e-3},
        {"params": [p for p in params if p.dim() <= 1], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.8, 0.99)},
    ]


train = partial(past_tasks.train, loss_of=task_loss)


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class AdamWWithPenalty(torch.optim.AdamW):
    """What FusedAdamW is to equal: AdamW with history.add_penalty_grad_ or decoupled_step_ just before its step."""

    def __init__(self, params, history, lam, decoupled: bool = False, **options) -> None:
        super().__init__(params, **options)
        self.history, self.lam, self.decoupled = history, lam, decoupled

    def step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        missing = [p for p in params if p.grad is None]
        if self.history is not None and self.decoupled:
            self.history.decoupled_step_(self.lam, self.param_groups)
        elif self.history is not None:
            self.history.add_penalty_grad_(self.lam)
        super().step()
        for parameter in missing:
            parameter.grad = None


BOTH = (AdamWWithPenalty, ck.FusedAdamW)


def carried_sums(optimizer: ck.FusedAdamW) -> Tensor:
    return optimizer._penalty._carried().clone()


def assert_carries_the_projections(optimizer: ck.FusedAdamW, history: ck.LowRankHistory) -> None:
    """A fresh sum in plain float64."""
    params = dict(zip(history.names, history._binding.params, strict=True))
    fresh = torch.stack(
        [
            sum((u.double() * params[name].detach().double()).sum() for name, u in term.items())
            for term in history.directions()
        ]
    )
    torch.testing.assert_close(carried_sums(optimizer), fresh, rtol=1e-9, atol=0)
