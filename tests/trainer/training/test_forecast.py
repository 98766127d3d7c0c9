"""How long a run takes: passes through the network, counted by hand, and times in words."""

from __future__ import annotations

from pathlib import Path

from crl_diffusion.config.settings import RunConfig
from crl_diffusion.files import read_rows
from crl_diffusion.training import forecast
from crl_diffusion.training.plan import resolve
from helpers.trainer_runs import MakeRun, Short, train


def test_passes_are_counted() -> None:
    """By hand: two tasks of two classes."""
    sizes = {"pool": 5, "pool_steps": 2, "eval_samples": 3, "eval_steps": 4, "batch": 8, "replay_batch": 6}
    config = resolve(RunConfig(method="gd+rank1", tasks=2, fisher_samples=100, **sizes))
    evaluations = (2 + 4) * 3 * 4
    expected = 38 * 3 * 8 + 19 * (3 * 8 + (3 + 1) * 6) + evaluations + 2 * 5 * 2 + 4 * 100
    assert forecast.passes(config, [38, 19]) == expected
    assert forecast.passes(resolve(RunConfig(method="joint", tasks=2, **sizes)), [57]) == 57 * 3 * 8 + 4 * 3 * 4
    l2 = resolve(RunConfig(method="gd+l2", tasks=2, fisher_samples=100, **sizes))
    assert forecast.passes(l2, [38, 19]) == expected - 4 * 100
    for method, plain in (("ddgr", "replay"), ("guided-gd", "gd")):
        guided, pool = (resolve(RunConfig(method=name, tasks=2, **sizes)) for name in (method, plain))
        assert forecast.passes(guided, [10, 10]) == forecast.passes(pool, [10, 10])
    fresh = resolve(RunConfig(method="masip", tasks=2, fresh_steps=2, **sizes))
    assert forecast.passes(fresh, [10, 10]) == 20 * 3 * 8 + 10 * (3 + 1 + 2) * 6 + evaluations


def test_times_in_words() -> None:
    words = [forecast.in_words(seconds) for seconds in (40, 600, 2.2 * 3600, 15 * 3600, 31 * 86400)]
    assert words == ["40 seconds", "10 minutes", "2.2 hours", "15 hours", "31 days"]


def test_the_forecast_counts_the_remaining_passes(short: Short, make_run: MakeRun) -> None:
    run = make_run(short("gd+rank1"))
    config, plan = run.config, run.stages
    # A step of the first stage is 3 passes of 8 images; of the second, 3 of 8 + 4 images and one of the teacher's on 4.
    assert [forecast.step_passes(config, stage) for stage in plan] == [24, 40]
    # 2 classes x 4 images x 2 steps; the pool's 2 x 3 x 2, and 4 passes of 8 samples. Then 4 classes x 4 x 2.
    assert [forecast.end_passes(config, plan, stage) for stage in plan] == [16 + 12 + 32, 32]
    left = forecast.seconds_left(config, plan, run.stage_steps, plan[0], 2, 24.0)
    assert left == 4 * 24 + 6 * 40 + 60 + 32


def test_a_run_of_epochs_with_a_forecast_in_every_stage(short: Short, tmp_path: Path, extractor_folder: Path) -> None:
    lines = train(short("gd", epochs=1, batch=35), tmp_path / "run", extractor_folder)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in rows if r["kind"] == "step"][3::4] == [(1, 7), (2, 7)]
    about = [line for line in lines if line.startswith("about ")]
    assert "for this run (8 steps, now at " in about[0]
    assert "for the rest of this run (1 steps, now at " in about[1]
    assert "about" not in (tmp_path / "run" / "metrics.jsonl").read_text()
