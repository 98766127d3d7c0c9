"""Interrupted runs end with the same bits as uninterrupted ones."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from crl_diffusion.errors import OptionError
from crl_diffusion.files import read_rows
from crl_diffusion.run_folder.layout import writing
from crl_diffusion.training import loop
from helpers.trainer_runs import SHORT, Short, crl_diffusion, few_samples, python, same_end, train, train_words
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# Kills its own process, with a signal that cannot be caught, as the n-th call of a function of the trainer returns.
# Other moments: test_kills.py.
KILLED = """
import os, signal, sys
from importlib import import_module
from crl_diffusion.cli import main
module = import_module("crl_diffusion.{module}")
original, calls = module.{name}, 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    result = original(*args, **kwargs)
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
module.{name} = counted
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_killed_in_the_middle_of_a_task_resumes_to_the_same_bits(
    finished: Path, extractor_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = train_words(out, extractor_folder)

    # In the 6th and last step of the second task, with a checkpoint after the 4th.
    script = KILLED.format(module="training.run", name="training_step", call=12)
    assert python("-c", script, *arguments).returncode == -signal.SIGKILL
    assert sorted(path.stem for path in (out / "checkpoints").iterdir())[-1] == "01-00000004"
    assert not (out / "summary.json").exists()
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "los')  # what a crash in the middle of a write leaves behind

    again = crl_diffusion(*arguments)
    assert again.returncode == 0, again.stderr
    assert "resuming after 1 finished stage(s) and 4 steps" in again.stdout
    same_end(finished, out)

    # A finished run is left alone.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    from crl_diffusion.cli import main

    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def _unfinish(finished: Path, out: Path, drop: list[str]) -> None:
    """A copy of a finished run as it was before its last checkpoints."""
    shutil.copytree(finished, out)
    (out / "summary.json").unlink()
    for name in drop:
        (out / "checkpoints" / f"{name}.safetensors").unlink()


@few_samples
@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_after_a_damaged_checkpoint_the_run_resumes_from_the_one_before(
    finished: Path, extractor_folder: Path, tmp_path: Path, short: Short, damage: str
) -> None:
    out = tmp_path / "run"
    _unfinish(finished, out, [])
    path = out / "checkpoints" / "02-00000000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content[: -len(content) // 3] if damage == "truncated" else content)
    lines = train(short(), out, extractor_folder)
    assert any("02-00000000.safetensors is damaged" in line for line in lines)
    assert any("resuming after 1 finished stage(s) and 6 steps" in line for line in lines)
    same_end(finished, out)


@few_samples
@pytest.mark.parametrize("left", ["nothing", "the first stage's steps", "the first stage"])
def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_bits(
    finished: Path, extractor_folder: Path, tmp_path: Path, short: Short, left: str
) -> None:
    out = tmp_path / "run"
    names = sorted(path.stem for path in (finished / "checkpoints").iterdir())
    assert names == ["01-00000000", "01-00000004", "01-00000006", "02-00000000"]
    keep = {"nothing": [], "the first stage's steps": names[:1], "the first stage": names[:2]}[left]
    _unfinish(finished, out, [name for name in names if name not in keep])
    train(short(), out, extractor_folder)
    same_end(finished, out)


def test_a_folder_of_another_run_is_refused_with_what_differs(finished: Path, short: Short) -> None:
    with pytest.raises(OptionError, match=r"holds another run \(lr 0.002 there, 0.01 asked for\)"):
        loop.train(short(lr=0.01), finished)


def test_rows_are_complete_and_in_order(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    steps = [(row["stage"], row["step"]) for row in rows if row["kind"] == "step"]
    assert steps == [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6)]
    evaluations = [(row["after_task"], row["task"]) for row in rows if row["kind"] == "evaluation"]
    assert evaluations == [(1, 1), (2, 1), (2, 2)]
    for row in rows:
        if row["kind"] == "evaluation":
            assert row["extractor"].startswith("cnn32-digits-8px-")
            assert (row["samples"], row["sampler"], row["sampler_steps"]) == (8, "DDIM", 2)
    (fisher,) = [row for row in rows if row["kind"] == "fisher"]
    assert fisher["num_samples"] == SHORT["fisher_samples"]
    assert fisher["state_bytes"] > 4 * 350_000
    assert all(row["replay_loss"] == 0 for row in rows if row["kind"] == "step" and row["stage"] == 1)
    assert all(row["replay_loss"] > 0 for row in rows if row["kind"] == "step" and row["stage"] == 2)


def test_times_are_logged_outside_of_metrics(finished: Path) -> None:
    assert "ms" not in (finished / "metrics.jsonl").read_text()
    timings = read_rows(finished / "timings.jsonl")
    start, *timings = timings
    assert start["started"].startswith("20")
    assert start["processes"] == 1
    assert all(row["step_ms"] > 0 for row in timings)
    assert ["penalty_ms" in row for row in timings] == [False] * 3 + [True] * 3
    assert "started" not in (finished / "metrics.jsonl").read_text()
    config = json.loads((finished / "config.json").read_text())
    assert config["environment"]["torch"] == torch.__version__
    penalty = config["run"]["recipe"]["penalty"]
    assert (penalty["fisher"], penalty["rank"], penalty["lam"], penalty["mode"]) == ("low_rank", 1, 20.0, "decoupled")


def test_two_processes_do_not_write_to_one_folder(short: Short, tmp_path: Path, extractor_folder: Path) -> None:
    pytest.importorskip("fcntl", reason="fcntl is missing: file locks need POSIX")
    out = tmp_path / "run"
    out.mkdir()
    with writing(out), pytest.raises(OptionError, match="is being written by another process"):
        loop.train(short(), out, extractor_folder=extractor_folder)


def test_another_extractor_is_refused_in_the_middle_of_a_run(
    finished: Path, extractor_folder: Path, tmp_path: Path, short: Short
) -> None:
    out = tmp_path / "run"
    _unfinish(finished, out, ["02-00000000"])
    (path,) = extractor_folder.glob("cnn-*.safetensors")
    tensors = load_file(path)
    tensors["scale"] = tensors["scale"] * 2
    with safe_open(path, framework="pt") as file:
        save_file(tensors, tmp_path / path.name, file.metadata())
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"the extractor is cnn32-.*was begun with cnn32-"):
        loop.train(short(), out, extractor_folder=tmp_path)
    assert (out / "metrics.jsonl").read_bytes() == before
