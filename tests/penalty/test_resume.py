"""A training loop that is saved, and goes on with new objects: bit for bit as if it had not been interrupted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.past_tasks import HISTORIES, KINDS, flat, history_of, task_loss
from torch import nn

import crl_kernels as ck

LAM, STEPS, SAVED_AT = 1.5, 30, 13


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def attached(decoupled: bool) -> Callable[[nn.Module, Any], tuple[torch.optim.Optimizer, Callable[[], object]]]:
    def make(model, history):
        optimizer = adamw(model)
        history.attach(optimizer, LAM, decoupled=decoupled)
        return optimizer, optimizer.step

    return make


def fused(decoupled: bool):
    def make(model, history):
        optimizer = ck.FusedAdamW(model.parameters(), lr=1e-2, history=history, lam=LAM, decoupled=decoupled)
        return optimizer, optimizer.step

    return make


def by_hand(decoupled: bool):
    def make(model, history):
        optimizer = adamw(model)

        def step() -> None:
            if not decoupled:
                history.add_penalty_grad_(LAM)
            optimizer.step()
            if decoupled:
                history.decoupled_step_(LAM, optimizer.param_groups)

        return optimizer, step

    return make


WAYS = {
    f"{name}, {'decoupled' if decoupled else 'gradient'}": way(decoupled)
    for name, way in {"attach": attached, "FusedAdamW": fused, "by hand": by_hand}.items()
    for decoupled in (False, True)
}


def with_state_dict(model, optimizer, history, path: Path):
    """As the page "Resume a run" does: the history's state in the checkpoint."""
    parts = {"model": model, "optimizer": optimizer, "history": history}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    checkpoint = torch.load(path, weights_only=True)
    new = network(seed=1)
    new.load_state_dict(checkpoint["model"])
    loaded = type(history)(new)
    loaded.load_state_dict(checkpoint["history"])
    return new, loaded, checkpoint["optimizer"]


def with_file(model, optimizer, history, path: Path):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    history.save(path.with_suffix(".safetensors"))
    checkpoint = torch.load(path, weights_only=True)
    new = network(seed=1)
    new.load_state_dict(checkpoint["model"])
    return new, type(history).load(path.with_suffix(".safetensors"), new), checkpoint["optimizer"]


@KINDS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through", [with_state_dict, with_file])
def test_a_resumed_loop_is_the_uninterrupted_one(kind, way, through, tmp_path):
    ends = {}
    for name in ("uninterrupted", "resumed", "forgotten"):
        model = network(seed=0)
        history = history_of(model, kind)
        optimizer, step_penalized = WAYS[way](model, history)
        for step in range(STEPS):
            if step == SAVED_AT and name != "uninterrupted":
                model, history, state = through(model, optimizer, history, tmp_path / "checkpoint.pt")
                if name == "forgotten":
                    history = HISTORIES[kind](model)
                optimizer, step_penalized = WAYS[way](model, history)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            task_loss(model, step).backward()
            step_penalized()
        ends[name] = flat(model)
    assert torch.equal(ends["resumed"], ends["uninterrupted"])
    assert float((ends["forgotten"] - ends["uninterrupted"]).norm()) > 1e-2
