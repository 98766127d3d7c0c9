"""Fixtures of the trainer's tests: a feature extractor, a short configuration, a finished run, the command of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import tasks
from crl_diffusion.evaluation import classifiers, evaluate
from crl_diffusion.reporting import run_pictures
from crl_diffusion.training import loop
from crl_diffusion.training.plan import resolve
from crl_diffusion.training.run import Run
from helpers.trainer_runs import SHORT, MakeRun, Short, TrainCommand, train_words


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def short() -> Short:
    """A run of seconds; anything can be set."""

    def make(method: str = "gd+rank1", **settings: Any) -> RunConfig:
        return resolve(RunConfig(method=method, **{**SHORT, **settings}))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def digits() -> tasks.Data:
    return tasks.load(resolve(RunConfig(method="gd")), Path("unused"))


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
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow from metrics.jsonl and the samples, and take most of the time of so short a run."""
    monkeypatch.setattr(run_pictures, "of_run", lambda run: [])


@pytest.fixture
def train_command(extractor_folder: Path, tmp_path: Path) -> TrainCommand:
    """`crl-diffusion train` of a short run into a folder of this test, by default `run`; returns the exit code."""

    def main(folder: str = "run", **settings: Any) -> int:
        return cli.main(train_words(tmp_path / folder, extractor_folder, **settings))

    return main


@pytest.fixture
def make_run(extractor_folder: Path, tmp_path: Path) -> MakeRun:
    """A run that has not taken a step."""

    def make(config: RunConfig) -> Run:
        config = resolve(config)
        images = tasks.load(config, Path("unused"))
        return Run(
            config, tmp_path, images, evaluate.instruments("cnn", images, extractor_folder), say=lambda line: None
        )

    return make
