"""Regimes of `benchmarks.evidence`: which runs are made, what is chosen from them, and verdicts on the predictions."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, cast

import matplotlib.pyplot as plt
import pytest
from crl_diffusion.config.settings import check
from helpers.run_folders import fabricate, measured_as

from benchmarks.evidence import ledger
from benchmarks.evidence.regime import running
from benchmarks.evidence.regime.definitions import REGIMES, Arm, Regime
from benchmarks.evidence.regime.pictures import Point, leave_out_far
from benchmarks.evidence.regime.predictions import Difference, Paired, gains_nothing, predictions
from benchmarks.evidence.regime.report import write_report
from benchmarks.evidence.regime.runs import Result, Runs, Wanted

RANK1, RANDOM = "gd+rank1:gradient", "gd+rank1:random,gradient"
SMALL = Regime(
    common={"data": "digits", "tasks": 3, "steps": 20, "lr_schedule": "constant", "device": "cpu"},
    settings={
        "constant": {}, "one-cycle": {"lr_schedule": "one-cycle"}, "ema": {"ema": 0.9}, "later-0.3": {"lr_later": 0.3},
        "twice-the-rate": {"lr": 0.004}, "sgd-0.1": {"optimizer": "sgd", "lr": 0.1},
        "sgd-1.0": {"optimizer": "sgd", "lr": 1.0},
    },
    chosen={"sgd": ("sgd-0.1", "sgd-1.0")},
    seeds=tuple(range(10)),
    arms=(
        *(Arm(setting, "gd") for setting in ("constant", "one-cycle", "ema", "later-0.3", "twice-the-rate", "sgd")),
        *(Arm(setting, RANK1, (300.0, 3000.0)) for setting in ("constant", "sgd", "ema", "one-cycle")),
        Arm("constant", RANDOM, (30.0, 100.0)),
        Arm("constant", RANDOM, borrowed="same lam", model=f"constant {RANK1}"),
        Arm("constant", RANDOM, borrowed="same precision", model=f"constant {RANK1}"),
        Arm("constant", "gd+rank1:top,gradient", (10.0, 100.0)),
        Arm("constant", "gd+rank1:top,gradient", borrowed="same lam a", model=f"constant {RANK1}"),
        Arm("constant", "gd+rank1", (20.0, 2000.0)),
    ),
    curve=(10, 20, 40),
    curve_seeds=(0, 1),
)  # fmt: skip
FIDS = {  # average FIDs of final runs by arm
    **{"constant gd": 6.0, "one-cycle gd": 4.0, "ema gd": 4.2, "later-0.3 gd": 5.0, "twice-the-rate gd": 8.0},
    **{"sgd gd": 9.0, f"constant {RANK1}": 5.0, f"sgd {RANK1}": 9.0, f"ema {RANK1}": 4.2, f"one-cycle {RANK1}": 4.0},
    **{f"constant {RANDOM}": 5.1, f"constant {RANDOM}, same lam": 7.0, f"constant {RANDOM}, same precision": 5.1},
    **{"constant gd+rank1:top,gradient": 5.0, "constant gd+rank1:top,gradient, same lam a": 5.1},
    "constant gd+rank1": 6.0,
}


def make(root: Path, wanted: Wanted, fid: float, precision: float = 8.0, curvature: float = 0.1) -> None:
    """A finished run with this average FID, and with movement rows."""
    config = wanted.config
    values = {name: value for name, value in vars(config).items() if name not in ("method", "seed")}
    folder = fabricate(root / wanted.folder, config.method, config.seed, **values)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "fisher":
            row["curvatures"] = [curvature]
    for task in (2, 3):
        row = {"kind": "movement", "task": task, "displacement": float(task), "random_drift": 0.01, "drift": []}
        rows.append({**row, "precision": precision if config.optimizer == "adam" else None})
    rows.append({"kind": "held_out_loss", "after_task": 3, "task": 1, "by_band": [1 / 3] * 10})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measured_as(folder, fid=fid)


TUNED = {  # by setting and method: average FID, precision, curvature
    ("sgd-0.1", "gd"): (30.0, 0.0, 0.1), ("sgd-1.0", "gd"): (9.0, 0.0, 0.1),
    ("constant", f"{RANK1},lam=300"): (5.5, 7.8, 0.1), ("constant", f"{RANK1},lam=3000"): (5.0, 7.0, 0.1),
    ("constant", f"{RANDOM},lam=30"): (5.2, 7.1, 0.1), ("constant", f"{RANDOM},lam=100"): (5.1, 6.0, 0.1),
    ("constant", "gd+rank1:top,gradient,lam=10"): (5.4, 7.9, 0.5),
    ("constant", "gd+rank1:top,gradient,lam=100"): (5.3, 7.5, 0.5),
}  # fmt: skip


def tune(root: Path, regime: Regime = SMALL) -> Runs:
    """All tuning runs and the first seed's curve, by rounds, as the command makes them."""
    while True:
        runs = Runs(regime, root)
        missing = [run for run in runs.missing() if not run.part.startswith("final") or run.config.method == "gd"]
        missing = [run for run in missing if run.config.seed in (regime.tuning_seed, 0)]
        if not any(run.part.startswith("tuning") for run in missing):
            return runs
        for run in missing:
            setting = run.part.partition("-")[2]
            make(root, run, *TUNED.get((setting, run.config.method), (6.0, 8.0, 0.1)))


@pytest.mark.parametrize("name", REGIMES)
def test_every_configuration_of_a_regime_can_run(name, tmp_path):
    regime = REGIMES[name]
    runs = Runs(regime, tmp_path)
    assert [run for run in runs.missing() if run.part.startswith("tuning")]
    for run in (*runs.tuning(), *runs.curve()):
        check(run.config)
    assert len({arm.label for arm in regime.arms}) == len(regime.arms)
    assert regime.tuning_seed not in regime.seeds
    for arm in regime.arms:
        assert arm.setting in regime.settings or arm.setting in regime.chosen
        assert arm.borrowed == "" or runs.arm(arm.model).lams


def test_what_depends_on_a_choice_is_run_after_it(tmp_path):
    first = {run.folder for run in Runs(SMALL, tmp_path).missing()}
    assert "tuning-sgd-1.0/gd-seed100" in first
    assert f"tuning-ema/{RANK1.replace(':', '_')}_lam=300-seed100" in first
    assert not any("sgd" in folder and "rank1" in folder for folder in first)
    assert {"steps-10-constant/gd-seed0", "final-constant/gd-seed0", "steps-40-one-cycle/gd-seed0"} <= first
    assert not any(folder.startswith("final") and "gd-seed0" not in folder for folder in first)
    held_out = {run.config.held_out for run in Runs(SMALL, tmp_path).missing() if run.part.startswith("tuning")}
    assert held_out == {"validation"}


def test_rates_and_lams_are_those_with_the_lowest_fid_on_the_tuning_seed(tmp_path):
    runs = tune(tmp_path)
    assert runs.setting("sgd") == "sgd-1.0"
    methods = {arm.label: runs.method(arm) for arm in SMALL.arms}
    assert methods[f"constant {RANK1}"] == f"{RANK1},lam=3000"
    assert methods[f"constant {RANDOM}"] == f"{RANDOM},lam=100"
    assert methods[f"constant {RANDOM}, same lam"] == f"{RANDOM},lam=3000"
    assert methods[f"constant {RANDOM}, same precision"] == f"{RANDOM},lam=30"
    assert methods["constant gd+rank1:top,gradient, same lam a"] == "gd+rank1:top,gradient,lam=600"
    assert f"tuning-sgd-1.0/{RANK1.replace(':', '_')}_lam=300-seed100" in runs.results


def test_a_lam_whose_run_failed_is_not_chosen_and_nothing_waits_for_it(tmp_path):
    runs = tune(tmp_path)
    arm = runs.arm(f"constant {RANK1}")
    gone = runs.tried(arm)[3000.0].folder
    (tmp_path / gone / "summary.json").unlink()
    waiting = Runs(SMALL, tmp_path)
    assert waiting.lam(arm) is None
    assert [run.folder for run in waiting.missing()] == [gone]
    failed = Runs(SMALL, tmp_path, {gone})
    assert failed.lam(arm) == 300.0
    assert gone not in [run.folder for run in failed.missing()]


def test_final_runs_come_seed_by_seed_and_the_curve_shares_them(tmp_path):
    runs = tune(tmp_path)
    missing = runs.missing()
    assert not any(run.part.startswith("tuning") for run in missing)
    seeds = [run.config.seed for run in missing if run.part.startswith("final")]
    assert seeds == sorted(seeds)
    assert len({run.folder for run in missing}) == len(missing)
    assert "steps-20-constant/gd-seed1" not in {run.folder for run in missing}


def test_movement_survives_the_ledger(tmp_path):
    root, lines = tmp_path / "runs", tmp_path / "small.jsonl"
    run = Runs(SMALL, root).tuning_run("constant", f"{RANK1},lam=300")
    make(root, run, 5.0, 7.123456789)
    before = Runs(SMALL, root).results[run.folder]
    ledger.record(lines, root)
    ledger.restore(lines, tmp_path / "elsewhere")
    after = Runs(SMALL, tmp_path / "elsewhere").results[run.folder]
    assert after.precision == pytest.approx(before.precision, rel=1e-5)
    assert (after.displacement, after.curvature) == (2.5, pytest.approx(0.1))
    assert after.average_fid == before.average_fid
    assert after.of_kind("held_out_loss")[0]["by_band"] == [0.333333] * 10


class Measured(NamedTuple):
    """As much of a result as predictions read."""

    average_fid: float
    forgetting: float = 1.0


def verdicts(
    fids: dict[str, float], forgetting: dict[str, float] | None = None, arms: Collection[str] = FIDS
) -> list[str]:
    """Of ten seeds, each of which shifts all arms alike and each arm by a little of its own."""
    groups = {
        label: {
            seed: Measured(fid + 0.3 * seed + 0.02 * ((7 * i + 3 * seed) % 11 - 5), (forgetting or {}).get(label, 1.0))
            for seed in SMALL.seeds
        }
        for i, (label, fid) in enumerate(fids.items())
    }
    return [prediction.verdict for prediction in predictions(groups, "later-0.3 gd", arms)]


def test_the_hypothesis_is_supported_by_numbers_that_follow_it():
    assert verdicts(FIDS)[1:] == ["supported"] * 5


@pytest.mark.parametrize(
    ("changed", "number", "verdict"),
    [
        ({f"constant {RANK1}": 6.5}, 2, "refuted"),  # no gain
        ({f"constant {RANK1}": 6.0}, 2, "open"),
        ({f"constant {RANDOM}": 5.9}, 2, "refuted"),  # the direction matters
        ({f"constant {RANDOM}, same precision": 5.9}, 2, "refuted"),
        ({"later-0.3 gd": 5.8}, 3, "refuted"),
        ({f"sgd {RANK1}": 8.0}, 4, "refuted"),
        ({"constant gd+rank1": 5.5}, 5, "refuted"),
        ({f"one-cycle {RANK1}": 3.5}, 6, "refuted"),
        ({f"ema {RANK1}": 4.9}, 6, "supported"),  # a loss is no gain
    ],
)
def test_a_prediction_is_refuted_by_numbers_against_it(changed, number, verdict):
    assert verdicts(FIDS | changed)[number - 1] == verdict


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "supported"),
        ({"one-cycle gd": 0.5}, "open"),  # less, but not by enough
        ({"ema gd": 1.5}, "refuted"),
        ({"twice-the-rate gd": 0.5}, "refuted"),
        ({"constant gd": -1.0}, "refuted"),
    ],
)
def test_the_first_prediction_is_about_forgetting(changed, verdict):
    forgetting = {"constant gd": 1.0, "twice-the-rate gd": 2.0, "one-cycle gd": 0.1, "ema gd": 0.2} | changed
    assert verdicts(FIDS, forgetting)[0] == verdict


def of_one(*values: float) -> Paired:
    return Paired([Difference("", values)], True)


def test_noise_few_seeds_and_missing_arms_leave_predictions_open():
    noise = of_one(3.0, -3.0, 2.0, -2.0, 4.0, -3.9, 0.1, 0.2, 0.0, 0.3)
    assert gains_nothing(noise, gain=1.0) == "open"
    assert gains_nothing(of_one(-1.0, -1.0, -1.1), gain=1.0) == "open"  # p is 0.25 at best
    assert gains_nothing(of_one(0.1, 0.1, 0.11), gain=1.0) == "supported"
    assert gains_nothing(of_one(0.1, 0.1, 0.11)._replace(complete=False), gain=1.0) == "open"
    assert gains_nothing(of_one(*(-0.1 * i for i in range(1, 11))), gain=1.0) == "refuted"
    assert verdicts({"constant gd": 6.0}) == ["open"] + ["not tested"] * 5
    without_directions = {label: fid for label, fid in FIDS.items() if "random" not in label and "top" not in label}
    assert verdicts(without_directions, arms=without_directions)[1] == "open"


def test_the_report_names_every_arm_and_what_is_missing(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results"
    small = replace(SMALL, seeds=(0, 1))
    runs = tune(root, small)
    for arm in small.arms:
        for seed in small.seeds:
            run = runs.final_run(arm, seed)
            if not (root / run.folder).exists():
                make(root, run, FIDS[arm.label] + 0.3 * seed - 0.25 * (arm.label == f"ema {RANK1}"))
    runs = Runs(small, root)
    ledger.record(results / "small.jsonl", root)
    write_report("small", runs, results / "small.jsonl", results)
    page = (results / "small.md").read_text()
    for arm in SMALL.arms:
        assert f"| {arm.label} |" in page
    for number in range(1, 7):
        assert f"### {number}. " in page
    assert page.count("**No verdict before the last run**") == 6
    assert "**Not finished**: 4 runs" in page  # the second seed's curve, but for those that are final runs too
    assert "sgd-0.1: 30.00, sgd-1.0: 9.00 | sgd-1.0 |" in page
    assert "300: 5.50, 3000: 5.00 | 3000 |" in page
    recipes = page.partition("## Which to use")[2].partition("Kept:")[0].strip().splitlines()[2:]
    assert len(recipes) == len(SMALL.arms)
    fids = [float(row.split(" | ")[2]) for row in recipes]
    assert fids == sorted(fids)
    assert f"| constant {RANK1} | 143 | 5.15 | −5.85 | – | – |" in recipes
    assert "| ema gd | 4 | 4.35 | −6.65 | −0.80 [−0.80, −0.80] | 0.5 |" in recipes
    assert "| constant gd | 0 | 6.15 | −4.85 | +1.00 [+1.00, +1.00] | 0.5 |" in recipes
    within = page.partition("## Within other settings")[2].partition("Differences:")[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0] for row in within] == [f"| {name} {RANK1}" for name in ("sgd", "ema", "one-cycle")]
    assert within[1].startswith(f"| ema {RANK1} | −0.25 [−0.25, −0.25] | 0.5 |")
    for run in runs.missing():
        make(root, run, 6.0)
    write_report("small", Runs(small, root), results / "small.jsonl", results)
    finished = (results / "small.md").read_text()
    assert "**Open**" in finished
    assert "No verdict" not in finished
    for picture in ("steps", "rate", "movement", "differences"):
        assert (results / f"small-{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(small-{picture}.png)" in page


def point(label: str, gain: float, final: bool = True) -> Point:
    """One seed of a method in a setting; `gain` is the difference to distillation alone."""
    result, base = (SimpleNamespace(average_fid=5.0 + x) for x in (gain, 0.0))
    return Point(label, "gd", [(cast(Result, result), cast(Result, base))], final)


def test_a_picture_ends_as_far_above_distillation_alone_as_the_best_lies_below():
    every = [point("constant gd", 0.0), point("ema gd", -3.0), point("later-0.1 gd", 2.0), point("sgd gd", 40.0, False)]
    figure, axis = plt.subplots()
    axis.plot([0] * len(every), [0.0, -3.0, 2.0, 40.0])
    assert leave_out_far(axis, every, ("average_fid", True, "")) == " Above the picture: 1."
    low, high = axis.get_ylim()
    assert 3.0 < high < 4.0
    assert -4.0 < low < -3.0
    before = axis.get_ylim()
    assert leave_out_far(axis, every[:3], ("average_fid", True, "")) == ""
    assert axis.get_ylim() == before
    plt.close(figure)


def test_a_report_of_no_final_run_has_no_verdicts(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results"
    make(root, Runs(SMALL, root).tuning_run("constant", "gd"), 6.0)
    ledger.record(results / "small.jsonl", root)
    write_report("small", Runs(SMALL, root), results / "small.jsonl", results)
    page = (results / "small.md").read_text()
    assert "predictions" not in page
    assert "**Not finished**" in page


def test_running_makes_what_is_missing_and_passes_over_what_fails(tmp_path, monkeypatch):
    """The runs are fabricated in place of being trained; one of them fails."""
    regime = replace(SMALL, seeds=(0,), curve=(), arms=SMALL.arms[:1] + SMALL.arms[6:7])
    root, lines, calls = tmp_path / "runs", tmp_path / "small.jsonl", []

    def start(pool, cells):
        for cell in cells:
            assert not (cell.folder / "summary.json").exists()
            assert pool.command(cell)[1:4] == ["-m", "crl_diffusion", "train"]
            calls.append(str(cell.folder.relative_to(root)))
            fails = "lam=3000" in cell.config.method
            if not fails:
                make(root, Wanted(cell.folder.parent.name, cell.config), 5.0)
            cell.process = SimpleNamespace(poll=lambda code=int(fails): code)

    monkeypatch.setattr(running.runner.Pool, "start", start)
    monkeypatch.setattr(running.runner, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(running.evaluate, "instruments", lambda *_: None)
    monkeypatch.setattr(running.evaluate, "prepare", lambda *_: None)
    runs = running.run(regime, root, lines, tmp_path / "extractors", Path("data"), 1)
    assert runs.missing() == []
    assert len(calls) == len(set(calls))
    assert f"final-constant/{RANK1.replace(':', '_')}_lam=300-seed0" in calls
    assert len(lines.read_text().splitlines()) == len(calls) - 1
