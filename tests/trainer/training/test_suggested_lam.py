"""The lam that a run suggests after each task, and warnings about a Fisher matrix in the words of the command line."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training import trouble
from crl_diffusion.training.run import Run
from helpers.trainer_runs import SHORT, MakeRun, Short, few_samples, train

from crl_kernels.fisher import estimate

STEPS = 60


def after_first_task(run: Run) -> tuple[list[str], float | None]:
    """What a run says once it has learnt its first task, and the lam in its record."""
    said: list[str] = []
    run.say = said.append
    run.remember(run.stages[0])
    (row,) = (row for row in read_metrics(run.out) if row["kind"] == "fisher")
    return said, row["suggested_lam"]


@few_samples
@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
@pytest.mark.parametrize("method", ["gd+rank1", "gd+rank1:gradient", "gd+diagonal"])
def test_at_the_suggested_lam_drift_halves_in_the_next_task(
    short: Short, make_run: MakeRun, method: str, schedule: str
) -> None:
    config = short(method, model="mlp", steps=STEPS, lr_schedule=schedule, lr_later=0.5, optimizer="sgd")
    run = make_run(config)
    said, suggested = after_first_task(run)
    assert suggested is not None
    default = 3000 if "diagonal" in method else 20
    words = f"lam is {default}; at lam={suggested:.3g} drift would halve within the next task's {STEPS} steps"
    assert said == [f"after task 1: {words}"]

    # Nothing but the penalty moves the parameters.
    assert run.penalty is not None
    run.penalty.spec = replace(run.penalty.spec, lam=suggested)
    history = run.penalty.history
    values = [p.detach().clone() for p in run.model.parameters()]
    moves = run.penalty.directions()[0].values() if "rank1" in method else roots(run)
    with torch.no_grad():
        for p, move in zip(run.model.parameters(), moves, strict=True):
            p.add_(move)
    before = float(history.penalty(1.0).detach())
    for step in range(STEPS):
        lr = run.lr(run.stages[1], step)
        run.optimizer.zero_grad()
        run.penalty.after_backward()
        with torch.no_grad():
            for p in run.model.parameters():
                if p.grad is not None:
                    p.sub_(lr * p.grad)
        run.penalty.after_step(lr, run.optimizer)
    left = (float(history.penalty(1.0).detach()) / before) ** 0.5
    if "rank1" in method:
        assert left == pytest.approx(0.5, abs=0.01)
    else:  # sqrt(S) is larger where S is: it returns sooner
        assert 0.1 < left < 0.55
    assert any(not torch.equal(p, value) for p, value in zip(run.model.parameters(), values, strict=True))


def roots(run: Run) -> list[torch.Tensor]:
    """A displacement by the size of a gradient, in each coordinate."""
    assert run.penalty is not None
    state = run.penalty.history.state_dict()
    return [state[f"fisher_diagonal.{name}"].sqrt() for name, _ in run.model.named_parameters()]


@few_samples
@pytest.mark.parametrize("mode", ["gradient", "damping", "preconditioned"])
def test_under_adam_a_run_says_that_these_modes_are_rescaled(short: Short, make_run: MakeRun, mode: str) -> None:
    said, _ = after_first_task(make_run(short(f"rank1:{mode}", model="mlp")))
    assert [line.partition("steps")[2] for line in said] == [f", if Adam did not rescale the mode {mode}"]


@few_samples
def test_the_record_of_a_run_has_one_suggestion_per_task_that_follows(
    short: Short, tmp_path: Path, extractor_folder: Path, no_pictures: None
) -> None:
    config = short("rank1:lam=inf", model="mlp", tasks=3, lr_schedule="constant")
    lines = train(config, tmp_path / "run", extractor_folder)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "fisher"]
    assert [row["task"] for row in rows] == [1, 2]
    expected = math.log(2) / (config.lr * SHORT["steps"] * rows[0]["curvatures"][0])
    assert rows[0]["suggested_lam"] == pytest.approx(expected, rel=1e-5)
    assert [line for line in lines if "lam" in line] == [
        f"after task {row['task']}: lam is inf; at lam={row['suggested_lam']:.3g} drift would halve within the next "
        "task's 6 steps"
        for row in rows
    ]


def test_nothing_to_hold_has_no_suggestion(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("rank1", model="mlp"))
    assert run.suggested_lam(1) is None
    assert run.suggested_lam(len(run.stages)) is None


@few_samples
@pytest.mark.parametrize(("lam", "expected"), [(1e9, None), (1e-9, 1e-10)])
def test_a_stiff_penalty_that_has_diverged_is_told_to_be_as_soft_as_suggested(
    short: Short, make_run: MakeRun, lam: float, expected: float | None
) -> None:
    run = make_run(short(f"rank1:gradient,lam={lam}", model="mlp"))
    _, suggested = after_first_task(run)
    cause = trouble.likely_cause(run, run.stages[1], False, True)
    assert f"try lam={expected or suggested:.3g} or the decoupled mode" in cause


@pytest.mark.parametrize(
    ("method", "finding", "advice"),
    [
        (
            "rank1",
            "only .* of the trace of the Fisher lies along the mean gradient",
            "`crl-diffusion diagnose` .*rank1:top",
        ),
        ("rank1", "the mean gradient is mostly noise", "--fisher-samples, or rank1:top"),
        ("bands8", "each stratum needs samples in both halves", "--fisher-samples, or fewer bands in --method"),
    ],
)
def test_warnings_name_options_of_the_command_line(
    short: Short, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, method: str, finding: str, advice: str
) -> None:
    for threshold in ("_SMALL_RHO", "_SMALL_SIGNAL"):
        monkeypatch.setattr(estimate, threshold, 1.0)  # a network that has not been trained is far above them
    run = make_run(short(method, model="mlp", fisher_samples=12))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.remember(run.stages[0])
    texts = [str(record.message) for record in caught]
    assert any(re.fullmatch(f"{finding}.* {advice}.*", text) for text in texts), texts
    for text in texts:
        assert not any(word in text for word in ("direction=", "kind=", "max_samples", "rank=", "loader"))
