"""What stops training: numbers that are not finite, too few images for a Fisher matrix, a full disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, files
from crl_diffusion.errors import OptionError, TrainingError, out_of_memory
from crl_diffusion.evaluation import evaluate
from crl_diffusion.files import Log
from crl_diffusion.methods import penalties
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.trained_model import drawing
from crl_diffusion.training import run as training_run
from crl_diffusion.training import trouble
from crl_diffusion.training.plan import require_fisher_images
from helpers.trainer_runs import (
    MakeRun,
    Short,
    TrainCommand,
    at_call,
    few_samples,
    require_one_line,
    same_end,
    train,
)


def test_the_number_that_is_not_finite_is_named_with_its_likely_cause(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1:gradient,lam=60"))
    first, second = run.stages
    fine, nan, inf = [0.5, 0.2, 3.0], math.nan, math.inf

    def cause(stage: Any, *last: float) -> str:
        return trouble.explain(run, stage, 41, torch.tensor([fine, fine, [*last]], dtype=torch.float64))

    assert cause(first, nan, nan, nan).startswith("the loss is not finite at step 43 of stage 1 (norms of the gradient")
    assert "just before: 3, 3); the learning rate is likely too high: try --lr 0.00067" in cause(first, nan, nan, nan)
    assert cause(second, 0.5, 0.2, inf).startswith("the gradient is not finite, though the loss is, at step 43")
    assert "try lam=6 or the decoupled mode" in cause(second, 0.5, 0.2, inf)
    run.method = short("gd").recipe
    assert cause(second, 0.5, nan, nan).startswith("the loss on replayed images is not finite")
    assert "the teacher's images" in cause(second, 0.5, nan, nan)
    run.method = short("gd+rank1:preconditioned,lam=3").recipe
    assert "penalty in preconditioned mode is unstable: try lam=0.3 or the decoupled" in cause(second, 0.5, 0.2, inf)
    run.method, run.teacher = short("fine-tune").recipe, run.model
    assert cause(second, nan, 0.0, nan).startswith("the loss is not finite at step 43 of stage 2")
    run.method = short("gd").recipe
    assert cause(second, nan, 0.2, nan).startswith("the loss on real images is not finite at step 43 of stage 2")
    half = make_run(short("gd", precision="fp16"))
    assert "try --precision bf16" in trouble.explain(half, first, 1, torch.tensor([[inf, 0.0, nan]]))
    loose = make_run(short("gd", clip=0.0))
    assert "try --clip 1" in trouble.explain(loose, first, 1, torch.tensor([[inf, 0.0, nan]]))


def test_weights_that_the_last_step_spoils_stop_the_run(short: Short, extractor_folder: Path, tmp_path: Path) -> None:
    """The loss of the only step is finite: Adam's step after it makes every weight 1e30."""
    config = short("gd", model="mlp", steps=1, clip=0.0, lr_schedule="constant", lr=1e30)
    with pytest.raises(TrainingError, match=r"held-out images is not finite at the end of stage 1; .*try --clip 1"):
        train(config, tmp_path / "run", extractor_folder)
    (row,) = read_metrics(tmp_path / "run")
    assert row["kind"] == "step"


def test_the_last_task_needs_no_images_for_a_fisher_matrix(short: Short, make_run: MakeRun) -> None:
    config = short("rank10", fisher_samples=0)
    data = make_run(config).data
    first, last = data.tasks
    few = torch.arange(3)
    require_fisher_images(config, replace(data, tasks=(first, replace(last, train=last.train[few]))))
    with pytest.raises(OptionError, match=r"task 1 has 3 train images and .* rank10 needs 20 samples"):
        require_fisher_images(config, replace(data, tasks=(replace(first, train=first.train[few]), last)))


@pytest.mark.filterwarnings("ignore:each stratum needs samples in both halves")
def test_a_fisher_matrix_that_cannot_be_estimated_is_an_error(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("bands1000", fisher_samples=4))
    with pytest.raises(TrainingError, match=r"no Fisher matrix of task 1 .*no stratum has samples in both halves"):
        run.remember(run.stages[0])


@few_samples
@pytest.mark.parametrize(
    ("owner", "name", "says"),
    [
        (training_run, "training_step", "in the steps of stage 1; lower --batch (8) or --replay-batch (4), in a new"),
        (evaluate, "evaluate", "in the evaluation of stage 1; lower --eval-samples (4), in a new folder"),
        (penalties, "estimate_fisher", "for the Fisher matrix and the pool; lower --fisher-samples (8) or --pool (3)"),
    ],
)
def test_out_of_memory_is_one_line_that_names_what_to_lower(
    owner: Any,
    name: str,
    says: str,
    train_command: TrainCommand,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_call(monkeypatch, owner, name, 1, lambda: torch.empty(2**50, dtype=torch.uint8))
    assert train_command() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"crl-diffusion: out of memory, asked for {2**50} bytes more, ")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), "out of memory, asked for 7.45 GiB more"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "asked for 2.00 GiB more"),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception, says: str | None) -> None:
    problem = out_of_memory(error)
    assert problem is None if says is None else problem is not None and problem.endswith(says)


def test_out_of_memory_outside_of_training_is_one_line(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    at_call(monkeypatch, drawing, "write_images", 1, lambda: torch.empty(2**50, dtype=torch.uint8))
    assert cli.main(["sample", str(finished), "--out", str(tmp_path / "out")]) == 1
    require_one_line(capsys.readouterr().err, f"out of memory, asked for {2**50} bytes more; lower --count")


@few_samples
@pytest.mark.parametrize("fails", ["a checkpoint", "a log"])
def test_a_full_disk_is_an_error_and_the_same_command_resumes(
    fails: str,
    finished: Path,
    train_command: TrainCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "a checkpoint":  # at the end of the first stage
            at_call(patch, files, "save_file", 3, full)
        else:
            at_call(patch, Log, "append", 9, full)
        assert train_command() == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith("crl-diffusion: ")
    assert "No space left on device" in complaint
    assert "give the same command again" in complaint
    out = tmp_path / "run"
    newest, complaints = checkpoint.latest(out / "checkpoints")
    assert newest is not None
    assert (newest.stage, newest.step, complaints) == (0, 6, [])
    assert not list((out / "checkpoints").glob("*.tmp"))
    assert train_command() == 0
    same_end(finished, out)
