"""The comparison of systems in `benchmarks.evidence`: one arm for each, what is chosen among candidates, its table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from crl_diffusion.config.method import METHODS
from crl_diffusion.config.settings import check
from crl_diffusion.config.spelling import parse_method
from crl_diffusion.config.systems import SYSTEMS
from helpers.run_folders import fabricate, measured_as

from benchmarks.evidence import ledger
from benchmarks.evidence.regime.definitions import REGIMES, SYSTEM_ARMS, SYSTEMS_REGIME, TRUST_REGION, Regime
from benchmarks.evidence.regime.runs import Runs, Wanted
from benchmarks.evidence.regime.systems import write_systems

REGIME = REGIMES[SYSTEMS_REGIME]
SMALL = replace(REGIME, common={**REGIME.common, "tasks": 3, "steps": 50}, seeds=(0, 1))
PARAMETERS = 10_000
FIDS = {"ddgr": 9.0, "gd+interpolate0.25": 4.0, "gd+l2:gradient,lam=1e-05": 5.0, "adapters16": 3.0}  # the others: 6


def make(root: Path, wanted: Wanted, regime: Regime = SMALL) -> None:
    config = wanted.config
    values = {name: value for name, value in vars(config).items() if name not in ("method", "seed")}
    folder = fabricate(root / wanted.folder, config.method, config.seed, **values)
    if config.recipe.curriculum == "continual" and not config.recipe.adapter_rank:
        row = {"kind": "movement", "task": 2, "displacement": 100.0, "random_drift": 1.0, "drift": [], "precision": 7.0}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    fid = FIDS.get(config.method, 6.0) + config.seed - (config.guidance == 3)
    measured_as(folder, fid=fid)


def make_all(root: Path, regime: Regime = SMALL) -> Runs:
    while missing := (runs := Runs(regime, root)).missing():
        for wanted in missing:
            make(root, wanted)
    return runs


def test_every_system_has_an_arm_whose_candidates_are_of_its_method() -> None:
    assert SYSTEM_ARMS.keys() == SYSTEMS.keys()
    for name, arm in SYSTEM_ARMS.items():
        wanted = parse_method(SYSTEMS[name].method)
        methods = [method for _, method in arm.candidates] or [arm.method]
        for method in map(parse_method, methods):
            assert (method.replays, method.curriculum) == (wanted.replays, wanted.curriculum)
            assert bool(method.interpolation) == bool(wanted.interpolation)
            assert bool(method.adapter_rank) == bool(wanted.adapter_rank)
            assert method.penalty == wanted.penalty
        free = wanted.penalty or wanted.interpolation or wanted.adapter_rank or name == "ddgr"
        tuned = free and not arm.borrowed
        assert len(arm.lams) + len(arm.candidates) == (4 if tuned else 0)
    assert REGIME.settings[TRUST_REGION] == {"fisher_samples": 10_000}


def test_the_name_of_a_system_hides_no_other_method() -> None:
    for name in SYSTEMS.keys() & METHODS.keys():
        assert METHODS[name] == parse_method(SYSTEMS[name].method) == parse_method(name)


def test_the_best_candidate_of_the_tuning_seed_makes_the_final_runs(tmp_path: Path) -> None:
    runs = Runs(SMALL, tmp_path)
    assert runs.choice(SYSTEM_ARMS["adapters"]) is None
    first = runs.missing()
    for run in first:
        check(run.config)
        assert run.config.held_out == "validation"
        assert run.config.seed == 100
    assert len({run.folder for run in first}) == len(first) == 58
    for run in first:
        make(tmp_path, run)
    runs = Runs(SMALL, tmp_path)
    assert runs.choice(SYSTEM_ARMS["adapters"]) == ("constant", "adapters16")
    assert runs.choice(SYSTEM_ARMS["interpolated-distillation"]) == ("constant", "gd+interpolate0.25")
    assert runs.choice(SYSTEM_ARMS["l2-distillation"]) == ("constant", "gd+l2:gradient,lam=1e-05")
    assert runs.choice(SYSTEM_ARMS["ddgr"]) == ("guidance-3", "ddgr")
    final = runs.missing()
    assert len({run.folder for run in final}) == len(final) == len(SYSTEMS) * len(SMALL.seeds)
    assert {run.config.guidance for run in final if run.config.method == "ddgr"} == {3.0}
    assert {run.config.fisher_samples for run in final} == {4000, 10_000}


def test_a_failed_candidate_is_not_chosen(tmp_path: Path) -> None:
    arm = SYSTEM_ARMS["adapters"]
    for run in (tried := Runs(SMALL, tmp_path).tried_candidates(arm)):
        if run.config.method != "adapters16":
            make(tmp_path, run)
    assert Runs(SMALL, tmp_path).choice(arm) is None
    gone = next(run.folder for run in tried if run.config.method == "adapters16")
    assert Runs(SMALL, tmp_path, {gone}).choice(arm) == ("constant", "adapters1")


def test_the_table_has_scores_differences_memory_and_costs_of_every_system(tmp_path: Path) -> None:
    root, results = tmp_path / "runs", tmp_path / "results"
    make_all(root)
    lines = results / "systems.jsonl"
    ledger.record(lines, root)
    ledger.restore(lines, tmp_path / "elsewhere")  # what the table needs is in the lines
    write_systems("systems", Runs(SMALL, tmp_path / "elsewhere"), lines, results)
    page = (results / "systems.md").read_text()
    assert "Not finished" not in page
    table = page.partition("## Result")[2].strip().splitlines()
    head, *body = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], *table[2 : len(SYSTEMS) + 2])
    ]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert [*rows] == [*SYSTEM_ARMS]
    assert all(row["source"] == SYSTEMS[name].source.replace("|", "") for name, row in rows.items())
    assert all(row["seeds"] == "2" for row in rows.values())
    adapters, gd, l2 = rows["adapters"], rows["pooled-distillation"], rows["l2-distillation"]
    assert (adapters["--method"], l2["--method"]) == ("`adapters16`", "`gd+l2:gradient,lam=1e-05`")
    assert adapters["average FID ↓"].startswith("3.50 ± 0.71")
    assert adapters["average FID, difference"] == "−3.00 [−3.00, −3.00]"
    assert gd["average FID, difference"] == "–"
    # A teacher of 800 bytes and 200 bytes of images for each of 2 tasks; an L2 penalty, as fabricated, has more.
    assert gd["kept"] == f"{1200 / PARAMETERS:.3g}"
    assert l2["kept"] == f"{(1200 + 5_737_424) / PARAMETERS:.3g}"
    # 30 ms a step with a replay, 20 without; 2 seconds at a task's end, and 50 steps of 20 ms in one of fine-tuning.
    assert (rows["fine-tuning"]["step"], gd["step"]) == ("1.00", "1.50")
    assert gd["task's end"] == "2.00"
    assert rows["joint-training"]["task's end"] == "–"
    tuning = page.partition("were chosen")[2]
    assert "| constant adapters | – | adapters1: 106.00, adapters4: 106.00, adapters16: 103.00, " in tuning
    assert "guidance-3 ddgr: 108.00, guidance-10 ddgr: 109.00 | guidance-3 ddgr |" in tuning
    assert (results / "systems-differences.png").read_bytes().startswith(b"\x89PNG")
    for system in SYSTEMS.values():
        assert system.differs in page


def test_a_table_of_unfinished_runs_says_so(tmp_path: Path) -> None:
    root, results = tmp_path / "runs", tmp_path / "results"
    make(root, Runs(SMALL, root).tuning_run("constant", "gd"))
    ledger.record(results / "systems.jsonl", root)
    write_systems("systems", Runs(SMALL, root), results / "systems.jsonl", results)
    page = (results / "systems.md").read_text()
    assert "**Not finished**: 57 runs or more" in page
    assert "## Result" not in page
