"""What the trainer's tests share: one feature extractor, one short configuration, one finished run."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import tasks
from crl_diffusion.evaluation import classifiers, evaluate
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import resolve
from crl_diffusion.training import loop
from crl_diffusion.training.run import Run

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


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def short() -> Callable[..., RunConfig]:
    """A run of seconds; anything can be set."""

    def make(method: str = "gd+rank1", **settings: Any) -> RunConfig:
        return RunConfig(method=method, **{**SHORT, **settings})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def digits() -> tasks.Data:
    return tasks.load(RunConfig(method="gd"), Path("unused"))


@pytest.fixture(scope="session")
def extractor_folder(digits: tasks.Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits' cnn is kept; tests may add to it."""
    folder = tmp_path_factory.mktemp("extractors")
    classifiers.classifier(digits, folder)
    return folder


@pytest.fixture(scope="session")
def extractor(digits: tasks.Data, extractor_folder: Path) -> classifiers.Classifier:
    return classifiers.classifier(digits, extractor_folder)


@pytest.fixture(scope="session")
def finished(extractor_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted short run of gd+rank1; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = RunConfig(method="gd+rank1", **SHORT)
    with warnings.catch_warnings():
        # From 8 samples: no wonder.
        warnings.filterwarnings("ignore", "only .* of the trace of the Fisher|the mean gradient is mostly noise")
        loop.train(config, out, extractor_folder=extractor_folder, say=lambda line: None)
    return out


@pytest.fixture
def make_run(extractor_folder: Path, tmp_path: Path) -> Callable[[RunConfig], Run]:
    """A run that has not taken a step."""

    def make(config: RunConfig) -> Run:
        config = resolve(config)
        images = tasks.load(config, Path("unused"))
        return Run(
            config, tmp_path, images, evaluate.instruments("cnn", images, extractor_folder), say=lambda line: None
        )

    return make


def options(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def same_end(a: Path, b: Path, said: str = "") -> None:
    """Equal metrics, byte by byte, and equal checkpoints of every finished stage, bit by bit."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes(), said
    for stage in range(1, SHORT["tasks"] + 1):
        first, second = (checkpoint.load(run / "checkpoints" / f"{stage:02d}-00000000.safetensors") for run in (a, b))
        assert first.tensors.keys() == second.tensors.keys(), said
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), f"{name}\n{said}"
    samples = f"samples/after-task-{SHORT['tasks']}.safetensors"
    assert (a / samples).read_bytes() == (b / samples).read_bytes(), said


def child_environment() -> dict[str, str]:
    """What makes a child process find the same packages and compute the same bits."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": paths, "CI": "true"}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m crl_diffusion` with as many threads as this process has."""
    return python("-m", "crl_diffusion", *arguments)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **child_environment()}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env, check=False)
