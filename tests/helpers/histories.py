"""A small network, random low-rank Fishers of its parameters, and the value and gradient of a history."""

import torch
from torch import Tensor, nn

import crl_kernels as ck
from helpers.past_tasks import random_like, trainable


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.LayerNorm(4)).double()


def fisher_of(model: nn.Module, seed: int, terms: int = 1, slopes: Tensor | None = None, **options) -> ck.LowRankFisher:
    params = trainable(model)
    rows = [random_like(params, 10 * seed + k) for k in range(terms)]
    directions = {name: torch.stack([row[name] for row in rows]) / 7 for name in rows[0]}
    curvatures, anchor = torch.arange(1.0, terms + 1) + seed, random_like(params, 900 + seed)
    return ck.LowRankFisher(directions, curvatures, anchor, slopes=slopes, **options)


def flatten(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def value_and_gradient(history, model: nn.Module, lam: float = 2.0) -> tuple[Tensor, Tensor]:
    params = list(model.parameters())
    value = history.penalty(lam)
    return value.detach(), flatten(torch.autograd.grad(value, params))
