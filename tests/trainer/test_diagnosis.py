"""`crl-diffusion diagnose` on a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, diagnosis
from crl_diffusion.diffusion import noising
from helpers.trainer_runs import require_one_line

from crl_kernels.diagnostics.diagnosis import Diagnosis


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
    assert "after 2 finished stage(s)" in output
    assert "held out" in output
    assert list(loaded.at) == [500]
    assert loaded.num_samples == 48
    assert loaded.snr[500] == pytest.approx(noising.SCHEDULES["linear"].snr(500), rel=1e-5)
    assert (out / "report.md").read_text().startswith("# Is rank 1 enough? digits, gd+rank1, task 2\n")
    assert str(tmp_path) not in (out / "report.json").read_text() + (out / "report.md").read_text()


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
