"""Parameters in one buffer (flatten_parameters): the same numbers, and broken views are noticed."""

import copy

import pytest
import torch
from helpers.histories import fisher_of, flatten, small_network, value_and_gradient
from helpers.past_tasks import flat, random_like, trainable
from torch import Tensor, nn

import crl_kernels as ck


def histories(model: nn.Module) -> list[ck.LowRankHistory | ck.DiagonalHistory]:
    low_rank, diagonal = ck.LowRankHistory(model), ck.DiagonalHistory(model)
    for seed in range(2):
        low_rank.append(fisher_of(model, seed))
        squares = {n: g**2 for n, g in random_like(trainable(model), seed).items()}
        diagonal.append(ck.DiagonalFisher(squares, random_like(trainable(model), 50 + seed)))
    return [low_rank, diagonal]


def steps(model: nn.Module, zero_to_none: bool) -> Tensor:
    """A few steps of everything that writes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    low_rank, diagonal = histories(model)
    for step in range(4):
        optimizer.zero_grad(set_to_none=zero_to_none)
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x.to(next(model.parameters()))).square().mean().backward()
        values = [history.add_penalty_grad_(0.1) for history in (low_rank, diagonal)]
        optimizer.step()
        for history in (low_rank, diagonal):
            history.decoupled_step_(0.1, 0.1)
    return torch.cat([flat(model), torch.stack(values), low_rank.drift()])


@pytest.mark.parametrize("zero_to_none", [False, True])
def test_one_buffer_gives_the_same_numbers_bit_for_bit(zero_to_none):
    plain, flattened = small_network(), small_network()
    theta, gradient = ck.flatten_parameters(flattened)
    assert torch.equal(flat(flattened), theta)
    assert torch.equal(steps(plain, zero_to_none), steps(flattened, zero_to_none))
    assert torch.equal(flat(flattened), theta)  # still views
    assert torch.equal(flatten(p.grad for p in flattened.parameters()), gradient) == (not zero_to_none)


def test_kernels_get_one_buffer():
    model = small_network()
    history = histories(model)[0]
    assert len(history._run_or_list(list(model.parameters()))) == len(list(model.parameters()))
    theta, _ = ck.flatten_parameters(model)
    (run,) = history._run_or_list(list(model.parameters()))
    assert run.data_ptr() == theta.data_ptr()
    assert run.shape == theta.shape


def test_state_dicts_and_optimizers_work_on_one_buffer():
    model, second = small_network(), small_network(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    theta, gradient = ck.flatten_parameters(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    model.load_state_dict(second.state_dict())
    assert torch.equal(theta, flat(second))
    assert list(model.state_dict()) == list(second.state_dict())
    for net in (model, second):
        net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(gradient, flatten(p.grad for p in second.parameters()))
    before = theta.clone()
    optimizer.step()
    assert not torch.equal(theta, before)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model: model.half(),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda model: setattr(model[3].bias, "data", torch.zeros(4, dtype=torch.float64)),
        lambda model: setattr(model[2].weight, "data", model[2].weight.data.t().contiguous().t()),
        copy.deepcopy,
    ],
    ids=["half", "first", "last", "other strides", "deepcopy"],
)
def test_views_that_were_broken_are_noticed(leave):
    model = small_network()
    ck.flatten_parameters(model)
    model = leave(model) or model
    low_rank, _ = histories(model)
    plain = small_network()
    plain.load_state_dict(model.state_dict())
    plain.to(next(model.parameters()).dtype)
    assert len(low_rank._run_or_list(list(model.parameters()))) > 1
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-3} if next(model.parameters()).dtype == torch.half else {"rtol": 1e-12, "atol": 0}
    )
    torch.testing.assert_close(low_rank.penalty(1.0), histories(plain)[0].penalty(1.0), **tolerance)


def test_a_square_view_that_was_transposed_is_not_read_in_the_old_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    history = ck.LowRankHistory(model)
    history.append(fisher_of(model, 1))
    ck.flatten_parameters(model)
    history.add_penalty_grad_(1.0)  # the run is known now
    model[0].weight.data = model[0].weight.data.t()
    value, _ = value_and_gradient(history, model, 1.0)
    torch.testing.assert_close(history.add_penalty_grad_(1.0), value, rtol=1e-12, atol=0)


def test_empty_and_shared_parameters_in_one_buffer():
    model = small_network()
    model.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    model.again = model[0]
    theta, _ = ck.flatten_parameters(model)
    assert len(theta) == sum(p.numel() for p in model.parameters())
    assert model.again.weight is model[0].weight
    history = ck.LowRankHistory(model)
    history.append(fisher_of(model, 1))
    assert len(history._run_or_list(list(model.parameters()))) == 1
    value, gradient = value_and_gradient(history, model, 1.0)
    torch.testing.assert_close(history.add_penalty_grad_(1.0), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(flatten(p.grad for p in model.parameters()), gradient, rtol=1e-12, atol=0)


def test_in_place_steps_on_one_buffer_bump_versions():
    model = small_network()
    ck.flatten_parameters(model)
    weight = model[2].weight
    for history in histories(model):
        for touch, tensor in (
            (lambda h: h.add_penalty_grad_(1.0), weight.grad),
            (lambda h: h.decoupled_step_(1.0, 0.1), weight),
        ):
            before = tensor._version
            touch(history)
            assert tensor._version > before


def test_models_that_cannot_be_flattened_are_refused():
    with pytest.raises(TypeError, match=r"model is a Tensor; expected a torch.nn.Module"):
        ck.flatten_parameters(torch.ones(3))
    with pytest.raises(ValueError, match="model has no parameter that requires a gradient"):
        ck.flatten_parameters(small_network().requires_grad_(False))
    mixed = small_network()
    mixed[0].half()
    with pytest.raises(ValueError, match=r"parameters of torch.float16 on cpu, torch.float64 on cpu; one buffer holds"):
        ck.flatten_parameters(mixed)
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of 'weight' is sparse"):
        ck.flatten_parameters(sparse)
