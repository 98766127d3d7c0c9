"""Stages counted in epochs; averaged weights, and weights interpolated with those of the task before."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training import stage_records
from helpers.trainer_runs import MakeRun, Short, few_samples, flat, same_end, train


def test_epochs_are_passes_over_the_images_of_a_stage(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd", epochs=3, batch=50))
    images = [len(run.task_images(stage, "train").labels) for stage in run.stages]
    assert run.stage_steps == [3 * math.ceil(n / 50) for n in images]
    assert all(n % 50 for n in images)
    together = make_run(short("joint", epochs=3, batch=50))
    assert together.stage_steps == [3 * math.ceil(sum(images) / 50)]
    assert make_run(short("joint")).stage_steps == [12]


def test_the_average_becomes_the_model_at_the_end_of_a_task(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", ema=0.5, precision="fp64"))
    stage = run.stages[0]
    images = run.task_images(stage, "train")
    expected = flat(run.model)
    for n in range(1, 5):
        run.take_step(images, stage)
        decay = min(0.5, n / (n + 9))
        expected = decay * expected + (1 - decay) * flat(run.model)
    trained = flat(run.model)
    run.adopt_average()
    torch.testing.assert_close(flat(run.model), expected, rtol=1e-13, atol=1e-15)
    assert (trained - expected).norm() > 1e-4 * expected.norm()
    assert run.average is None


def test_weights_move_back_towards_those_of_the_task_before(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+interpolate0.3", precision="fp64", model="mlp"))
    first = flat(run.model)
    run.interpolate()
    assert torch.equal(flat(run.model), first)  # there is no task before
    run.remember(run.stages[0])
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype))
    trained = flat(run.model)
    run.interpolate()
    torch.testing.assert_close(flat(run.model), 0.7 * trained + 0.3 * first, rtol=1e-13, atol=1e-15)
    assert run.teacher is not None
    assert torch.equal(flat(run.teacher), first)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_task_ends_with_the_interpolated_average_and_is_measured_on_it(
    short: Short, make_run: MakeRun, tmp_path: Path, extractor_folder: Path, ema: float
) -> None:
    config = short("replay+interpolate0.3", model="mlp", ema=ema)
    train(config, tmp_path, extractor_folder)
    start, last, end = (
        checkpoint.load(tmp_path / "checkpoints" / f"{name}.safetensors")
        for name in ("01-00000000", "01-00000006", "02-00000000")
    )
    for name, value in end.part("model").items():
        trained = last.part("average" if ema else "model")[name]
        expected = 0.7 * trained + 0.3 * start.part("model")[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(start.part("model")[name], start.part("memory/teacher")[name])
    run = make_run(config)
    run.model.load_state_dict(end.part("model"))
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "held_out_loss" and row["after_task"] == 2]
    assert stage_records.held_out_losses(run, run.stages[1]) == rows


@few_samples
def test_a_run_with_an_average_and_a_scaler_resumes_to_the_same_bits(
    short: Short, tmp_path: Path, extractor_folder: Path
) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    config = short("gd+rank1:gradient", ema=0.9, precision="fp16")
    train(config, uninterrupted, extractor_folder)

    # What is averaged is the next task's start, its teacher and the penalty's anchor.
    within, end = (checkpoint.load(uninterrupted / "checkpoints" / f"01-{step:08d}.safetensors") for step in (4, 0))
    assert within.part("average").keys() == within.part("model").keys()
    assert within.part("scaler").keys() == {"scale", "good_steps"}
    assert not end.part("average")
    penalty, projected = end.part("memory/penalty"), 0.0
    for name, value in end.part("model").items():
        assert torch.equal(value, end.part("memory/teacher")[name])
        projected += (value.double() * penalty[f"directions.0.{name}"].double()).sum().item()
    assert penalty["anchor_projections"].tolist() == pytest.approx([projected], rel=1e-5)

    shutil.copytree(uninterrupted, interrupted)
    (interrupted / "summary.json").unlink()
    for name in ("02-00000000", "01-00000006"):
        (interrupted / "checkpoints" / f"{name}.safetensors").unlink()
    assert any(
        "resuming after 1 finished stage(s) and 4 steps" in line
        for line in train(config, interrupted, extractor_folder)
    )
    same_end(uninterrupted, interrupted)
