"""Rows of movement and of held-out losses, against their formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion.diffusion.noising import stream
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training import stage_records
from crl_diffusion.training.run import Run
from helpers.trainer_runs import MakeRun, Short, few_samples, flat, train
from torch import Tensor

pytestmark = [few_samples, pytest.mark.filterwarnings("ignore:the mean gradient .*is mostly noise")]
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
DOUBLE: dict[str, Any] = {"model": "mlp", "precision": "fp64", "tasks": 3, "fisher_samples": 24}


def _train(run: Run, number: int) -> list[Tensor]:
    """Three steps of a stage; returns the gradient that the optimizer took in each, as one vector."""
    stage, gradients = run.stages[number], []
    run.stage, run.step, run.optimizer = number, 0, run.new_optimizer()
    for _ in range(3):
        run.take_step(run.task_images(stage, "train"), stage)
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    return gradients


def _to_third_stage(run: Run) -> list[Any]:
    """Two stages, three steps each; returns the Fisher matrices that the penalty has learnt."""
    learnt: list[Any] = []
    if run.penalty is not None:
        append = run.penalty.history.append
        run.penalty.history.append = lambda fisher: learnt.append(fisher) or append(fisher)  # type: ignore[method-assign, func-returns-value]
    for number in range(2):
        _train(run, number)
        run.remember(run.stages[number])
    return learnt


@pytest.mark.parametrize("method", ["rank3:slopes,lam=50", "gd+bands2:lam=50", "rank1:random,gradient,lam=50"])
def test_movement_is_that_of_its_formulas(short: Short, make_run: MakeRun, method: str) -> None:
    run = make_run(short(method, **DOUBLE))
    learnt = _to_third_stage(run)
    before = flat(run.model)
    gradients = _train(run, 2)
    (row,) = stage_records.movement(run, run.stages[2])

    delta = flat(run.model) - before
    average = sum(0.001 * 0.999**age * g**2 for age, g in enumerate(reversed(gradients)))
    second_moments = average / (1 - 0.999**3)
    unmoved = second_moments == 0  # labels that no batch has had
    assert unmoved.any() == ("random" not in method)
    assert row == {
        "kind": "movement",
        "task": 3,
        "displacement": pytest.approx(float(delta.square().sum().sqrt()), rel=1e-12),
        "random_drift": pytest.approx(float(delta.square().mean().sqrt()), rel=1e-12),
        "drift": pytest.approx([float(u @ delta) for fisher in learnt for u in fisher.directions], rel=1e-9),
        "precision": pytest.approx(float(-second_moments[~unmoved].sqrt().log().mean()), rel=1e-9),
    }
    assert len(row["drift"]) == 2 * {"rank3": 3, "gd+bands2": 2, "rank1": 1}[method.partition(":")[0]]


@pytest.mark.parametrize(
    ("method", "settings"), [("fine-tune", {}), ("gd+diagonal", {}), ("gd", {"optimizer": "sgd", "lr": 0.2})]
)
def test_what_a_run_lacks_is_empty_or_none(
    short: Short, make_run: MakeRun, method: str, settings: dict[str, Any]
) -> None:
    run = make_run(short(method, **DOUBLE, **settings))
    _train(run, 0)
    assert stage_records.movement(run, run.stages[0]) == []
    run.remember(run.stages[0])
    _train(run, 1)
    (row,) = stage_records.movement(run, run.stages[1])
    assert row["drift"] == []
    assert (row["precision"] is None) == (run.config.optimizer == "sgd")
    assert row["displacement"] > 0


def test_adam_without_a_step_has_no_precision(short: Short, make_run: MakeRun) -> None:
    assert stage_records.precision(make_run(short("fine-tune", model="mlp"))) is None


def test_held_out_losses_are_those_of_a_plain_loop(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", **DOUBLE, seed=4))
    _train(run, 0)
    rows = stage_records.held_out_losses(run, run.stages[1])
    assert len(rows) == 2
    for number, row in enumerate(rows):
        images = run.data.tasks[number].held_out
        generator = stream(4, "held-out loss", number)
        index = torch.randint(len(images.labels), (1280,), generator=generator)
        within = torch.randint(100, (1280,), generator=generator)
        noise = torch.randn(1280, 1, 8, 8, generator=generator).double()
        by_band = []
        for band in range(10):
            part = slice(128 * band, 128 * band + 128)
            t = 100 * band + within[part]
            a = ABAR[t].reshape(-1, 1, 1, 1)
            clean = images.pixels[index[part]].double() / 255 * 2 - 1
            with torch.no_grad():
                x = a**0.5 * clean + (1 - a) ** 0.5 * noise[part]
                predicted = run.model(x, t, class_labels=images.labels[index[part]])[0]
            by_band.append(float((predicted - noise[part]).square().mean()))
        assert row == {
            "kind": "held_out_loss",
            "after_task": 2,
            "task": number + 1,
            "by_band": pytest.approx(by_band, rel=1e-9),
        }


def test_held_out_losses_depend_on_weights_and_seed_alone(short: Short, make_run: MakeRun) -> None:
    """Not on the method, the stage, or other options: differences are paired."""
    first = make_run(short("fine-tune", model="mlp"))
    other = make_run(short("gd+rank1:gradient", model="mlp", optimizer="sgd", lr_later=0.1, pool_latents="shared"))
    other.take_step(other.task_images(other.stages[0], "train"), other.stages[0])
    other.remember(other.stages[0])
    first.model.load_state_dict(other.model.state_dict())
    after_first, after_second = (stage_records.held_out_losses(first, stage) for stage in first.stages)
    assert [row["by_band"] for row in after_second[:1]] == [row["by_band"] for row in after_first]
    assert stage_records.held_out_losses(other, other.stages[1]) == after_second
    assert after_second[0]["by_band"] != after_second[1]["by_band"]
    reseeded = make_run(short("fine-tune", model="mlp", seed=1))
    reseeded.model.load_state_dict(other.model.state_dict())
    assert stage_records.held_out_losses(reseeded, reseeded.stages[0]) != after_first


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("method", "teacher", "replay"),
    [
        ("fine-tune", False, 0),
        ("rank1", False, 0),
        ("gd", True, 4 * 3 * (64 + 8)),  # 4 classes x 3 images of 8 x 8 bytes, and their labels of 8
        ("masip", True, 4 * 8),  # labels
        ("interpolate0.5", True, 0),
    ],
)
def test_memory_is_what_later_tasks_need(
    short: Short, make_run: MakeRun, method: str, teacher: bool, replay: int
) -> None:
    run = make_run(short(method, model="mlp", tasks=3))
    for stage in run.stages[:2]:
        run.remember(stage)
    parameters = sum(p.numel() for p in run.model.parameters())
    assert stage_records.memory(run, run.stages[1]) == [
        {"kind": "memory", "task": 2, "teacher_bytes": teacher * 4 * parameters, "replay_bytes": replay}
    ]


@pytest.mark.parametrize(
    ("method", "settings"), [("gd+rank1:gradient,lam=50", {"ema": 0.9}), ("rank1:once,slopes,lam=50", {})]
)
def test_rows_of_a_run_are_of_the_weights_in_its_checkpoints(
    short: Short, make_run: MakeRun, tmp_path: Path, extractor_folder: Path, method: str, settings: dict[str, Any]
) -> None:
    config = short(method, model="mlp", **settings)
    train(config, tmp_path / "run", extractor_folder)
    rows = read_metrics(tmp_path / "run")
    assert [row["kind"] for row in rows] == [
        *["step"] * 3, "evaluation", "held_out_loss", "fisher", "memory",
        *["step"] * 3, *["evaluation"] * 2, "movement", *["held_out_loss"] * 2,
    ]  # fmt: skip
    start, end = (checkpoint.load(tmp_path / f"run/checkpoints/{name}-00000000.safetensors") for name in ("01", "02"))
    run = make_run(config)
    for stage, weights in zip(run.stages, (start.part("memory/teacher"), end.part("model")), strict=True):
        run.model.load_state_dict(weights)
        expected = [row for row in rows if row["kind"] == "held_out_loss" and row["after_task"] == stage.learnt]
        assert stage_records.held_out_losses(run, stage) == expected
    (row,) = (row for row in rows if row["kind"] == "movement")
    delta = {name: (end.part("model")[name].double() - p.double()) for name, p in start.part("memory/teacher").items()}
    along = sum(float((start.tensors[f"memory/penalty/directions.0.{name}"] * d).sum()) for name, d in delta.items())
    assert row["drift"] == pytest.approx([along], rel=1e-9)
    assert row["displacement"] == pytest.approx(sum(float(d.square().sum()) for d in delta.values()) ** 0.5, rel=1e-9)
