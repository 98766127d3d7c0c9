"""Runs that are killed again and again, wherever they are, end with the bits of those that are not."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import tasks
from crl_diffusion.evaluation import evaluate
from crl_diffusion.training.plan import resolve
from helpers.trainer_runs import SHORT, python, same_end, train_words

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
SCRIPT = Path(__file__).with_name("killed_runs.py")


def _killed_again_and_again(method: str, seed: int, kills: int, extractor_folder: Path, out: Path) -> None:
    # Kept statistics of real images first: a run that writes them has more moments than the one that is to be killed.
    config = resolve(RunConfig(method=method, ema=0.9, **SHORT))
    images = tasks.load(config, Path("unused"))
    evaluate.prepare(evaluate.instruments("cnn", images, extractor_folder), config, images)
    done = python(SCRIPT, seed, kills, *train_words(out, extractor_folder, method, ema=0.9))
    message = f"python {SCRIPT.name} {seed} {kills} ...\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, message
    assert "killed at moment" in done.stdout, message
    same_end(out.with_name(f"{out.name}-uninterrupted"), out, message)
    assert not [path.name for path in out.rglob("*") if ".tmp" in path.name], message


@needs_fork
def test_three_kills_at_random_moments(extractor_folder: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    _killed_again_and_again("gd+rank1", seed, 3, extractor_folder, tmp_path / "run")


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize(
    "method",
    ["gd+rank1", "gd+bands8:slopes,gradient", "replay+gd+diagonal", "masip", "ddgr+rank1", "bands2:slopes,alone"],
)
def test_ten_kills_at_random_moments(method: str, extractor_folder: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    _killed_again_and_again(method, seed, 10, extractor_folder, tmp_path / "run")
