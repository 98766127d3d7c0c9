"""`crl-diffusion diagnose` on a finished run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, diagnosis
from crl_diffusion.config.spelling import parse_method
from crl_diffusion.diffusion import noising
from helpers.trainer_runs import require_one_line

from crl_kernels.diagnostics.diagnosis import Diagnosis
from crl_kernels.diagnostics.verdict import Verdict, judge

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_run_is_diagnosed_and_not_changed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    out = tmp_path / "report"
    options = ["--samples", "48", "--timesteps", "500", "--task", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main(["diagnose", str(finished), *options]) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    loaded = Diagnosis.load(out)
    output = " ".join(capsys.readouterr().out.split())
    for sentence in loaded.verdict.sentences:
        assert " ".join(sentence.split()) in output
    assert re.match(r"Use --method gd\+(rank\d+|bands\d+|diagonal)", loaded.verdict.sentences[2])
    assert "estimate_fisher" not in output + (out / "report.md").read_text()
    assert "after 2 finished stage(s)" in output
    assert "held out" in output
    assert list(loaded.at) == [500]
    assert loaded.num_samples == 48
    assert loaded.snr[500] == pytest.approx(noising.SCHEDULES["linear"].snr(500), rel=1e-5)
    assert (out / "report.md").read_text().startswith("# Is rank 1 enough? digits, gd+rank1, task 2\n")
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("method", "replayed"),
    [
        *(("fine-tune", ""), ("joint", ""), ("rank1:top,lam=3", ""), ("gd", "gd+"), ("gd+diagonal:gradient", "gd+")),
        *(("replay+gd+bands8", "replay+gd+"), ("masip", "masip+")),
    ],
)
@pytest.mark.parametrize(
    ("use", "penalty", "parts"),
    [
        ("mean", "rank1", {"rank": 1, "direction": "mean"}),
        ("top", "rank1:top", {"rank": 1, "direction": "top"}),
        ("diagonal", "diagonal", {"fisher": "diagonal"}),
        ("rank 2", "rank2", {"rank": 2, "direction": "top"}),
        ("rank 16", "rank16", {"rank": 16, "direction": "top"}),
        ("bands", "bands3:top", {"bands": 3, "direction": "top"}),
    ],
)
def test_the_form_to_use_is_spelled_as_a_method_with_the_replay_of_the_run(
    method: str, replayed: str, use: str, penalty: str, parts: dict[str, Any]
) -> None:
    verdict = Verdict("no", "mean", use, (), (), (), ("One.", "Two.", "Use the library: why."), ": why.")
    other: Any = None  # not looked at
    found = Diagnosis(1000, 64, 10, dict.fromkeys((1, 2, 3), other), other, {}, {}, [], None, verdict)
    sentences = diagnosis.in_words_of_the_trainer(found, method).verdict.sentences
    assert sentences == ("One.", "Two.", f"Use --method {replayed}{penalty}: why.")
    recipe = parse_method(f"{replayed}{penalty}")
    assert recipe.penalty is not None
    assert {name: getattr(recipe.penalty, name) for name in parts} == parts
    if replayed:
        assert recipe.replays == parse_method(method).replays


def test_the_loss_is_the_trainers_at_the_given_timesteps() -> None:
    class Model(torch.nn.Module):
        def forward(self, noised: Any, t: Any, class_labels: Any, return_dict: bool) -> Any:
            assert t.tolist() == [7, 900]
            assert class_labels.tolist() == [0, 1]
            return (torch.zeros_like(noised),)

    batch = (torch.ones(2, 1, 4, 4), torch.tensor([0, 1]))
    torch.manual_seed(0)
    losses = diagnosis.per_sample_loss_at(noising.SCHEDULES["linear"], Model(), batch, torch.tensor([7, 900]))
    torch.manual_seed(0)
    torch.testing.assert_close(losses, torch.randn(2, 1, 4, 4).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--samples", "20"], ["--samples is 20", "at least 48"]),
        (["--samples", "100000"], ["--samples is 100000", "ask for fewer"]),
        (["--timesteps", "1000"], ["--timesteps is '1000'", "0 to 999"]),
        (["--timesteps", "5", "5"], ["none twice"]),
        (["--task", "3"], ["--task is 3", "learnt 2 task"]),
        (["--seed", "-1"], ["--seed is -1"]),
    ],
)
def test_an_impossible_option_is_one_line_and_exit_code_2(
    finished: Path, options: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diagnose", str(finished), "--device", "cpu", *options]) == 2
    require_one_line(capsys.readouterr().err, *parts)


def test_a_folder_without_a_run_or_a_checkpoint_cannot_be_diagnosed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    assert cli.main(["diagnose", str(tmp_path)]) == 2
    assert "no good checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("report", ["diagnose_digits", "diagnose_mnist"])
def test_the_verdicts_of_the_published_reports_follow_from_their_numbers(report: str) -> None:
    published = Diagnosis.load(RESULTS / report)
    judged = replace(published, verdict=judge(published.uniform, published.at, published.bands))
    verdict = diagnosis.in_words_of_the_trainer(judged, "gd").verdict
    assert published.verdict == verdict
    assert "\n".join(verdict.sentences) in (RESULTS / report / "report.md").read_text()
