"""Opacus and BackPACK beside our per-sample gradients, in float64: equal where they are right, and where they are not,
what they do instead, each fact pinned by a test that fails once a peer has repaired it.

Every case is held to a loop of single-sample backward passes; the peers' own material is in test_peer_material.py,
other peers' Fishers are in test_peer_fishers.py. The peers: ``pip install crl-kernels[peers]``.
"""

import copy
import warnings

import pytest
import torch
from helpers.by_loop import flat, rows_of_single_samples
from helpers.peers import peer
from torch import Tensor, nn

from crl_kernels.per_sample.sample_gradients import SampleGradients

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own, about hooks and layers that they do not know
SAMPLES = 3


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.attention(h, h, h, need_weights=False)[0]


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * self.layer(x) * y


def image(channels: int = 4) -> tuple[int, ...]:
    return (channels, 6, 6)


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


# name -> (model, shape of one input)
CASES = {
    "linear": (two_linears, (4,)),
    "linear, tokens": (two_linears, (6, 4)),
    "linear, rows of tokens": (two_linears, (3, 6, 4)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3)),
        image(),
    ),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), image()),
    "circular padding": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), image()),
    "padding same": (lambda: nn.Conv2d(4, 4, 3, padding="same"), image()),
    "GroupNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 1)),
        image(),
    ),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), (4,)),
    "tied weights": (TiedWeights, (4,)),
    "called twice": (CalledTwice, (4,)),
    "MultiheadAttention": (SelfAttention, (5, 4)),
}


def case(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[name]
    return make().double(), torch.randn(SAMPLES, *shape, dtype=torch.float64)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def truth(model: nn.Module, x: Tensor) -> Tensor:
    return flat(rows_of_single_samples(model, losses, (x,))).square().sum(1)


def ours(model: nn.Module, x: Tensor) -> Tensor:
    with SampleGradients(model) as sg:
        losses(model, x).sum().backward()
    return sg.sq_norms


def opacus_hooks(model: nn.Module, x: Tensor) -> Tensor:
    wrapped = peer("opacus").GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    losses(wrapped, x).sum().backward()
    return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in wrapped.parameters()]).sum(0)


def ghost(model: nn.Module) -> nn.Module:
    fast_clipping = peer("opacus.grad_sample").GradSampleModuleFastGradientClipping
    return fast_clipping(copy.deepcopy(model), loss_reduction="sum")


def opacus_ghost(model: nn.Module, x: Tensor) -> Tensor:
    wrapped = ghost(model)
    losses(wrapped, x).sum().backward()
    return wrapped.get_norm_sample().square()


def extended(model: nn.Module, x: Tensor, quantity: str) -> tuple[list[Tensor], list[str]]:
    """(BackPACK's square norms, parameter by parameter; the names of those that it left out)"""
    backpack, extensions = peer("backpack"), peer("backpack.extensions")
    field = {"BatchL2Grad": "batch_l2", "BatchGrad": "grad_batch"}[quantity]
    model = backpack.extend(copy.deepcopy(model))
    with backpack.backpack(getattr(extensions, quantity)()):
        losses(model, x).sum().backward()
    values = [getattr(p, field) for p in model.parameters() if hasattr(p, field)]
    left_out = [name for name, p in model.named_parameters() if not hasattr(p, field)]
    return [v if quantity == "BatchL2Grad" else v.flatten(1).square().sum(1) for v in values], left_out


def backpack_l2(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack(extended(model, x, "BatchL2Grad")[0]).sum(0)


def backpack_batch(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack(extended(model, x, "BatchGrad")[0]).sum(0)


def assert_right(norms: Tensor, model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(norms, truth(model, x), rtol=1e-8, atol=0)


def assert_wrong(norms: Tensor, model: nn.Module, x: Tensor) -> None:
    """By more than 1 % for every sample."""
    ratios = norms / truth(model, x)
    assert ((ratios - 1).abs() > 0.01).all(), ratios


@pytest.mark.parametrize("name", CASES)
def test_ours(name):
    model, x = case(name)
    assert_right(ours(model, x), model, x)


WRONG_IN_OPACUS = {"circular padding", "MultiheadAttention"}
WRONG_IN_BATCH_GRAD = {
    *("circular padding", "padding same", "GroupNorm", "LayerNorm"),
    *("tied weights", "called twice", "MultiheadAttention"),
}
WRONG = {
    opacus_hooks: WRONG_IN_OPACUS,
    opacus_ghost: WRONG_IN_OPACUS | {"linear, rows of tokens", "tied weights", "called twice"},
    backpack_batch: WRONG_IN_BATCH_GRAD,
    backpack_l2: WRONG_IN_BATCH_GRAD | {"groups"},
}


@pytest.mark.parametrize(
    ("norms", "name"), [(norms, name) for norms, wrong in WRONG.items() for name in CASES if name not in wrong]
)
def test_norms_of_peers_agree(norms, name):
    model, x = case(name)
    assert_right(norms(model, x), model, x)


@pytest.mark.parametrize("norms", [opacus_hooks, opacus_ghost])
def test_opacus_pads_circular_convolutions_with_zeros(norms):
    model, x = case("circular padding")
    assert_wrong(norms(model, x), model, x)


@pytest.mark.parametrize("norms", [opacus_hooks, opacus_ghost])
def test_opacus_fails_on_multihead_attention(norms):
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'key' and 'value'"):
        norms(*case("MultiheadAttention"))


def test_opacus_fails_on_a_parameter_of_a_root_with_two_inputs():
    """Because it then runs the whole model through functorch, on the first input alone."""
    grad_sample_module = peer("opacus").GradSampleModule
    model = OwnParameter().double()
    x, y = torch.randn(2, SAMPLES, 4, dtype=torch.float64)
    with SampleGradients(model) as sg:
        model(x, y).sum().backward()
    assert (sg.sq_norms > 0).all()
    for wrapped in (grad_sample_module(copy.deepcopy(model), loss_reduction="sum"), ghost(model)):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
            wrapped(x, y).sum().backward()


@pytest.mark.parametrize("name", ["tied weights", "called twice"])
def test_opacus_ghost_norms_refuse_a_weight_used_twice(name):
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported"):
        opacus_ghost(*case(name))


def test_opacus_ghost_norms_of_a_linear_layer_on_rows_of_tokens_are_stale():
    """None at first; after any batch of another shape, the norms of that batch, silently."""
    model, x = case("linear, rows of tokens")
    with pytest.raises(AttributeError, match="_norm_sample"):
        opacus_ghost(model, x)
    wrapped = ghost(model)
    losses(wrapped, x[:, 0, 0]).sum().backward()
    before = wrapped.get_norm_sample().clone()
    losses(wrapped, x).sum().backward()
    assert torch.equal(wrapped.get_norm_sample(), before)
    assert_wrong(before.square(), model, x)


@pytest.mark.parametrize("norms", [backpack_l2, backpack_batch])
@pytest.mark.parametrize("name", ["circular padding", "tied weights"])
def test_backpack_is_silently_wrong(name, norms):
    """Circular padding is taken for zeros, and of a weight's two uses only one is seen."""
    model, x = case(name)
    assert_wrong(norms(model, x), model, x)


def test_backpack_l2_counts_products_across_groups():
    """Of a convolution with two groups; without a bias, whose norms are right."""
    model = nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    x = torch.randn(SAMPLES, *image(), dtype=torch.float64)
    ratios = backpack_l2(model, x) / truth(model, x)
    assert (ratios > 1.3).all(), ratios
    assert_right(backpack_batch(model, x), model, x)


def test_backpack_and_padding_same():
    """BatchGrad is silently wrong, BatchL2Grad fails."""
    model, x = case("padding same")
    assert_wrong(backpack_batch(model, x), model, x)
    with pytest.raises(TypeError, match="im2col"):
        backpack_l2(model, x)


@pytest.mark.parametrize("quantity", ["BatchL2Grad", "BatchGrad"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("GroupNorm", ["1.weight", "1.bias"]),
        ("LayerNorm", ["1.weight", "1.bias"]),
        (
            "MultiheadAttention",
            [f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")],
        ),
    ],
)
def test_backpack_leaves_layers_out(name, missing, quantity):
    """After a warning; what it does compute is right."""
    model, x = case(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norms, left_out = extended(model, x, quantity)
    assert left_out == missing
    assert any("does not have an extension" in str(warning.message) for warning in caught)
    for name_ in left_out:
        model.get_parameter(name_).requires_grad_(False)
    expected = [rows.flatten(1).square().sum(1) for rows in rows_of_single_samples(model, losses, (x,)).values()]
    torch.testing.assert_close(norms, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("norms", [backpack_l2, backpack_batch])
def test_backpack_fails_on_a_module_called_twice(norms):
    with pytest.raises(AttributeError, match="no attribute 'output'"):
        norms(*case("called twice"))
