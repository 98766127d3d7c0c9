"""Bytes and times of each form after K tasks, in units of a step of torch's AdamW that takes turns with them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import crl_kernels as ck

from ..common.measure import clock, interleaved, percentiles
from . import forms

LAM, LR = 1e-3, 1e-3
ADAMW = "AdamW(fused=True)"
LIMIT = 10  # max_terms of the bounded forms here


class Parameters(nn.Module):
    """Random parameters with gradients, in equal tensors."""

    def __init__(self, numel: int, tensors: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.held = nn.ParameterList(torch.randn(numel // tensors, generator=generator) for _ in range(tensors))
        for parameter in self.held:
            parameter.grad = torch.randn(parameter.shape, generator=generator) / 1000


def state_of(model: nn.Module, terms: int, tail: bool) -> dict[str, torch.Tensor]:
    """Directions like noise; appending so many tasks would take longer than measuring them."""
    state = {"curvatures": torch.ones(terms).double(), "anchor_projections": torch.zeros(terms).double()}
    for name, parameter in model.named_parameters():
        scale = parameter.detach().norm() * len(list(model.parameters())) ** 0.5
        for k in range(terms):
            state[f"directions.{k}.{name}"] = parameter.detach().roll(k) / scale
        if tail:
            state |= {f"fisher_diagonal.{name}": torch.rand_like(parameter), f"anchor.{name}": parameter.detach() + 0.1}
    return state | ({"residual": torch.zeros((), dtype=torch.float64)} if tail else {})


def history_of(model: nn.Module, form: str, tasks: int) -> forms.History:
    history = forms.make(model, [LIMIT])[form]
    low_rank = isinstance(history, ck.LowRankHistory)
    terms = tasks if form == forms.EXACT else min(tasks, LIMIT)
    state = state_of(model, terms if low_rank else 0, tail=form in (forms.with_tail(LIMIT), forms.DIAGONAL))
    if not low_rank:
        state = {key: tensor for key, tensor in state.items() if key not in ("curvatures", "anchor_projections")}
    history.load_state_dict(state | {"num_tasks": torch.tensor(tasks)})
    return history


def next_fisher(model: nn.Module, history: forms.History) -> ck.LowRankFisher | ck.DiagonalFisher:
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    fisher = ck.LowRankFisher.from_mean_gradient(gradient, 1.0, dict(model.named_parameters()))
    return fisher if isinstance(history, ck.LowRankHistory) else forms.diagonal_of(fisher, model)


def appending(history: forms.History, fisher: Any) -> Callable[[], object]:
    """Appends to a copy that shares the state, which append replaces and never writes to."""
    return lambda: copy.copy(history).append(fisher)


def stepping(model: nn.Module, history: forms.History, form: str) -> Callable[[], object]:
    """FusedAdamW's step, with the penalty inside it or, for the form that does not fit, attached to it."""
    if form != forms.with_tail(LIMIT):
        return ck.FusedAdamW(model.parameters(), lr=LR, history=history, lam=LAM).step
    optimizer = ck.FusedAdamW(model.parameters(), lr=LR)
    history.attach(optimizer, LAM)
    return optimizer.step


def after(tasks: int, numel: int, tensors: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each form."""
    names = [forms.EXACT, forms.merged(LIMIT), forms.with_tail(LIMIT), forms.DIAGONAL]
    calls: dict[str, Callable[[], object]] = {}
    appends: dict[str, Callable[[], object]] = {}
    bytes_ = {}
    calls[ADAMW] = torch.optim.AdamW(Parameters(numel, tensors).parameters(), lr=LR, fused=True).step
    for name in names:
        model = Parameters(numel, tensors)
        history = history_of(model, name, tasks)
        bytes_[name] = history.nbytes
        calls[f"{name}: gradient"] = lambda history=history: history.add_penalty_grad_(LAM)
        moved = Parameters(numel, tensors)
        calls[f"{name}: step"] = stepping(moved, history_of(moved, name, tasks), name)
        appends[name] = appending(history, next_fisher(model, history))
    seconds = interleaved(calls, rounds, clock()) | {
        f"{name}: append": times for name, times in interleaved(appends, 1, clock()).items()
    }
    step = statistics.median(seconds[ADAMW])

    def ratio(call: str) -> dict[str, float]:
        times = seconds[call]
        pairs = zip(times, seconds[ADAMW], strict=True) if len(times) > 1 else [(times[0], step)]
        return {
            key.replace("ms", "ratio"): value / 1e3 for key, value in percentiles([a / b for a, b in pairs]).items()
        }

    return [
        {
            "tasks": tasks,
            "form": name,
            "bytes": bytes_[name],
            "bytes_per_parameter": bytes_[name] / numel,
            **{what: ratio(f"{name}: {what}") for what in ("gradient", "step", "append")},
        }
        for name in names
    ]
