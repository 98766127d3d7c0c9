"""FusedAdamW's step in a CUDA graph: a graph's own replays on a GPU; on a CPU, a step's operators called again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import device
from helpers.past_tasks import MODES, flat
from helpers.penalized_adamw import Network, fisher_of, history_of, task_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import crl_kernels as ck
from crl_kernels.model.binding import Binding
from crl_kernels.optim import checks, fused_adamw
from crl_kernels.penalty import history as histories

KINDS = pytest.mark.parametrize("kind", ["1", "3", "diagonal"])


class Recording(TorchDispatchMode):
    """Runs operators and keeps them, with the tensors that they read and write. As in a CUDA graph, a replay sees other
    values in the same tensors and nothing of what Python does around them; reading a number on the host is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "a captured step reads a number on the host"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, and not written in place
                    old.copy_(new)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Tensors of a CPU count as tensors of a device, whose values the host does not look at; the fixture's value
    begins and ends a capture. A GPU needs none of this."""
    if device.type_() == "cuda":
        return lambda on: None
    monkeypatch.setattr(checks, "on_device", lambda value: isinstance(value, Tensor))
    monkeypatch.setattr(fused_adamw, "on_device", lambda value: isinstance(value, Tensor))
    for module in (fused_adamw, histories):
        monkeypatch.setattr(module, "check_strength", lambda *_, **__: None)
    rates = Binding.rates

    def rates_on_the_device(binding: Binding, groups: Any) -> Any:
        lr = groups[0]["lr"]
        return {lr: list(range(len(binding.params)))} if isinstance(lr, Tensor) else rates(binding, groups)

    monkeypatch.setattr(Binding, "rates", rates_on_the_device)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    state = {"capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    return lambda on: state.update(capturing=on)


def backward(model: Network, step: int) -> None:
    """Gradients keep their memory."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    task_loss(model, step).backward()


def captured_step(optimizer: ck.FusedAdamW, capturing: Callable[[bool], None]) -> "Recording | torch.cuda.CUDAGraph":
    if device.type_() == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # runs nothing
            optimizer.step()
        graph.replay()
        return graph
    capturing(True)
    try:
        with Recording() as recording:
            optimizer.step()
    finally:
        capturing(False)
    return recording


@KINDS
@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_replays_are_eager_steps(kind, decoupled, dtype, capturing):
    """With other rates, strengths and gradients in every step. An eager step notices a write from outside."""
    models = [Network(dtype) for _ in range(2)]
    lr, lam = (torch.tensor(x, dtype=torch.float64) for x in (3e-3, 5.0))
    captured, eager = (
        ck.FusedAdamW(
            model.parameters(), lr=rate, weight_decay=0.1, history=history_of(model, kind), lam=strength,
            decoupled=decoupled, capturable=True,
        )
        for model, rate, strength in zip(models, (lr, 3e-3), (lam, 5.0), strict=True)
    )  # fmt: skip
    recording = None
    for step in range(12):
        rate, strength = 3e-3 / (1 + step), 5.0 + 3 * step
        lr.fill_(rate)
        lam.fill_(strength)
        eager.param_groups[0]["lr"], eager.lam = rate, strength
        for model in models:
            if step == 8:
                with torch.no_grad():
                    model.first.weight.mul_(1.5)
            backward(model, step)
        eager.step()
        if step in (0, 1, 8):
            captured.step()
        elif recording is None:
            recording = captured_step(captured, capturing)
        else:
            recording.replay()
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-12, atol=0)
        torch.testing.assert_close(captured.last_penalty, eager.last_penalty, rtol=1e-12, atol=0)
        assert float(captured.last_penalty) > 0


def test_without_a_history_too(capturing):
    models = [Network() for _ in range(2)]
    lr = torch.tensor(3e-3, dtype=torch.float64)
    captured, eager = (
        ck.FusedAdamW(m.parameters(), lr=r, capturable=True) for m, r in zip(models, (lr, 3e-3), strict=True)
    )
    for step in range(6):
        for model in models:
            backward(model, step)
        eager.step()
        if step == 0:
            captured.step()
        elif step == 1:
            recording = captured_step(captured, capturing)
        else:
            recording.replay()
        torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=1e-12, atol=0)


def test_a_replay_begins_with_what_was_written_to_16_bit_parameters(capturing):
    model = Network(torch.bfloat16)
    lr = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = ck.FusedAdamW(model.parameters(), lr=lr, capturable=True)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    backward(model, 2)
    recording = captured_step(optimizer, capturing)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    written = flat(model)
    recording.replay()
    assert 0 < (flat(model) - written).abs().max() < 0.02


def test_what_a_graph_reads_is_kept(capturing):
    """A schedule of other groups' numbers would push it out of the cache."""
    model = Network()
    optimizer = ck.FusedAdamW(model.parameters(), lr=torch.tensor(1e-3), capturable=True)
    backward(model, 0)
    optimizer.step()
    captured_step(optimizer, capturing)
    uploaded = list(optimizer._replayed.values())
    assert uploaded
    for step in range(40):
        optimizer.param_groups[0]["eps"] = 1e-8 * (1 + step)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(any(kept is one for kept in optimizer._replayed.values()) for one in uploaded)


def groups(model: Network) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": [first]}, {"params": rest}]


def change_history(model: Network, optimizer: ck.FusedAdamW) -> None:
    optimizer.history.append(fisher_of(model, optimizer.history.names, 7, "1"))


def nothing(model: Network, optimizer: ck.FusedAdamW) -> None:
    """No change between the step and the capture: the options are refused."""


def write(model: Network, optimizer: ck.FusedAdamW) -> None:
    model.first.weight.detach().mul_(2)


def freeze(model: Network, optimizer: ck.FusedAdamW) -> None:
    model.first.weight.requires_grad_(False)


def change_group(model: Network, optimizer: ck.FusedAdamW) -> None:
    optimizer.param_groups[0]["eps"] = 1e-3


def resync(model: Network, optimizer: ck.FusedAdamW) -> None:
    optimizer.resync()


BETAS = (torch.tensor(0.9), torch.tensor(0.99))
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Network, ck.FusedAdamW], None], str]] = {
    "not capturable": ({"capturable": False}, nothing, r"capturable is False\. Create it with"),
    "a number as rate": ({"lr": 1e-3}, nothing, r"lr is 0\.001, which replays would keep"),
    "a number as lam": ({"lam": 3.0}, nothing, r"lam is 3\.0, which replays would keep"),
    "eps of the device": ({"eps": torch.tensor(1e-8)}, nothing, "betas, eps or weight_decay are tensors"),
    "verify_every": ({"verify_every": 5}, nothing, "verify_every waits for the device"),
    "betas of the device": (
        {"betas": BETAS},
        nothing,
        "betas, eps or weight_decay are tensors that the host would read",
    ),
    "a write": ({}, write, "parameters, their state or the history have changed since the last step"),
    "a task": ({}, change_history, "the penalty has changed since the last step"),
    "a frozen parameter": ({}, freeze, "the penalty has changed since the last step"),
    "another eps": ({}, change_group, "a parameter group has changed since the last step"),
    "resync": ({}, resync, "parameters, their state or the history have changed since the last step"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_replays_would_not_do_is_refused(case, capturing):
    options, change, message = REFUSED[case]
    model = Network()
    lr, lam = torch.tensor(1e-3), torch.tensor(3.0)
    given = {"lr": lr, "lam": lam, "history": history_of(model, "1"), "capturable": True, **options}
    optimizer = ck.FusedAdamW(model.parameters(), **given)
    backward(model, 0)
    optimizer.step()
    with torch.no_grad():
        change(model, optimizer)
    before = flat(model)
    with pytest.raises(RuntimeError, match=rf"captured in a CUDA graph, and .*{message}"):
        captured_step(optimizer, capturing)
    assert torch.equal(flat(model), before)


def test_a_first_step_and_rates_of_several_groups_are_refused(capturing):
    model = Network()
    lr, lam = torch.tensor(1e-3), torch.tensor(3.0)
    history = history_of(model, "1")
    first = ck.FusedAdamW(model.parameters(), lr=lr, lam=lam, history=history, capturable=True)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"changed since the last step\. Take a step before the capture"):
        captured_step(first, capturing)
    several = ck.FusedAdamW(groups(model), lr=lr, lam=lam, history=history, decoupled=True, capturable=True)
    with pytest.raises(RuntimeError, match=r"compare the learning rates of its groups, .* Give it one group"):
        captured_step(several, capturing)
