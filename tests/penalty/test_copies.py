"""Copies and pickles of histories and optimizers: together with the model they belong to the copied model, alone they
say that they have none."""

import copy
import io
import pickle

import pytest
import torch
from helpers.past_tasks import KINDS, MODES, flat, history_of, train
from torch import Tensor, nn

import crl_kernels as ck

LAM = 1.5
ALONE = r"copied or unpickled without its model, .* copy.deepcopy\(\(model, history, optimizer\)\).* history.rebind"


class Network(nn.Module):
    """Two layers that share a weight, and a circle of modules, which only the garbage collector takes away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.root = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return Network().to(dtype)


def saved(objects):
    buffer = io.BytesIO()
    torch.save(objects, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda objects: pickle.loads(pickle.dumps(objects)),
    "torch.save": saved,
}
COPIES = pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])


@pytest.mark.parametrize("copier", COPIERS)
@KINDS
@MODES
def test_a_fused_optimizer_copied_with_its_model_continues_as_the_original(copier, kind, decoupled):
    dtype = torch.bfloat16 if copier == "pickle" else torch.float64  # with master copies
    model = network(dtype)
    optimizer = ck.FusedAdamW(
        model.parameters(), lr=1e-2, history=history_of(model, kind), lam=LAM, decoupled=decoupled, verify_every=7
    )
    train(model, optimizer, range(5))
    other, copied = COPIERS[copier]((model, optimizer))
    start, value = flat(model), optimizer.last_penalty.clone()
    end = train(other, copied, range(5, 12))
    assert torch.equal(flat(model), start)
    assert torch.equal(optimizer.last_penalty, value)
    assert torch.equal(train(model, optimizer, range(5, 12)), end)
    assert torch.equal(optimizer.last_penalty, copied.last_penalty)
    assert all(p is q for p, q in zip(copied.history._binding.params, other.parameters(), strict=True))
    assert copied.lam == LAM

    free = network(dtype)
    assert float((train(free, ck.FusedAdamW(free.parameters(), lr=1e-2), range(12)) - end).norm()) > 1e-2


@COPIES
@MODES
@pytest.mark.parametrize("order", ["model first", "history first", "optimizer first", "no history"])
def test_an_attached_optimizer_copied_with_its_model_is_attached_to_the_copied_history(copier, decoupled, order):
    model = network()
    history = history_of(model, "diagonal" if order == "history first" else "low_rank")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history.attach(optimizer, torch.tensor(LAM, dtype=torch.float64), decoupled=decoupled)
    train(model, optimizer, range(5))
    everything = {"model": model, "history": history, "optimizer": optimizer}
    first = order.removesuffix(" first")
    if order == "no history":
        del everything["history"]
    else:
        everything = {first: everything[first], **everything}
    copied = COPIERS[copier](everything)
    start = flat(model)
    end = train(copied["model"], copied["optimizer"], range(5, 10))
    assert torch.equal(flat(model), start)
    again = COPIERS[copier](copied)  # a copy's copy has it, too
    assert torch.equal(train(again["model"], again["optimizer"], range(10, 15)), train(model, optimizer, range(5, 15)))
    assert float((end - start).norm()) > 1e-2
    if order != "no history":
        copied["history"].detach()
        with pytest.raises(RuntimeError, match="not attached"):
            copied["history"].detach()
        copied["optimizer"].zero_grad()
        end = flat(copied["model"])
        copied["optimizer"].step()
        assert torch.equal(flat(copied["model"]), end)
        history.detach()


@COPIES
@KINDS
def test_a_history_copied_with_its_model_stays_with_the_copy(copier, kind):
    model = network()
    history = history_of(model, kind)
    for order in (("history", "model"), ("model", "history")):
        copied = COPIERS[copier]({name: {"history": history, "model": model}[name] for name in order})
        other, beside = copied["model"], copied["history"]
        with torch.no_grad():
            other.first.weight.add_(0.5)
        beside.add_penalty_grad_(LAM)
        assert all(p.grad is None for p in model.parameters())
        reference = history_of(other, kind)
        assert float(beside.penalty(LAM).detach()) == float(reference.penalty(LAM).detach())
        (gradient,) = torch.autograd.grad(reference.penalty(LAM), other.first.weight)
        torch.testing.assert_close(other.first.weight.grad, gradient)
        assert float(beside.penalty(LAM).detach()) != float(history.penalty(LAM).detach())
        state, given = beside.state_dict(), history.state_dict()
        assert all(torch.equal(state[name], given[name]) for name in given)
        beside.append(fisher_like(beside, kind))
        assert len(history) == 2
        assert len(beside) == 3


def fisher_like(history, kind: str):
    parts = {name: torch.ones(shape) for name, shape in zip(history.names, history._binding.layout.shapes, strict=True)}
    if kind == "diagonal":
        return ck.DiagonalFisher(parts, parts)
    return ck.LowRankFisher.from_mean_gradient(parts, 1.0, parts, storage_dtype=torch.int8 if kind == "int8" else None)


@pytest.mark.filterwarnings("ignore:the penalty is stiff:UserWarning")
@COPIES
@KINDS
@MODES
def test_a_copy_without_its_model_raises_until_it_is_bound_again(copier, kind, decoupled):
    model = network()
    history = history_of(model, kind)
    alone = COPIERS[copier](history)
    uses = [
        lambda: alone.penalty(LAM),
        lambda: alone.add_penalty_grad_(LAM),
        lambda: alone.decoupled_step_(LAM, 0.1),
        lambda: alone.attach(torch.optim.SGD(model.parameters(), lr=0.1), LAM, decoupled=decoupled),
        lambda: ck.FusedAdamW(model.parameters(), history=alone, lam=LAM, decoupled=decoupled),
        lambda: COPIERS[copier](alone).penalty(LAM),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=ALONE):
            use()
    assert all(p.grad is None for p in model.parameters())
    alone.append(fisher_like(alone, kind))  # needs no parameter
    history.append(fisher_like(history, kind))
    alone.rebind(model)
    assert float(alone.penalty(LAM).detach()) == float(history.penalty(LAM).detach())

    for optimizer in (
        ck.FusedAdamW(model.parameters(), history=history, lam=LAM, decoupled=decoupled),
        torch.optim.SGD(model.parameters(), lr=0.1),
    ):
        if not isinstance(optimizer, ck.FusedAdamW):
            history.attach(optimizer, LAM, decoupled=decoupled)
        copied = COPIERS[copier](optimizer)
        before = [p.detach().clone() for p in copied.param_groups[0]["params"]]
        with pytest.raises(RuntimeError, match=ALONE):
            copied.step()
        assert all(map(torch.equal, before, copied.param_groups[0]["params"]))


@COPIES
def test_an_optimizer_without_a_history_copies_as_torchs(copier):
    ends = []
    for make in (torch.optim.AdamW, ck.FusedAdamW):
        model = network()
        optimizer = make(model.parameters(), lr=torch.tensor(1e-2, dtype=torch.float64))
        train(model, optimizer, range(5))
        other, copied = COPIERS[copier]((model, optimizer))
        ends.append(train(other, copied, range(5, 10)))
        alone = COPIERS[copier](optimizer)
        alone.step()  # on parameters of its own, as torch's
        assert alone.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=1e-14)


@KINDS
def test_a_shallow_copy_shares_the_parameters(kind):
    model = network()
    history = history_of(model, kind)
    optimizer = ck.FusedAdamW(model.parameters(), lr=1e-2, history=history, lam=LAM)
    reference = copy.deepcopy((model, optimizer))
    end = train(*reference, range(6))
    shallow = copy.copy(optimizer)
    assert shallow.history is history
    train(model, optimizer, range(3))
    assert torch.equal(train(model, shallow, range(3, 6)), end)

    beside = copy.copy(history)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    history.attach(sgd, LAM)
    with pytest.raises(RuntimeError, match="not attached"):
        copy.copy(history).detach()
    beside.append(fisher_like(beside, kind))
    assert len(history) == 2
    assert float(beside.penalty(LAM).detach()) > float(history.penalty(LAM).detach())
    copied = copy.copy(sgd)
    model.zero_grad()
    before = flat(model)
    copied.step()
    after = flat(model)
    assert not torch.equal(after, before)
    history.detach()
    model.zero_grad()
    for optimizer in (copied, sgd, copy.deepcopy((model, sgd))[1]):
        optimizer.step()
    assert torch.equal(flat(model), after)


def test_a_copied_optimizer_has_no_hooks_of_others_and_keeps_new_ones():
    """torch drops hooks of copies; those that are registered with a copy do not take the penalty's place."""
    model = network()
    history = history_of(model, "low_rank")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *arguments: called.append("original"))
    history.attach(optimizer, LAM)
    other, beside, copied = copy.deepcopy((model, history, optimizer))
    for i in range(200):
        copied.register_step_pre_hook(lambda *arguments, i=i: called.append(i))
    before = flat(other)
    copied.step()
    assert called == list(range(200))
    assert not torch.equal(flat(other), before)
    beside.detach()
    beside.attach(copied, LAM)
    beside.detach()


def test_parameters_that_were_frozen_or_renamed_by_wrappers_stay_bound():
    model = network()
    history = history_of(model, "low_rank")
    model.first.bias.requires_grad_(False)
    wrapped = nn.Sequential(model)
    copied, beside = copy.deepcopy((wrapped, history))
    assert float(beside.penalty(LAM).detach()) == float(history.penalty(LAM).detach())
    assert beside.names == history.names

    copied, beside = copy.deepcopy((model, history))
    copied.first = nn.Linear(6, 6, bias=False)
    with pytest.raises(ValueError, match=r"has lost 'first.bias' since. Call history.rebind\(model\)"):
        beside.penalty(LAM)
    copied, beside = copy.deepcopy((model, history))
    copied.second.bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"'second.bias' has shape \(7,\) now and had \(6,\)"):
        beside.penalty(LAM)


def test_a_history_that_is_an_attribute_of_its_model_is_copied_with_it():
    model = network()
    model.history = history_of(model, "diagonal")
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.history.attach(model.optimizer, LAM)
    for copied_by in COPIERS.values():
        copied = copied_by(model)
        copied.history.add_penalty_grad_(LAM)
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is not None for p in copied.parameters())
        copied.zero_grad()
        before = flat(copied)
        copied.optimizer.step()
        assert not torch.equal(flat(copied), before)
        copied.history.detach()


def test_a_copied_history_writes_into_the_flat_buffer_of_its_own_model():
    """A history remembers where the original's parameters lie; that holds for no copy."""
    model = network()
    ck.flatten_parameters(model)
    history = history_of(model, "low_rank")
    history.add_penalty_grad_(LAM)
    copied, beside = copy.deepcopy((model, history))
    ck.flatten_parameters(copied)
    copied.zero_grad(set_to_none=False)
    beside.add_penalty_grad_(LAM)
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_sharded_histories_are_not_copied(monkeypatch):
    history = history_of(network(), "low_rank")
    monkeypatch.setattr(history._binding.shards, "unsharded", False)
    with pytest.raises(TypeError, match=r"sharded parameters cannot be copied or pickled. Save it with history.save"):
        copy.deepcopy(history)
