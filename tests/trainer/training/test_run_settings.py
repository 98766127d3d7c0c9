"""A run beside its method: passes over the data, averaged weights, precisions; what stops it; where it comes from."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import OptionError, TrainingError
from crl_diffusion.files import Log, read_json, read_rows
from crl_diffusion.methods.regression import NoisedBatch
from crl_diffusion.run_folder import checkpoint, origin
from crl_diffusion.run_folder.checkpoint import Checkpoint
from crl_diffusion.run_folder.layout import resolve
from crl_diffusion.training import forecast, loop
from crl_diffusion.training.plan import require_fisher_images
from crl_diffusion.training.run import Run
from crl_diffusion.training.step import training_step
from helpers.trainer_runs import SHORT, options, same_end
from torch import Tensor, nn

MakeRun = Callable[[RunConfig], Run]
Short = Callable[..., RunConfig]
quiet = pytest.mark.filterwarnings("ignore:(only .* of the trace of the Fisher|the mean gradient is mostly noise)")


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _train(config: RunConfig, out: Path, extractor_folder: Path) -> list[str]:
    said: list[str] = []
    loop.train(config, out, extractor_folder=extractor_folder, say=said.append)
    return said


# Steps


def test_epochs_are_passes_over_the_images_of_a_stage(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd", epochs=3, batch=50))
    images = [len(run.task_images(stage, "train").labels) for stage in run.stages]
    assert run.stage_steps == [3 * math.ceil(n / 50) for n in images]
    assert all(n % 50 for n in images)
    together = make_run(short("joint", epochs=3, batch=50))
    assert together.stage_steps == [3 * math.ceil(sum(images) / 50)]
    assert make_run(short("joint")).stage_steps == [12]


# Averaged weights


def test_the_average_becomes_the_model_at_the_end_of_a_task(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("fine-tune", ema=0.5, precision="fp64"))
    stage = run.stages[0]
    images = run.task_images(stage, "train")
    expected = _flat(run.model)
    for n in range(1, 5):
        run.take_step(images, stage)
        decay = min(0.5, n / (n + 9))
        expected = decay * expected + (1 - decay) * _flat(run.model)
    trained = _flat(run.model)
    run.adopt_average()
    torch.testing.assert_close(_flat(run.model), expected, rtol=1e-13, atol=1e-15)
    assert (trained - expected).norm() > 1e-4 * expected.norm()
    assert run.average is None


@quiet
def test_with_an_average_and_a_scaler_interrupted_and_resumed(
    short: Short, tmp_path: Path, extractor_folder: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = short("gd+rank1:gradient", ema=0.9, precision="fp16")
    _train(config, whole, extractor_folder)

    # What is averaged is the next task's start, its teacher and the penalty's anchor.
    within, end = (checkpoint.load(whole / "checkpoints" / f"01-{step:08d}.safetensors") for step in (4, 0))
    assert within.part("average").keys() == within.part("model").keys()
    assert within.part("scaler").keys() == {"scale", "good_steps"}
    assert not end.part("average")
    penalty, projected = end.part("memory/penalty"), 0.0
    for name, value in end.part("model").items():
        assert torch.equal(value, end.part("memory/teacher")[name])
        projected += (value.double() * penalty[f"directions.0.{name}"].double()).sum().item()
    assert penalty["anchor_projections"].tolist() == pytest.approx([projected], rel=1e-5)

    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    for name in ("02-00000000", "01-00000006"):
        (cut / "checkpoints" / f"{name}.safetensors").unlink()
    assert any(
        "resuming after 1 finished stage(s) and 4 steps" in line for line in _train(config, cut, extractor_folder)
    )
    same_end(whole, cut)


# Precision


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

    def after_step(self, lr: float) -> None:
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
    weights, average = _flat(run.model), torch.cat([v.flatten().clone() for v in run.average.values()])
    moments = [state["exp_avg"].clone() for state in run.optimizer.state.values()]
    row = run.take_step(images, stage)
    assert row.isfinite().all()
    assert torch.equal(weights, _flat(run.model))
    assert torch.equal(average, torch.cat([v.flatten() for v in run.average.values()]))
    for kept, state in zip(moments, run.optimizer.state.values(), strict=True):
        assert torch.equal(kept, state["exp_avg"])


@pytest.mark.parametrize(("precision", "error"), [("fp64", 1e-6), ("bf16", 0.02), ("fp16", 0.002)])
def test_a_precision_is_what_its_name_says(short: Short, make_run: MakeRun, precision: str, error: float) -> None:
    """Losses of the first step against fp32's, within a few roundings of a number of 53, 8 or 11 bits, and not less
    than a tenth of one."""
    plain, run = make_run(short("fine-tune")), make_run(short("fine-tune", precision=precision))
    images = run.task_images(run.stages[0], "train")
    a, b = (r.take_step(images, r.stages[0])[0].double().item() for r in (plain, run))
    assert abs(b / a - 1) <= error
    assert b != a
    assert run.like.dtype == (torch.float64 if precision == "fp64" else torch.float32)


# What stops a run


def test_what_is_not_finite_is_named_with_its_likely_cause(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1:gradient,lam=60"))
    first, second = run.stages
    fine, nan, inf = [0.5, 0.2, 3.0], math.nan, math.inf

    def said(stage: Any, *last: float) -> str:
        return loop.explain(run, stage, 41, torch.tensor([fine, fine, [*last]], dtype=torch.float64))

    assert said(first, nan, nan, nan).startswith("the loss is not finite at step 43 of stage 1 (norms of the gradient")
    assert "just before: 3, 3); the learning rate is likely too high: try --lr 0.00067" in said(first, nan, nan, nan)
    assert said(second, 0.5, 0.2, inf).startswith("the gradient is not finite, though the loss is, at step 43")
    assert "try lam=6 or the decoupled mode" in said(second, 0.5, 0.2, inf)
    run.method = short("gd").recipe
    assert said(second, 0.5, nan, nan).startswith("the loss on replayed images is not finite")
    assert "the teacher's images" in said(second, 0.5, nan, nan)
    half = make_run(short("gd", precision="fp16"))
    assert "try --precision bf16" in loop.explain(half, first, 1, torch.tensor([[inf, 0.0, nan]]))
    loose = make_run(short("gd", clip=0.0))
    assert "try --clip 1" in loop.explain(loose, first, 1, torch.tensor([[inf, 0.0, nan]]))


def test_the_last_task_needs_no_images_for_a_fisher_matrix(short: Short, make_run: MakeRun) -> None:
    config = short("rank10", fisher_samples=0)
    data = make_run(config).data
    first, last = data.tasks
    few = torch.arange(3)
    require_fisher_images(config, replace(data, tasks=(first, replace(last, train=last.train[few]))))
    with pytest.raises(OptionError, match=r"task 1 has 3 train images and .* rank10 needs 20 samples"):
        require_fisher_images(config, replace(data, tasks=(replace(first, train=first.train[few]), last)))


@pytest.mark.filterwarnings("ignore:each stratum needs samples in both halves")
def test_a_fisher_matrix_that_cannot_be_estimated_is_said(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("bands1000", fisher_samples=4))
    with pytest.raises(TrainingError, match=r"no Fisher matrix of task 1 .*no stratum has samples in both halves"):
        run.remember(run.stages[0])


@quiet
@pytest.mark.parametrize("fails", ["a checkpoint", "a log"])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    fails: str,
    finished: Path,
    extractor_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = ["train", "--method", "gd+rank1", *options(SHORT), "--out", str(out)]
    arguments += ["--extractor-folder", str(extractor_folder)]
    calls = 0

    def full(original: Callable[..., Any], last: int) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(28, "No space left on device")
            return original(*given, **named)

        return call

    with monkeypatch.context() as patched:
        if fails == "a checkpoint":  # in the first stage's end
            patched.setattr(checkpoint, "save_file", full(checkpoint.save_file, 3))
        else:
            patched.setattr(Log, "append", full(Log.append, 9))
        assert cli.main(arguments) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("crl-diffusion: ")
    assert "No space left on device" in complaint
    assert "give the same command again" in complaint
    kept = checkpoint.latest(out / "checkpoints")
    assert kept[0] is not None
    assert (kept[0].stage, kept[0].step, kept[1]) == (0, 6, [])
    assert not list((out / "checkpoints").glob("*.tmp"))
    assert cli.main(arguments) == 0
    same_end(finished, out)


def _forge(path: Path, change: Callable[[Checkpoint], Checkpoint]) -> None:
    """Writes a checkpoint anew, with a digest that fits it."""
    changed = change(checkpoint.load(path))
    start = path.with_name(f"{changed.stage:02d}-00000000.safetensors")
    assert changed.step == 0 or start.exists()
    checkpoint.save(path.parent, changed)


def _without(saved: Checkpoint, name: str) -> Checkpoint:
    assert any(key.startswith(name) for key in saved.tensors)
    return saved._replace(tensors={k: v for k, v in saved.tensors.items() if not k.startswith(name)})


def _with(saved: Checkpoint, name: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    key = next(key for key in saved.tensors if key.startswith(name))
    return saved._replace(tensors={**saved.tensors, key: change(saved.tensors[key])})


FORGERIES: dict[str, tuple[str, Callable[[Checkpoint], Checkpoint], str]] = {
    "shape": ("01-00000006", lambda s: _with(s, "model/", lambda t: t[:1]), "its model has torch.float32 (1,"),
    "dtype": ("01-00000006", lambda s: _with(s, "model/", lambda t: t.double()), "its model has torch.float64"),
    "name": ("01-00000006", lambda s: _without(s, "model/conv_in.bias"), "its model lacks or has too many: conv_in"),
    "moments": ("01-00000006", lambda s: _without(s, "optimizer/exp_avg_sq"), "its optimizer lacks or has too many"),
    "run": ("01-00000006", lambda s: s._replace(run="another"), "it belongs to a run of another configuration"),
    "log": ("01-00000006", lambda s: s._replace(rows={"metrics": 1}), "no 'timings'"),
    "teacher": ("01-00000000", lambda s: _without(s, "memory/teacher"), "its teacher lacks or has too many"),
    "pool": ("01-00000000", lambda s: _without(s, "memory/source"), "no 'pixels'"),
    "penalty": ("01-00000000", lambda s: _without(s, "memory/penalty"), "no 'penalty'"),
    "directions": (
        "01-00000000",
        lambda s: _with(s, "memory/penalty/directions.0.conv_in.weight", lambda t: t[..., :1]),
        "conv_in.weight",
    ),
}


@quiet
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_checkpoint_is_passed_over(
    forgery: str, finished: Path, extractor_folder: Path, tmp_path: Path, short: Short, make_run: MakeRun
) -> None:
    name, change, complaint = FORGERIES[forgery]
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    names = sorted(path.stem for path in (finished / "checkpoints").iterdir())
    for kept in names[: names.index(name) + 1]:
        (folder / f"{kept}.safetensors").write_bytes((finished / "checkpoints" / f"{kept}.safetensors").read_bytes())
    _forge(folder / f"{name}.safetensors", change)
    config = resolve(short())
    run = make_run(config)
    newest, complaints = checkpoint.latest(folder, run.require_fits)
    assert f"checkpoint {name}.safetensors is damaged" in complaints[0]
    assert complaint in complaints[0]
    if name == "01-00000006":
        assert newest is not None
        assert (newest.stage, newest.step) == (1, 4)
    else:
        assert newest is None


# Origin and forecast


def test_a_run_keeps_its_command_and_its_source_code_but_no_host(finished: Path) -> None:
    made = read_json(finished / "config.json")
    assert made["command"] == origin.command()
    assert made["command"]
    assert made["git"] == origin.git_state()
    assert os.uname().nodename not in json.dumps({k: v for k, v in made.items() if k != "command"})


def test_the_state_of_the_source_code_is_gits(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert origin.git_state(file) is None
    git("init", "-q")
    assert origin.git_state(file) is None  # a copy that git does not keep
    git("add", "code.py")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert origin.git_state(file) == {"commit": commit, "dirty": False}
    (tmp_path / "run.txt").write_text("no source")
    assert origin.git_state(file) == {"commit": commit, "dirty": False}
    file.write_text("a = 2\n")
    assert origin.git_state(file) == {"commit": commit, "dirty": True}


def test_the_command_can_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "crl_diffusion", "--out", "two words"])
    assert origin.command() == "python -m crl_diffusion --out 'two words'"


def test_the_forecast_counts_what_is_left(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1"))
    config, plan = run.config, run.stages
    # A step of the first stage is 3 passes of 8 images; of the second, 3 of 8 + 4 images and one of the teacher's on 4.
    assert [forecast.step_passes(config, stage) for stage in plan] == [24, 40]
    # 2 classes x 4 images x 2 steps; the pool's 2 x 3 x 2, and 4 passes of 8 samples. Then 4 classes x 4 x 2.
    assert [forecast.end_passes(config, plan, stage) for stage in plan] == [16 + 12 + 32, 32]
    left = forecast.seconds_left(config, plan, run.stage_steps, plan[0], 2, 24.0)
    assert left == 4 * 24 + 6 * 40 + 60 + 32


def test_a_run_of_epochs_with_a_forecast_in_every_stage(short: Short, tmp_path: Path, extractor_folder: Path) -> None:
    said = _train(short("gd", epochs=1, batch=35), tmp_path / "run", extractor_folder)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in rows if r["kind"] == "step"][3::4] == [(1, 7), (2, 7)]
    about = [line for line in said if line.startswith("about ")]
    assert "for this run (8 steps, now at " in about[0]
    assert "for the rest of this run (1 steps, now at " in about[1]
    assert "about" not in (tmp_path / "run" / "metrics.jsonl").read_text()
