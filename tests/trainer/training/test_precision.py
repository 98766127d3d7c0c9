"""Training steps in each precision: the gradient scaler, overflows, rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.methods.regression import NoisedBatch
from crl_diffusion.training.step import training_step
from helpers.trainer_runs import MakeRun, Short, flat
from torch import Tensor, nn


class _Line(nn.Module):
    """A model whose only parameter is added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, noised: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (noised + self.shift,)


class _Penalty:
    """Adds a gradient of 3, and counts its steps."""

    def __init__(self, model: _Line) -> None:
        self.model, self.steps = model, 0

    def after_backward(self) -> None:
        assert self.model.shift.grad is not None
        self.model.shift.grad += 3

    def after_step(self, lr: float, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1


def _batch(target: float) -> NoisedBatch:
    zeros = torch.zeros(2, 1, 4, 4)
    return NoisedBatch(zeros, torch.zeros(2).long(), torch.zeros(2).long(), zeros + target, torch.full((2,), 0.5))


def test_a_scaled_loss_and_an_unscaled_penalty_add_up_and_an_overflow_skips_both() -> None:
    model = _Line()
    penalty: Any = _Penalty(model)
    precision = Precision("fp16", torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    # Loss (shift + 1)^2 with gradient 2, and the penalty's 3.
    taken = training_step(model, optimizer, _batch(-1.0), penalty, 0.1, 0.0, precision)
    assert taken.moved
    assert taken.norm.item() == pytest.approx(5)
    assert model.shift.item() == pytest.approx(-0.5)
    assert penalty.steps == 1
    assert taken.losses.sum().item() == pytest.approx(1)

    # Clipped after the sum.
    model.shift.data.zero_()
    training_step(model, optimizer, _batch(-1.0), penalty, 0.1, 1.0, precision)
    assert model.shift.item() == pytest.approx(-0.1, rel=1e-4)

    # 65536 * 1e35 is infinite in float32.
    before, scale = model.shift.item(), precision.state()["scale"].item()
    taken = training_step(model, optimizer, _batch(-1e35), penalty, 0.1, 0.0, precision)
    assert not taken.moved
    assert (model.shift.item(), penalty.steps) == (before, 2)
    assert precision.state()["scale"].item() == scale / 2

    again = Precision("fp16", torch.device("cpu"))
    again.load_state(precision.state())
    assert again.state() == precision.state()


def test_an_overflow_leaves_the_fused_optimizer_and_the_average_alone(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", precision="fp16", ema=0.9))
    stage = run.stages[0]
    images = run.task_images(stage, "train")
    run.take_step(images, stage)
    assert run.average is not None
    assert run.precision.scaler is not None
    run.precision.scaler.update(new_scale=1e38)
    weights, average = flat(run.model), torch.cat([v.flatten().clone() for v in run.average.values()])
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    row = run.take_step(images, stage)
    assert row.isfinite().all()
    assert torch.equal(weights, flat(run.model))
    assert torch.equal(average, torch.cat([v.flatten() for v in run.average.values()]))
    for kept, state in zip(moments, run.optimizer.state.values(), strict=True):
        assert torch.equal(kept, state["exp_avg"])


@pytest.mark.parametrize(("precision", "error"), [("fp64", 1e-6), ("bf16", 0.02), ("fp16", 0.002)])
def test_a_precision_has_the_dtypes_of_its_name(short: Short, make_run: MakeRun, precision: str, error: float) -> None:
    """Losses of the first step against fp32's, within a few roundings of a number of 53, 8 or 11 bits, and not less
    than a tenth of one."""
    plain, run = make_run(short("fine-tune")), make_run(short("fine-tune", precision=precision))
    images = run.task_images(run.stages[0], "train")
    a, b = (r.take_step(images, r.stages[0])[0].double().item() for r in (plain, run))
    assert abs(b / a - 1) <= error
    assert b != a
    assert run.like.dtype == (torch.float64 if precision == "fp64" else torch.float32)
