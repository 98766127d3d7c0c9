"""What a step of FusedAdamW makes of writes to 16-bit parameters that no version counter shows."""

from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import EMAModel
from helpers.past_tasks import MODES, flat
from helpers.penalized_adamw import LAM, Network, carried_sums, groups_of, history_of, train
from torch import Tensor
from torch.nn.utils import vector_to_parameters

import crl_kernels as ck

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
Write = Callable[[list[Tensor], list[Tensor]], None]


def copy_averages(params: list[Tensor], values: list[Tensor], foreach: bool) -> None:
    EMAModel(values, foreach=foreach).copy_to(params)


def assign_data(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.data = value.clone()


def copy_into_data(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.data.copy_(value)


def scale_data(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter in params:
        parameter.data.mul_(1.5)


def copy_in_inference_mode(params: list[Tensor], values: list[Tensor]) -> None:
    with torch.inference_mode():
        copy_into_data(params, values)


def assign_in_channels_last(params: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.data = value.clone(memory_format=torch.channels_last) if value.dim() == 4 else value.clone()


WRITES: dict[str, Write] = {
    "EMAModel.copy_to": lambda params, values: copy_averages(params, values, False),
    "EMAModel.copy_to, foreach": lambda params, values: copy_averages(params, values, True),
    "data.copy_": copy_into_data,
    "data.mul_": scale_data,
    "data =": assign_data,
    "data = channels_last": assign_in_channels_last,
    "inference_mode": copy_in_inference_mode,
    "vector_to_parameters": lambda params, values: vector_to_parameters(
        torch.cat([value.flatten() for value in values]), params
    ),
}


def optimizer_of(model: Network, kind: str, decoupled: bool) -> ck.FusedAdamW:
    if kind == "none":
        return ck.FusedAdamW(groups_of(model))
    return ck.FusedAdamW(groups_of(model), history=history_of(model, kind), lam=LAM, decoupled=decoupled)


def assert_same(model: Network, optimizer: ck.FusedAdamW, other: Network, others: ck.FusedAdamW) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == others.state[q].keys(), name
        for key, tensor in optimizer.state[p].items():
            assert torch.equal(tensor, others.state[q][key]), (name, key)


PENALTIES = [
    ("none", False, torch.bfloat16),
    ("3", False, torch.bfloat16),
    ("3", True, torch.float16),
    ("diagonal", False, torch.float16),
    ("diagonal", True, torch.bfloat16),
]


@pytest.mark.parametrize(("kind", "decoupled", "dtype"), PENALTIES, ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_through_data_is_where_the_next_step_begins(write, kind, decoupled, dtype):
    """As one that the version counters show, except for the step after it, whose penalty may be of the weights before:
    here it has none. A parameter without a gradient takes the written values too."""
    models = [Network(dtype), Network(dtype)]
    optimizers = [optimizer_of(model, kind, decoupled) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0, 1])
        params = list(model.parameters())
        values = [parameter.detach() * 1.5 for parameter in params]
        if optimizer is optimizers[0]:
            WRITES[write](params, values)
        else:
            with torch.no_grad():
                for parameter, value in zip(params, values, strict=True):
                    parameter.copy_(value)
        optimizer.lam = 0.0
        train(model, optimizer, [2])
        written = torch.cat([value.double().flatten() for value in values])
        assert (flat(model) - written).abs().max() < 0.02  # rather than a third of a weight
        optimizer.lam = LAM if kind != "none" else 0.0
        train(model, optimizer, [3, 4])
    if write == "data = channels_last" and kind == "3":  # it sums in the order of its memory
        torch.testing.assert_close(carried_sums(optimizers[0]), carried_sums(optimizers[1]), rtol=1e-14, atol=1e-14)
        assert torch.equal(flat(models[0]), flat(models[1]))
    else:
        assert_same(models[0], optimizers[0], models[1], optimizers[1])


@pytest.mark.parametrize(("kind", "decoupled", "dtype"), PENALTIES, ids=str)
def test_a_write_to_a_frozen_parameter_stays_and_is_where_it_begins_once_it_moves(kind, decoupled, dtype):
    model = Network(dtype)
    optimizer = optimizer_of(model, kind, decoupled)
    train(model, optimizer, [0])
    weight = model.first.weight.requires_grad_(False)
    train(model, optimizer, [1])
    weight.data.mul_(1.5)
    written = weight.clone()
    train(model, optimizer, [2, 3])
    assert torch.equal(weight, written)
    weight.requires_grad_(True)
    optimizer.lam = 0.0
    train(model, optimizer, [4])
    assert not torch.equal(weight, written)
    assert (weight - written).abs().max() < 0.02


@HALVES
def test_a_write_through_a_flat_buffer_is_where_the_next_step_begins(dtype):
    model = Network(dtype)
    buffer, _ = ck.flatten_parameters(model)
    optimizer = ck.FusedAdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    written = buffer.clone().mul_(1.5)
    buffer.data.copy_(written)
    optimizer.step()
    assert (buffer - written).abs().max() < 0.02


@HALVES
def test_a_nan_is_neither_lost_nor_kept(dtype):
    """It is a weight like any other: nothing replaces it but a write, and the others go on as without it."""
    models = [Network(dtype), Network(dtype)]
    optimizers = [ck.FusedAdamW(model.parameters()) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, [0])
    weight = models[0].first.weight
    state = optimizers[0].state[weight]
    kept = weight.detach()[0, 0].clone()
    gradients = [parameter.grad for parameter in models[0].parameters()]
    for other, gradient in zip(models[1].parameters(), gradients, strict=True):
        other.grad = None if gradient is None else gradient.clone()
    weight.data[0, 0] = float("nan")
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
        assert weight[0, 0].isnan()
        assert state["master"][0, 0].isnan()
        assert torch.equal(flat(models[0]).isnan().nonzero(), (flat(models[0]) != flat(models[1])).nonzero())
        assert flat(models[0]).isnan().sum() == 1
    weight.data[0, 0] = kept
    optimizers[0].step()
    assert (weight.detach()[0, 0] - kept).abs() < 0.02


def test_a_master_copy_keeps_what_its_rounding_does_not_show():
    """Beyond the largest float16, below the smallest, and a zero of the other sign: each rounds to the parameter."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = ck.FusedAdamW([parameter], lr=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    masters = torch.tensor([1e6, 1e-9, -1e-9, 0.1])
    optimizer.state[parameter]["master"].copy_(masters)
    parameter.data.copy_(masters)
    parameter.data[1] = -0.0
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["master"], masters)
    assert torch.equal(parameter, masters.half())


@MODES
def test_a_skipped_step_loses_no_write(decoupled):
    """A GradScaler's: nothing moves, and the step after it begins with the written values."""
    model = Network(torch.float16)
    optimizer = optimizer_of(model, "3", decoupled)
    train(model, optimizer, [0])
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    written = flat(model)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(flat(model), written)
    optimizer.found_inf, optimizer.lam = torch.zeros(()), 0.0
    optimizer.step()
    assert (flat(model) - written).abs().max() < 0.02
