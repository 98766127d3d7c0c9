"""Short runs of the trainer: their settings, command lines and processes, and whether two of them are the same run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.evaluation.summaries import TIMES
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.training import loop
from crl_diffusion.training.run import Run
from torch import Tensor, nn

MakeRun = Callable[[RunConfig], Run]  # types of the fixtures in tests/trainer/conftest.py
Short = Callable[..., RunConfig]
TrainCommand = Callable[..., int]

# For runs whose Fisher matrices come from a few samples.
few_samples = pytest.mark.filterwarnings(
    "ignore:(only .* of the trace of the Fisher|the mean gradient is mostly noise)"
)
SHORT: dict[str, Any] = {
    "tasks": 2,
    "steps": 6,
    "batch": 8,
    "replay_batch": 4,
    "pool": 3,
    "pool_steps": 2,
    "eval_samples": 4,
    "eval_steps": 2,
    "fisher_samples": 8,
    "log_every": 2,
    "checkpoint_every": 4,
    "device": "cpu",
}


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def train_words(out: Path, extractor_folder: Path, method: str = "gd+rank1", **settings: Any) -> list[str]:
    """The command line of a short run, after `crl-diffusion`."""
    places = ["--out", str(out), "--extractor-folder", str(extractor_folder)]
    return ["train", "--method", method, *options({**SHORT, **settings}), *places]


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[[], None]) -> None:
    """Have `act` called when the function `name` of `owner` is called for the call-th time, before it runs."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*arguments, **named)

    patch.setattr(owner, name, counted)


def train(config: RunConfig, out: Path, extractor_folder: Path) -> list[str]:
    """Train in this process; returns the lines that the run has printed."""
    lines: list[str] = []
    loop.train(config, out, extractor_folder=extractor_folder, say=lines.append)
    return lines


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def require_one_line(errors: str, *parts: str) -> None:
    """An error on stderr is one line and contains all `parts`."""
    assert errors.startswith("crl-diffusion: error: "), errors
    assert errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors


def same_end(a: Path, b: Path, message: str = "") -> None:
    """Equal metrics, byte by byte, and equal checkpoints of every finished stage, bit by bit."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes(), message
    for stage in range(1, SHORT["tasks"] + 1):
        first, second = (checkpoint.load(run / "checkpoints" / f"{stage:02d}-00000000.safetensors") for run in (a, b))
        assert first.tensors.keys() == second.tensors.keys(), message
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), f"{name}\n{message}"
    samples = f"samples/after-task-{SHORT['tasks']}.safetensors"
    assert (a / samples).read_bytes() == (b / samples).read_bytes(), message


def same_folder(a: Path, b: Path, drawn: Sequence[str] = ()) -> None:
    """Equal records, checkpoints of ends of stages, kept images and pictures; times may differ."""
    same_end(a, b)
    for name in ("config.json", "samples/after-task-1.safetensors", *drawn):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    first, second = (json.loads((run / "summary.json").read_text()) for run in (a, b))
    assert first.keys() == second.keys()
    assert all(first[key] == second[key] for key in first if key not in TIMES)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NEWEST = "checkpoints/01-00000004.safetensors"  # of an `unfinished_copy`


def unfinished_copy(finished: Path, out: Path) -> Path:
    """A copy of a finished short run as it was after four steps of its second task; returns its folder."""
    shutil.copytree(finished, out)
    for name in ("summary.json", "samples/after-task-2.safetensors", "samples.png", "curves.png"):
        (out / name).unlink()
    for name in ("01-00000006", "02-00000000"):
        (out / "checkpoints" / f"{name}.safetensors").unlink()
    for name, count in checkpoint.load(out / NEWEST).rows.items():
        lines = (out / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (out / f"{name}.jsonl").write_bytes(b"".join(lines[:count]))
    return out


def child_environment() -> dict[str, str]:
    """What makes a child process find the same packages and compute the same bits."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": paths, "CI": "true"}


def crl_diffusion(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m crl_diffusion` with as many threads as this process has."""
    return python("-m", "crl_diffusion", *arguments)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **child_environment()}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, check=False)
