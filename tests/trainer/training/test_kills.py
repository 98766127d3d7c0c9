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
from helpers.trainer_runs import SHORT, options, python, same_end

SCRIPT = Path(__file__).with_name("killed_runs.py")


def _killed_again_and_again(method: str, seed: int, kills: int, extractor_folder: Path, out: Path) -> None:
    settings = {**SHORT, "ema": 0.9}
    # Kept statistics of real images first: a run that writes them has more moments than the one that is to be killed.
    config = resolve(RunConfig(method=method, **settings))
    images = tasks.load(config, Path("unused"))
    evaluate.prepare(evaluate.instruments("cnn", images, extractor_folder), config, images)
    arguments = ["train", "--method", method, *options(settings), "--out", out, "--extractor-folder", extractor_folder]
    done = python(SCRIPT, seed, kills, *arguments)
    said = f"python {SCRIPT.name} {seed} {kills} ...\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert "killed at moment" in done.stdout, said
    same_end(out.with_name(f"{out.name}-whole"), out, said)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
def test_three_kills_at_random_moments(extractor_folder: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    _killed_again_and_again("gd+rank1", seed, 3, extractor_folder, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
@pytest.mark.parametrize(
    "method", ["gd+rank1", "gd+bands8:slopes,gradient", "replay+gd+diagonal", "masip", "bands2:slopes,alone"]
)
def test_ten_kills_at_random_moments(method: str, extractor_folder: Path, tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    _killed_again_and_again(method, seed, 10, extractor_folder, tmp_path / "run")
