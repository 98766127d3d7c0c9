"""Two processes of torchrun make the run that one makes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, processes
from crl_diffusion.cli import messages
from crl_diffusion.errors import OptionError
from crl_diffusion.files import read_rows
from crl_diffusion.run_folder import checkpoint
from helpers.image_folders import write_photos
from helpers.trainer_runs import SHORT, child_environment, options, python, require_one_line

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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
def test_processes_that_were_started_differently_are_named_in_one_line_and_write_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_photos(tmp_path / name, {"cat": 12, "dog": 12})
    changed = tmp_path / "b" / "dog" / "3.png"
    shutil.copy(tmp_path / "b" / "dog" / "4.png", changed)
    common = ["train", *options({**SHORT, "data": "folder"}), "--out", str(tmp_path / "run")]
    words = (
        ["--method", "gd", "--data-root", str(tmp_path / "a")],
        ["--method", "gd+rank1", "--data-root", str(tmp_path / "b"), "--lr", "0.01", "--extractor", "lenet"],
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, own in enumerate(words):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env |= {**os.environ, **child_environment()} | {name: str(value) for name, value in env.items()}
        command = [sys.executable, "-m", "crl_diffusion", *common, *own]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2, errors
        lines = [line for line in errors.splitlines() if line.startswith("crl-diffusion: ")]
        require_one_line(
            f"{lines[0]}\n",
            "torchrun has started processes that differ: ",
            "--method is gd in process 0 and gd+rank1 in 1; ",
            "--lr is 0.002 in process 0 and 0.01 in 1; ",
            "--extractor is cnn in process 0 and lenet in 1; ",
            "the digest of the images is ",
            "give all of them the same command",
        )
        assert "--seed" not in lines[0]
        assert len(lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_each_difference_is_named_with_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(processes.distributed, "destroy_process_group", lambda: left.append(True))
    facts = {"the run": "unfinished", "--lr": "0.1", "--seed": "0"}

    def require_same(*others: dict[str, str]) -> None:
        monkeypatch.setattr(processes, "everyone", lambda mine: [mine, *others])
        processes.require_same(facts)

    require_same(facts, facts)
    assert not left
    for others, words in (
        ([facts, facts | {"--seed": "1"}], "--seed is 0 in process 0 and 1 in 2;"),
        ([facts | {"--lr": "0.2"}, facts | {"--lr": "0.2"}], "--lr is 0.1 in process 0 and 0.2 in 1 and 2;"),
        ([{"the run": "finished"}, facts], "differ: the run is unfinished in process 0 and finished in 1; give"),
    ):
        left.clear()
        with pytest.raises(OptionError, match=words):
            require_same(*others)
        assert left == [True]


def test_empty_variables_of_torchrun_are_unset_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    assert (processes.launched(), processes.launched_rank(), messages.is_first()) == (1, 0, True)
