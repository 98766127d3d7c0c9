"""Two processes of torchrun make the run that one makes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.files import read_rows
from crl_diffusion.run_folder import checkpoint
from helpers.trainer_runs import SHORT, options, python

# Odd numbers: shares are not equal, nor are the halves of the Fisher's samples.
SETTINGS: dict[str, Any] = {**SHORT, "precision": "fp64", "batch": 9, "replay_batch": 5, "fisher_samples": 35}


def _torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    return python("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "crl_diffusion", *arguments)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list):
        return [x for part in value for x in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
@pytest.mark.parametrize(("method", "model"), [("gd+rank1", "tiny"), ("ddgr", "tiny"), ("adapters3", "mlp")])
def test_two_processes_equal_one_and_one_resumes_the_run_of_two(
    method: str, model: str, extractor_folder: Path, tmp_path: Path
) -> None:
    settings = options({**SETTINGS, "model": model})
    arguments = ["train", "--method", method, *settings, "--extractor-folder", extractor_folder]
    done = _torchrun(*arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after task 2: task 2 has FID") == 1  # one process speaks
    assert cli.main([str(argument) for argument in [*arguments, "--out", tmp_path / "one"]]) == 0

    _compare(tmp_path / "one", tmp_path / "two")
    start = next(row for row in read_rows(tmp_path / "two" / "timings.jsonl") if "started" in row)
    assert start["processes"] == 2

    # Another number of processes goes on from their checkpoint.
    for name in ("summary.json", "checkpoints/02-00000000.safetensors", "checkpoints/01-00000006.safetensors"):
        (tmp_path / "two" / name).unlink()
    assert cli.main([str(argument) for argument in [*arguments, "--out", tmp_path / "two"]]) == 0
    _compare(tmp_path / "one", tmp_path / "two")


def _compare(single: Path, double: Path) -> None:
    """Parameters of all ends of stages within 1e-9, in relative L2, and rows within 1e-9; sums in another order."""
    for stage in (1, 2):
        a, b = (checkpoint.load(run / "checkpoints" / f"{stage:02d}-00000000.safetensors") for run in (single, double))
        x, y = (torch.cat([value.flatten() for value in saved.part("model").values()]) for saved in (a, b))
        assert x.dtype == torch.float64
        assert (x - y).norm() <= 1e-9 * x.norm()
    rows, others = (read_rows(run / "metrics.jsonl") for run in (single, double))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert _numbers(other[key]) == pytest.approx(_numbers(value), rel=1e-9), key


def test_more_processes_than_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    few = options({**SHORT, "replay_batch": 4})
    assert cli.main(["train", "--method", "gd", *few, "--out", str(tmp_path / "run")]) == 2
    assert "--replay-batch is 4, but torchrun has started 5 processes" in capsys.readouterr().err
    assert cli.main(["compare", "--out", str(tmp_path / "comparison")]) == 2
    assert "run it without torchrun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
