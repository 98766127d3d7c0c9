"""Small models, losses and data for Fisher estimates, and per-sample gradients by a loop."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.by_loop import flat, rows_by_loop


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean(1)


def data(count: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator) + 1


def loader(count: int = 50, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(*data(count)), batch_size=batch_size)


def gradients_by_loop(model: nn.Module, count: int = 50, samples: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(N, P) float64: one backward pass per sample."""
    model.eval()
    x, y = data(count) if samples is None else samples
    x, y = x.to(model.unused.dtype), y.to(model.unused.dtype)
    rows = rows_by_loop(model, [loss(model, (x[i : i + 1], y[i : i + 1])).sum() for i in range(count)])
    model.train()
    return flat(rows)


class Linear(nn.Module):
    """loss_i = x_i . theta, so x_i is the gradient of sample i."""

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.theta = nn.Linear(count, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.theta(x)


def linear_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, 0]


def split_by_parameter(vector: Tensor, model: nn.Module) -> list[Tensor]:
    params = list(model.parameters())
    return [part.reshape(p.shape) for part, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]


def loss_and_class(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return loss(model, batch[:2]), batch[2]


def stratified(count: int = 60, batch_size: int = 7) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Strata -1, 3 and 8, unevenly."""
    x, y = (part.double() for part in data(count))
    classes = torch.tensor([8, 3, 3, -1, 8, 8, 3, 8])[torch.arange(count) * 5 % 8]
    return classes, list(zip(x.split(batch_size), y.split(batch_size), classes.split(batch_size), strict=True))


class LossError(Exception):
    """What a loss of a test raises."""


def global_state(model: nn.Module) -> list:
    """Of a model and of the random generators, all that an estimate must leave as it was."""
    return [
        [module.training for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
    ]


# Small random problems are neither rank 1 nor free of noise; the warnings about that have tests of their own.
IGNORE_ESTIMATE_WARNINGS = [
    pytest.mark.filterwarnings("ignore:only .* of the trace"),
    pytest.mark.filterwarnings("ignore:the mean gradient.* is mostly noise"),
]
