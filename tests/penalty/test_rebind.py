"""A history follows its model: rebound to new parameter objects, and to a class embedding that has got more rows."""

import pytest
import torch
from helpers import device
from helpers.past_tasks import HISTORIES, KINDS, history_of, random_fisher, trainable
from torch import Tensor, nn

import crl_kernels as ck

LAM = 1.5


class Conditional(nn.Module):
    """A network with one embedding for each class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3, dtype=torch.float64)
        self.embed = nn.Embedding(classes, 3, dtype=torch.float64)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.net(x) + self.embed(label)


def grow(model: Conditional, classes: int) -> None:
    old = model.embed
    model.embed = nn.Embedding(classes, 3, dtype=torch.float64)
    with torch.no_grad():
        model.embed.weight[: old.num_embeddings] = old.weight


@KINDS
def test_old_terms_keep_their_meaning_and_new_rows_are_free(kind):
    model = Conditional(3)
    history = history_of(model, kind, tasks=1)
    before = history.penalty(LAM).item()
    history.add_penalty_grad_(LAM)
    gradients = [p.grad.clone() for p in model.parameters()]

    grow(model, 5)
    history.rebind(model, grown=["embed.weight"])
    with torch.no_grad():
        model.embed.weight[3:] = torch.randn(2, 3, dtype=torch.float64) * 100
    assert history.penalty(LAM).item() == pytest.approx(before, rel=1e-12)
    model.zero_grad()
    history.add_penalty_grad_(LAM)
    *others, embedding = [p.grad for p in model.parameters()]
    for gradient, expected in zip([*others, embedding[:3]], gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(embedding[3:], torch.zeros(2, 3, dtype=torch.float64))

    new = model.embed.weight[3:].detach().clone()
    history.decoupled_step_(float("inf"), 0.1)
    assert torch.equal(model.embed.weight[3:], new)


@KINDS
def test_a_later_task_has_rows_of_its_own(kind):
    """Two tasks of a model that has grown are the sum of both penalties, written out."""
    model = Conditional(3)
    history = history_of(model, kind, tasks=1)
    first = history.penalty(LAM).item()
    grow(model, 5)
    history.rebind(model, grown=["embed"])
    history.append(random_fisher(trainable(model), kind, 2))
    second = HISTORIES[kind](model)
    second.append(random_fisher(trainable(model), kind, 2))
    expected = first + second.penalty(LAM).item()
    assert history.penalty(LAM).item() == pytest.approx(expected, rel=1e-5 if kind == "diagonal" else 1e-12)


@KINDS
def test_a_file_from_before_loads_into_the_grown_model(kind, tmp_path):
    model = Conditional(3)
    history = history_of(model, kind, tasks=1)
    history.save(tmp_path / "history.safetensors")
    value = history.penalty(LAM).item()
    grow(model, 4)
    cls = type(history)
    assert cls.load(tmp_path / "history.safetensors", model, grown=["embed.*"]).penalty(LAM).item() == pytest.approx(
        value
    )
    with pytest.raises(ValueError, match=r"'embed.weight' has shape \(3, 3\) in the file .* and \(4, 3\) in the model"):
        cls.load(tmp_path / "history.safetensors", model)


def test_rebinding_keeps_options_and_follows_other_parameter_objects():
    model = Conditional(3)
    history = ck.LowRankHistory(model, exclude=["net.bias"], decay=0.5)
    mu = {n: torch.randn_like(p) for n, p in model.named_parameters() if n != "net.bias"}
    history.append(ck.LowRankFisher.from_mean_gradient(mu, 0.02, {n: torch.zeros_like(g) for n, g in mu.items()}))
    drift, successor = history.drift(), Conditional(3)
    successor.load_state_dict(model.state_dict())
    history.rebind(successor)
    assert history.names == ("net.weight", "embed.weight")
    torch.testing.assert_close(history.drift(), drift, rtol=1e-12, atol=0)
    curvature = float(history.curvatures[0])
    history.append(ck.LowRankFisher.from_mean_gradient(mu, 0.02, {n: torch.zeros_like(g) for n, g in mu.items()}))
    assert float(history.curvatures[0]) == 0.5 * curvature
    history.rebind(successor.to(device.here()))


@pytest.mark.parametrize(
    ("grown", "classes", "message"),
    [
        (["embed.weight"], 2, r"'embed.weight' has shape \(3, 3\) in the history and \(2, 3\) in the model"),
        ([], 4, r"'embed.weight' has shape \(3, 3\) in the history and \(4, 3\) in the model"),
        (["head"], 4, "grown pattern 'head' matches none of the model's parameters: 'net.weight'"),
        ("embed.weight", 4, "grown is the string 'embed.weight'; expected a list of patterns"),
    ],
)
def test_models_that_do_not_fit_are_refused_and_nothing_changes(grown, classes, message):
    model = Conditional(3)
    history = history_of(model, "low_rank", tasks=1)
    value, resized = history.penalty(LAM).item(), Conditional(classes)
    with pytest.raises((TypeError, ValueError), match=message):
        history.rebind(resized, grown=grown)
    assert history.penalty(LAM).item() == value


def test_a_resized_model_is_pointed_to_rebind():
    model = Conditional(3)
    history = history_of(model, "low_rank", tasks=1)
    grow(model, 4)
    with pytest.raises(ValueError, match=r"history.rebind\(model\)"):
        history.penalty(LAM)
    history.rebind(model, grown=["embed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history.attach(optimizer, LAM)
    with pytest.raises(RuntimeError, match="attached to an optimizer; call detach"):
        history.rebind(model)


def test_wrapping_a_module_changes_nothing_and_replacing_it_is_noticed():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 2)).double()
    history = history_of(model, "low_rank", tasks=1)
    value = history.penalty(LAM).item()
    model[0] = nn.Sequential(model[0])  # as activation checkpointing wraps it
    assert history.penalty(LAM).item() == value
    inner = model[0][0]
    model[0] = nn.Sequential(nn.Sequential(nn.Linear(3, 3).double()))
    with pytest.raises(ValueError, match=r"parameter '0\.0\.weight' is no longer the object"):
        history.add_penalty_grad_(LAM)
    assert model[1].weight.grad is None
    model[0] = inner
    assert history.penalty(LAM).item() == value
