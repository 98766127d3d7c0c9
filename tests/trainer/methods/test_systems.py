"""Every published system by its own name, from its first step to its summary."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from crl_diffusion.config.systems import SYSTEMS
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training import loop
from helpers.trainer_runs import Short

STEPS = 4


@pytest.mark.filterwarnings("ignore:only .* of the trace of the Fisher")
@pytest.mark.filterwarnings("ignore:the mean gradient is mostly noise")
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_three_tasks_of_digits(name: str, short: Short, tmp_path: Path, extractor_folder: Path) -> None:
    config = short(name, model="mlp", tasks=3, steps=STEPS)
    loop.train(config, tmp_path, extractor_folder=extractor_folder)
    summary, rows = json.loads((tmp_path / "summary.json").read_text()), read_metrics(tmp_path)
    assert summary["method"] == SYSTEMS[name].method
    steps = [row for row in rows if row["kind"] == "step"]
    joint = config.recipe.curriculum == "joint"
    assert {row["stage"]: row["step"] for row in steps} == (
        {1: 3 * STEPS} if joint else dict.fromkeys((1, 2, 3), STEPS)
    )
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert any(row["replay_loss"] for row in steps) == bool(config.recipe.replays)
    last = summary["fid_matrix"][-1]
    assert len(last) == 3
    assert math.isfinite(summary["average_fid"])
    assert summary["average_fid"] == pytest.approx(sum(last) / 3)
