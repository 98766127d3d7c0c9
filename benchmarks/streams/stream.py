"""Streams of real tasks, and how far each form of history is from the exact penalty along them.

A task is scikit-learn's digits (8x8 pixels) with its own permutation of the pixels, its own permutation of the labels,
or its own rotation. A small network learns task after task, a few steps each; after each of them its rank-1 Fisher goes
to every form. The penalty that holds old tasks, where there is one, is the exact form's, so all forms see one path.

The error of a form after K tasks is measured where the next task ends: value / exact value, |g - g_exact| / |g_exact|
and the cosine of both gradients. For the diagonal d that a form adds to the directions of ``merge to N`` there is also
the multiple that would have been best, (d . missing) / |d|^2 with missing = g_exact - g_merge: 1 where the diagonal is
right, 0 where its gradient says nothing about what was left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import crl_kernels as ck

from . import forms

WIDTH, BATCH, LR = 64, 64, 2e-3
FISHER_SAMPLES = 512
EVERY = 20

Task = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stream:
    kind: str  # of tasks
    penalized: bool

    @property
    def name(self) -> str:
        return f"{self.kind}, {'with the exact penalty' if self.penalized else 'without a penalty'}"


STREAMS = (
    Stream("permuted pixels", True),
    Stream("permuted labels", True),
    Stream("rotations", True),
    Stream("permuted pixels", False),
)


def tasks(kind: str, count: int, generator: torch.Generator) -> Iterator[Task]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels, labels = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    for number in range(count):
        if kind == "permuted pixels":
            yield pixels[:, torch.randperm(64, generator=generator)], labels
        elif kind == "permuted labels":
            yield pixels, torch.randperm(10, generator=generator)[labels]
        else:
            turn = 2 * math.pi * number / count
            cos, sin = math.cos(turn), math.sin(turn)
            matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(pixels), 2, 3)
            grid = functional.affine_grid(matrix, [len(pixels), 1, 8, 8], align_corners=False)
            yield functional.grid_sample(pixels.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1), labels


def per_sample_loss(model: nn.Module, batch: Task) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def learn(model: nn.Module, task: Task, steps: int, held: ck.LowRankHistory | None, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    lam = held.suggest_lam(LR, steps) if held is not None else 0.0
    for _ in range(steps):
        chosen = torch.randint(len(task[1]), (BATCH,), generator=generator)
        optimizer.zero_grad()
        per_sample_loss(model, (task[0][chosen], task[1][chosen])).mean().backward()
        optimizer.step()
        if held is not None:
            held.decoupled_step_(lam, LR)


def value_and_gradient(history: forms.History, model: nn.Module) -> tuple[float, Tensor]:
    model.zero_grad(set_to_none=False)
    value = float(history.add_penalty_grad_(1.0))
    return value, torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double()


def errors(histories: dict[str, forms.History], model: nn.Module, limits: Sequence[int]) -> dict[str, dict[str, float]]:
    """By form, at the present parameters."""
    found = {name: value_and_gradient(history, model) for name, history in histories.items()}
    exact_value, exact = found.pop(forms.EXACT)
    rows = {
        name: {
            "value": value / exact_value,
            "gradient": float((gradient - exact).norm() / exact.norm()),
            "cosine": float(functional.cosine_similarity(gradient, exact, dim=0)),
        }
        for name, (value, gradient) in found.items()
    }
    for terms in limits:
        kept = found[forms.merged(terms)][1]
        diagonal = found[forms.with_tail(terms)][1] - kept
        if bool(diagonal.any()):
            rows[forms.with_tail(terms)]["best_multiple"] = float(diagonal @ (exact - kept) / diagonal.square().sum())
    return rows


def follow(stream: Stream, seed: int, count: int, steps: int, limits: Sequence[int]) -> dict[str, Any]:
    """One row for each K of 1 ... count - 1 up to EVERY, and for every fifth after it, with six digits."""
    generator = torch.Generator().manual_seed(seed)
    model = network(seed)
    histories = forms.make(model, limits)
    exact = histories[forms.EXACT]
    rows = []
    for number, task in enumerate(tasks(stream.kind, count, generator)):
        learn(model, task, steps, exact if number and stream.penalized else None, generator)
        if number and (number <= EVERY or number % 5 == 4):
            found = errors(histories, model, limits)
            short = {form: {key: float(f"{x:.6g}") for key, x in row.items()} for form, row in found.items()}
            rows.append({"tasks": number, "forms": short})
        chosen = torch.randperm(len(task[1]), generator=generator)[:FISHER_SAMPLES].split(BATCH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ck.FisherWarning)  # one direction has little of a classifier's trace
            fisher = ck.estimate_fisher(model, per_sample_loss, [(task[0][i], task[1][i]) for i in chosen])
        for history in histories.values():
            low_rank = isinstance(history, ck.LowRankHistory)
            history.append(fisher if low_rank else forms.diagonal_of(fisher, model))
    return {"stream": stream.name, "seed": seed, "rows": rows}
