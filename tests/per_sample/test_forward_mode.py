"""Projections in forward mode, against per-sample gradients."""

import pytest
import torch
from torch import Tensor, nn

import crl_kernels as ck


class Net(nn.Module):
    """With the trap: scaled_dot_product_attention's fast kernels have no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).transpose(1, 2)
        return self.last(self.norm(h + self.attention(h, h, h, need_weights=False)[0]))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x + 0.1 * torch.randn_like(x)) - 0.2).square().flatten(1).mean(1)


@pytest.fixture
def model() -> Net:
    return Net().double()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def directions(model: nn.Module, *leading: int) -> dict[str, Tensor]:
    return {name: torch.randn(*leading, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}


@pytest.mark.parametrize("leading", [(), (1,), (3,)])
def test_equals_the_projections_of_one_backward_pass(model, batch, leading):
    u = directions(model, *leading)
    del u["last.bias"]  # counts as zero
    state = torch.get_rng_state()
    projections = ck.jvp_projections(model, loss, batch, u)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with ck.SampleGradients(model, u) as sg:
        loss(model, batch).sum().backward()
    torch.testing.assert_close(projections, sg.projections, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)  # random numbers are drawn once
    assert not projections.requires_grad


def test_the_model_is_left_as_it_is(model, batch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ck.jvp_projections(model, loss, batch, directions(model))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_some_parameters_only(model, batch):
    u = {"last.bias": torch.ones(3, dtype=torch.float64)}
    projections = ck.jvp_projections(model, loss, batch, u, include=["last"])
    assert projections.shape == (5,)
    with pytest.raises(ValueError, match=r"direction has 'last\.bias', which are not among"):
        ck.jvp_projections(model, loss, batch, u, exclude=["last"])


def test_bad_losses(model, batch):
    with pytest.raises(ValueError, match=r"per_sample_loss returned shape \(\) for a batch of 5"):
        ck.jvp_projections(model, lambda m, x: loss(m, x).mean(), batch, directions(model))
