"""Interrupted runs end with the same bits as uninterrupted ones."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion.config.settings import ADDED
from crl_diffusion.errors import OptionError
from crl_diffusion.evaluation.summaries import TIMES
from crl_diffusion.files import read_rows
from crl_diffusion.reporting.runs import read_finished
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import writing
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training import loop
from crl_diffusion.training import run as training_run
from helpers.trainer_runs import (
    SHORT,
    Short,
    at_call,
    crl_diffusion,
    few_samples,
    python,
    same_end,
    train,
    train_words,
)
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


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.2},
    "a later rate": {"lr_later": 0.1},
    "shared latents": {"pool_latents": "shared"},
    "a preconditioned penalty": {"method": "gd+rank1:preconditioned,lam=0.01"},
    "an average beside a penalty": {"method": "gd+rank1:slopes,gradient", "ema": 0.9},
    "fine-tuning": {"method": "fine-tune"},
    "an L2 penalty to the last task": {"method": "gd+l2"},
    "an L2 penalty to the average task": {"method": "l2-average:gradient"},
    "interpolation without replays": {"method": "interpolate0.3"},
    "interpolation of the average": {"method": "replay+rank1+interpolate0.5", "ema": 0.9},
}


@few_samples
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_any_option_resumes_to_the_same_bits(
    name: str, extractor_folder: Path, tmp_path: Path, short: Short
) -> None:
    config = short(**{"model": "mlp", **OPTIONS[name]})
    train(config, tmp_path / "whole", extractor_folder)
    kinds = {row["kind"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")}
    assert {"step", "evaluation", "movement", "held_out_loss"} <= kinds
    _unfinish(tmp_path / "whole", tmp_path / "run", ["01-00000006", "02-00000000"])
    lines = train(config, tmp_path / "run", extractor_folder)
    assert any("resuming after 1 finished stage(s) and 4 steps" in line for line in lines)
    same_end(tmp_path / "whole", tmp_path / "run")


@few_samples
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["ddgr", "guided-gd+rank1:gradient"])
@pytest.mark.parametrize(("call", "left"), [(7, "01-00000000"), (12, "01-00000004")])
def test_a_guided_run_resumes_to_the_same_bits_within_a_task_and_between_tasks(
    method: str, call: int, left: str, extractor_folder: Path, tmp_path: Path, short: Short
) -> None:
    """Three tasks: the classifier of the first goes on to learn the second."""
    config = short(method, model="mlp", tasks=3)
    train(config, tmp_path / "whole", extractor_folder)

    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training_run, "training_step", call, kill)
        with pytest.raises(Killed):
            train(config, out, extractor_folder)
    assert sorted(path.stem for path in (out / "checkpoints").iterdir())[-1] == left
    lines = train(config, out, extractor_folder)
    assert any("resuming after 1 finished stage(s)" in line for line in lines)
    same_end(tmp_path / "whole", out)
    kept = checkpoint.load(out / "checkpoints" / "02-00000000.safetensors")
    assert "memory/source/guided/guide/head.weight" in kept.tensors


def _of_an_earlier_version(out: Path) -> None:
    """The records as they were before movement, held-out losses and memory, when only replays kept the start of the
    stage."""
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    new = [json.loads(line)["kind"] in ("movement", "held_out_loss", "memory") for line in lines]
    assert any(new)
    (out / "metrics.jsonl").write_bytes(b"".join(line for line, n in zip(lines, new, strict=True) if not n))
    config = json.loads((out / "config.json").read_text())["run"]
    assert not config.keys() & ADDED.keys()
    for saved in [checkpoint.load(path) for path in sorted((out / "checkpoints").iterdir())]:
        count, tensors = saved.rows["metrics"], saved.tensors
        rows = [line for line, n in zip(lines[:count], new, strict=False) if not n]
        if not config["recipe"]["replays"]:
            assert saved.part("memory/teacher")
            tensors = {key: x for key, x in tensors.items() if not key.startswith("memory/teacher")}
        digests = {**saved.digests, "metrics.jsonl": hashlib.sha256(b"".join(rows)).hexdigest()}
        counts = {**saved.rows, "metrics": len(rows)}
        checkpoint.save(out / "checkpoints", saved._replace(rows=counts, tensors=tensors, digests=digests))


@few_samples
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("method", ["fine-tune", "rank1", "gd"])
def test_a_run_of_an_earlier_version_resumes(method: str, extractor_folder: Path, tmp_path: Path, short: Short) -> None:
    """It ends with the same weights and evaluations. Without replays, the weights that the stage began with are lost:
    its movement is not recorded."""
    config, whole, run = short(method, model="mlp"), tmp_path / "whole", tmp_path / "run"
    train(config, whole, extractor_folder)
    _unfinish(whole, run, ["01-00000006", "02-00000000"])
    _of_an_earlier_version(run)
    lines = train(config, run, extractor_folder)
    assert any("resuming after 1 finished stage(s) and 4 steps" in line for line in lines)
    lost = [("held_out_loss", 1), ("memory", None)] + ([] if method == "gd" else [("movement", None)])
    expected = [r for r in read_metrics(whole) if (r["kind"], r.get("after_task")) not in lost]
    assert read_metrics(run) == expected
    first, second = (checkpoint.load(out / "checkpoints" / "02-00000000.safetensors") for out in (whole, run))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(x, second.tensors[name]) for name, x in first.tensors.items())
    summaries = [
        {k: x for k, x in read_finished(out).items() if "sha256" not in k and k not in TIMES} for out in (run, whole)
    ]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"lr": 0.01}, "lr 0.002 there, 0.01 asked for"),
        ({"lr_later": 0.1}, "lr_later 1.0 there, 0.1 asked for"),
        ({"optimizer": "sgd"}, "optimizer 'adam' there, 'sgd' asked for"),
        ({"pool_latents": "shared"}, "pool_latents 'per-class' there, 'shared' asked for"),
    ],
)
def test_a_folder_of_another_run_is_refused_with_what_differs(
    finished: Path, short: Short, settings: dict[str, Any], difference: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(f"holds another run ({difference})")):
        loop.train(short(**settings), finished)


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
    losses = [(row["after_task"], row["task"]) for row in rows if row["kind"] == "held_out_loss"]
    assert losses == evaluations
    assert all(len(row["by_band"]) == 10 for row in rows if row["kind"] == "held_out_loss")
    assert [row["task"] for row in rows if row["kind"] == "movement"] == [2]
    (fisher,) = [row for row in rows if row["kind"] == "fisher"]
    assert fisher["num_samples"] == SHORT["fisher_samples"]
    assert fisher["state_bytes"] > 4 * 350_000
    assert all(row["replay_loss"] == 0 for row in rows if row["kind"] == "step" and row["stage"] == 1)
    assert all(row["replay_loss"] > 0 for row in rows if row["kind"] == "step" and row["stage"] == 2)


def test_times_are_logged_outside_of_metrics(finished: Path) -> None:
    assert "ms" not in (finished / "metrics.jsonl").read_text()
    timings = read_rows(finished / "timings.jsonl")
    start, *timings = timings
    (end,) = (row for row in timings if "task_end_seconds" in row)
    assert end.keys() == {"stage", "task_end_seconds", "task_end_cpu_seconds"}
    assert end["stage"] == 1
    assert end["task_end_cpu_seconds"] > 0
    assert end["task_end_seconds"] > 0
    assert timings.index(end) == 3  # after the steps of its task
    timings.remove(end)
    assert start["started"].startswith("20")
    assert start["processes"] == 1
    assert all(row["step_ms"] > 0 and row["step_cpu_ms"] > 0 for row in timings)
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
    for path in extractor_folder.glob("cnn-*.safetensors"):  # of this run and perhaps of other tests' data
        tensors = load_file(path)
        tensors["scale"] = tensors["scale"] * 2
        with safe_open(path, framework="pt") as file:
            save_file(tensors, tmp_path / path.name, file.metadata())
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"the extractor is cnn32-.*was begun with cnn32-"):
        loop.train(short(), out, extractor_folder=tmp_path)
    assert (out / "metrics.jsonl").read_bytes() == before
