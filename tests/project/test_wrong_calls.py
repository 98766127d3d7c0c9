"""What people type who meet the library for the first time: one line that names the argument, and nothing changes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck

Call = Callable[["Scene"], object]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def batches(count: int = 8, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 4), torch.randn(size, 2)) for _ in range(count // size)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def loss_at(model: nn.Module, batch: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    return loss(model, batch) * (1 + t)


def loss_with_backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    losses = loss(model, batch)
    losses.sum().backward(retain_graph=True)
    return losses


class Scene:
    """A model with gradients, one history of each kind with a task, and an optimizer that has taken a step."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.model = folder, network()
        self.optimizer = ck.FusedAdamW(self.model.parameters())
        self.model(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()
        self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.ones = {name: torch.ones_like(p) for name, p in self.anchor.items()}
        self.fisher = ck.LowRankFisher.from_mean_gradient(self.ones, 1.0, self.anchor)
        self.history, self.diagonal = ck.LowRankHistory(self.model), ck.DiagonalHistory(self.model)
        self.history.append(self.fisher)
        self.diagonal.append(ck.DiagonalFisher(self.ones, self.anchor))
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1)

    @property
    def params(self) -> list[Tensor]:
        return list(self.model.parameters())

    def estimate(self, per_sample_loss: Any = loss, loader: Any = None, **options: Any) -> object:
        return ck.estimate_fisher(self.model, per_sample_loss, batches() if loader is None else loader, **options)

    def diagnose(self, loader: Any = None, **options: Any) -> object:
        options = {"timesteps": [0, 1], "samples": 48, **options}
        return ck.diagnose(self.model, loss_at, batches(48, 48) if loader is None else loader, **options)

    def fused(self, **options: Any) -> object:
        return ck.FusedAdamW(self.model.parameters(), **options)

    def raw(self, **change: Any) -> object:
        arguments = {"lam": 1.0, "direction": torch.ones(3), "curvature": 1.0, "anchor_projection": 0.0}
        return ck.rank1_ewc_penalty(torch.ones(3), **{**arguments, **change})

    def samples(self, act: Callable[[ck.SampleGradients, Tensor], object], **options: Any) -> object:
        with ck.SampleGradients(self.model, **options) as gradients:
            return act(gradients, loss(self.model, batches()[0]))

    def state(self) -> list[Any]:
        moments = [value.clone() for state in self.optimizer.state.values() for value in state.values()]
        histories = [{k: v.clone() for k, v in h.state_dict().items()} for h in (self.history, self.diagonal)]
        hooks = [len(self.sgd._optimizer_step_pre_hooks), len(self.sgd._optimizer_step_post_hooks)]
        modes = [module.training for module in self.model.modules()]
        gradients = [p.grad.clone() for p in self.params if p.grad is not None]
        return [[p.detach().clone() for p in self.params], gradients, moments, histories, hooks, modes]


# (name, call, error, what its line contains)
CALLS: list[tuple[str, Call, type[Exception], str]] = [
    # The strength and the rates.
    ("lam=True", lambda s: s.history.penalty(True), TypeError, "lam is a bool; expected a float"),
    ("lam=numpy", lambda s: s.history.penalty(np.float32(2)), TypeError, "lam is a float32; expected a float"),
    ("lam=[1.0]", lambda s: s.diagonal.add_penalty_grad_([1.0]), TypeError, "lam is a list; expected a float"),
    ("lr=True", lambda s: s.history.decoupled_step_(1.0, True), TypeError, "lr is a bool"),
    ("lr=optimizer", lambda s: s.history.decoupled_step_(1.0, s.sgd), TypeError, "lr is a SGD; expected a float"),
    ("lr=get_last_lr()", lambda s: s.diagonal.decoupled_step_(1.0, [0.1]), TypeError, "optimizer.param_groups"),
    (
        "suggest_lam, swapped",
        lambda s: s.history.suggest_lam(300, 0.1),
        ValueError,
        "steps is 0.1; expected an integer",
    ),
    # Raw tensors.
    ("params=model", lambda s: ck.rank1_ewc_penalty(s.model, lam=1.0), TypeError, "params is a Sequential"),
    ("params=fisher", lambda s: ck.rank1_ewc_penalty(s.fisher, lam=1.0), TypeError, "params is a LowRankFisher"),
    ("direction=numpy", lambda s: s.raw(direction=np.ones(3)), TypeError, "direction is a ndarray"),
    ("curvature=True", lambda s: s.raw(curvature=True), TypeError, "curvature is a bool"),
    ("complex b", lambda s: s.raw(anchor_projection=torch.tensor(1j)), TypeError, "is a torch.complex64 tensor"),
    ("integer b", lambda s: s.raw(anchor_projection=torch.tensor(1)), TypeError, "is a torch.int64 tensor"),
    # Histories.
    ("model=class", lambda s: ck.LowRankHistory(nn.Linear), TypeError, "model is a type; expected a torch.nn.Module"),
    ("model=history", lambda s: ck.LowRankHistory(s.history), TypeError, "model is a LowRankHistory"),
    ("include=params", lambda s: ck.LowRankHistory(s.model, s.params), TypeError, "include has a Parameter; expected"),
    (
        "include=fisher",
        lambda s: ck.LowRankHistory(s.model, s.fisher),
        TypeError,
        "include is LowRankFisher(",
    ),
    ("decay=True", lambda s: ck.DiagonalHistory(s.model, decay=True), ValueError, "decay is True; expected 0 < decay"),
    ("max_terms=True", lambda s: ck.LowRankHistory(s.model, max_terms=True), ValueError, "max_terms is True; expected"),
    (
        "first_order=1",
        lambda s: ck.LowRankHistory(s.model, first_order=1),
        ValueError,
        "first_order is 1; expected True",
    ),
    ("append a list", lambda s: s.history.append([s.fisher]), TypeError, "fisher is a list; LowRankHistory takes a"),
    ("append a path", lambda s: s.history.append("task1.safetensors"), TypeError, "fisher is a str"),
    # Optimizers.
    ("attach a class", lambda s: s.history.attach(torch.optim.SGD, 1.0), TypeError, "optimizer is a type; expected a"),
    ("attach a model", lambda s: s.history.attach(s.model, 1.0), TypeError, "optimizer is a Sequential"),
    ("attach, swapped", lambda s: s.history.attach(1.0, s.sgd), TypeError, "lam is a SGD"),
    (
        "decoupled='no'",
        lambda s: s.history.attach(s.sgd, 1.0, decoupled="no"),
        ValueError,
        "decoupled is 'no'; expected",
    ),
    ("lam alone", lambda s: s.fused(lam=100.0), ValueError, "given without history, so no step would have a penalty"),
    ("decoupled alone", lambda s: s.fused(decoupled=True), ValueError, "given without history"),
    ("history alone", lambda s: s.fused(history=s.history), TypeError, "history is given without lam"),
    ("fused decoupled='no'", lambda s: s.fused(history=s.history, lam=1.0, decoupled="no"), ValueError, "decoupled is"),
    ("history=fisher", lambda s: s.fused(history=s.fisher, lam=1.0), TypeError, "history is a LowRankFisher"),
    ("lr=history", lambda s: ck.FusedAdamW(s.params, s.history), TypeError, "lr is a LowRankHistory; expected a float"),
    ("betas=0.9", lambda s: s.fused(betas=0.9), ValueError, "betas is 0.9; expected two numbers"),
    ("betas of text", lambda s: s.fused(betas=("0.9", "0.99")), ValueError, "betas is ('0.9', '0.99'); expected two"),
    (
        "verify_every=True",
        lambda s: s.fused(verify_every=True),
        ValueError,
        "verify_every is True; expected an integer",
    ),
    ("state of a history", lambda s: s.optimizer.load_state_dict(s.history.state_dict()), ValueError, "'param_groups'"),
    # Estimates.
    ("no loss", lambda s: s.estimate(None), TypeError, "per_sample_loss is None; expected a function (model, batch)"),
    ("a criterion", lambda s: s.estimate(nn.MSELoss()), TypeError, "per_sample_loss is MSELoss(); expected a function"),
    (
        "swapped",
        lambda s: ck.estimate_fisher(s.model, batches(), loss),
        TypeError,
        "per_sample_loss is a list; expected",
    ),
    ("complex loss", lambda s: s.estimate(lambda m, b: loss(m, b) * 1j), TypeError, "returned torch.complex64"),
    ("backward in the loss", lambda s: s.estimate(loss_with_backward), ValueError, "per_sample_loss calls backward()"),
    ("diagonal, the same", lambda s: s.estimate(loss_with_backward, kind="diagonal"), ValueError, "calls backward()"),
    ("rank=True", lambda s: s.estimate(rank=True), ValueError, "rank is True; expected an integer >= 1"),
    (
        "max_samples=2.5",
        lambda s: s.estimate(max_samples=2.5),
        ValueError,
        "max_samples is 2.5; expected an integer >= 2",
    ),
    ("max_samples='9'", lambda s: s.estimate(max_samples="9"), ValueError, "max_samples is '9'; expected an integer"),
    ("generator=0", lambda s: s.estimate(generator=0), TypeError, "generator is 0; expected a torch.Generator"),
    ("storage_dtype=text", lambda s: s.estimate(storage_dtype="bfloat16"), TypeError, "storage_dtype is 'bfloat16'"),
    ("unbiased=None", lambda s: s.estimate(unbiased=None), ValueError, "unbiased is None; expected True or False"),
    (
        "mixed_losses='no'",
        lambda s: s.estimate(mixed_losses="no"),
        ValueError,
        "mixed_losses is 'no'; expected True or",
    ),
    (
        "a list of ints",
        lambda s: s.estimate(loader=[1, 2, 3]),
        ValueError,
        "batch, a int, has no common first dimension",
    ),
    ("the DataLoader class", lambda s: s.estimate(loader=torch.utils.data.DataLoader), TypeError, "loader is <class"),
    # Diagnoses.
    ("samples=64.5", lambda s: s.diagnose(samples=64.5), ValueError, "samples is 64.5; expected an integer >= 48"),
    ("timesteps=5", lambda s: s.diagnose(timesteps=5), TypeError, "timesteps is 5; expected a list of integers"),
    ("num_timesteps=0", lambda s: s.diagnose(num_timesteps=0), ValueError, "num_timesteps is 0; expected an integer"),
    ("snr=1.0", lambda s: s.diagnose(snr=1.0), TypeError, "snr is 1.0; expected a function of a timestep"),
    (
        "diagnose generator=0",
        lambda s: s.diagnose(generator=0),
        TypeError,
        "generator is 0; expected a torch.Generator",
    ),
    (
        "progress=True",
        lambda s: s.diagnose(progress=True),
        TypeError,
        "progress is True; expected a function of a line",
    ),
    ("its criterion", lambda s: ck.diagnose(s.model, nn.MSELoss(), batches()), TypeError, "(model, batch, t) -> (N,)"),
    # Per-sample gradients.
    ("gram='mean'", lambda s: ck.SampleGradients(s.model, None, "mean"), ValueError, "gram is 'mean'; expected True"),
    ("direction=history", lambda s: ck.SampleGradients(s.model, s.history), TypeError, "direction is a LowRankHistory"),
    ("complex losses", lambda s: s.samples(lambda sg, x: sg.backward(x * 1j)), TypeError, "losses is torch.complex64"),
    ("read too early", lambda s: s.samples(lambda sg, x: sg.mean), AttributeError, "mean is there after the Sample"),
    ("a name of none", lambda s: ck.SampleGradients(s.model).means, AttributeError, "has no attribute 'means'"),
    # Files.
    (
        "load, swapped",
        lambda s: ck.LowRankHistory.load(s.model, "x"),
        TypeError,
        "path is a Sequential; expected a str",
    ),
    ("load None", lambda s: ck.load_fisher(None), TypeError, "path is a NoneType; expected a str"),
    ("load an empty file", lambda s: ck.load_fisher(s.folder / "empty"), ValueError, "is not a safetensors file"),
    ("save into a folder", lambda s: s.history.save(s.folder), IsADirectoryError, "is a folder; expected a file"),
    ("save ''", lambda s: s.fisher.save(""), IsADirectoryError, "path '' is a folder; expected a file"),
    ("save ~", lambda s: s.diagonal.save("~/h.safetensors"), FileNotFoundError, "write os.path.expanduser(path)"),
    ("save at no path", lambda s: s.history.save(3), TypeError, "path is a int; expected a str"),
    (
        "load itself",
        lambda s: s.history.load_state_dict(s.history),
        TypeError,
        "the state is a LowRankHistory; expected",
    ),
    ("c='1'", lambda s: ck.LowRankFisher.from_mean_gradient(s.ones, "1", s.anchor), TypeError, "c is '1'; expected a"),
]


@pytest.mark.parametrize(("call", "error", "words"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_a_wrong_call_is_one_line_and_changes_nothing(
    call: Call, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    scene = Scene(tmp_path)
    before = scene.state()
    with pytest.raises(error) as raised:
        call(scene)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    torch.testing.assert_close(scene.state(), before, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("kind", [ck.LowRankHistory, ck.DiagonalHistory])
def test_a_history_without_tasks_has_no_penalty(kind: type[ck.LowRankHistory]) -> None:
    model = network()
    history, before = kind(model), [p.detach().clone() for p in model.parameters()]
    assert float(history.penalty(3.0)) == float(history.add_penalty_grad_(3.0)) == 0.0
    history.decoupled_step_(3.0, 0.1)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", [ck.LowRankHistory, ck.DiagonalHistory])
@pytest.mark.parametrize("act", ["append", "load", "load_state_dict", "nothing"])
def test_what_was_made_in_inference_mode_has_a_differentiable_penalty(
    kind: type[ck.LowRankHistory], act: str, tmp_path: Path
) -> None:
    scene = Scene(tmp_path)
    model, ordinary = scene.model, scene.history if kind is ck.LowRankHistory else scene.diagonal
    ordinary.save(tmp_path / "h")
    with torch.inference_mode():
        history = kind.load(tmp_path / "h", model) if act == "load" else kind(model)
        ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        anchor = {name: p.clone() for name, p in model.named_parameters()}
        fisher = (
            ck.LowRankFisher.from_mean_gradient(ones, 1.0, anchor)
            if kind is ck.LowRankHistory
            else ck.DiagonalFisher(ones, anchor)
        )
        if act == "append":
            history.append(fisher)
        if act == "load_state_dict":
            history.load_state_dict({name: tensor.clone() for name, tensor in ordinary.state_dict().items()})
    if act == "nothing":
        history.append(fisher)
    with torch.no_grad():
        model[0].weight += 1
    results = []
    for one in (history, ordinary):
        model.zero_grad()
        one.penalty(2.0).backward()
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert math.isfinite(float(results[0][0].sum()))
    assert bool(results[0][0].any())
