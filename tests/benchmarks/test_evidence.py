"""`benchmarks.evidence`: choices from fabricated runs, their ledger, and the page about them."""

import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
from crl_diffusion.cli import parser
from crl_diffusion.config.settings import RunConfig, Settings, check
from crl_diffusion.errors import OptionError
from crl_diffusion.reporting import runs
from helpers.run_folders import fabricate, measured_as

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import ledger, tuning
from benchmarks.evidence.experiments import EXPERIMENTS, Experiment
from benchmarks.evidence.report import final_runs, tuning_sheet, write_report
from benchmarks.evidence.tuning import Tuning, compare_arguments

SMALL = Experiment(
    options="--data digits --tasks 3 --steps 20",
    tuning="--eval-samples 50",
    grid={"gd+rank1": (10.0, 100.0), "gd+bands8:slopes": (30.0, 300.0), "gd+diagonal": (300.0,), "rank1": (10.0,)},
    seeds=(0, 1),
    margin=0.3,
    required=("gd+diagonal",),
    controls={"gd+bands8:random,slopes": "gd+bands8:slopes"},
)
# Average FIDs of the tuning; what is not listed has the baseline's.
BASELINES = {"gd": 13.0, "fine-tune": 80.0}
COARSE = {
    **{"gd+rank1:lam=10": 12.9, "gd+rank1:lam=100": 12.5, "rank1:lam=10": 79.9},
    **{"gd+bands8:slopes,lam=30": 12.0, "gd+bands8:slopes,lam=300": 20.0, "gd+diagonal:lam=300": 14.0},
}
FINE = {
    **{"gd+rank1:lam=33": 12.9, "gd+rank1:lam=100": 12.95, "gd+rank1:lam=300": 15.0},
    **{"gd+bands8:slopes,lam=10": 12.6, "gd+bands8:slopes,lam=30": 12.5, "gd+bands8:slopes,lam=90": 12.3},
    **{"gd+diagonal:lam=100": 13.2, "gd+diagonal:lam=300": 13.6, "gd+diagonal:lam=900": 14.2},
}


class Ended(NamedTuple):
    """A process that has ended, as far as anything asks."""

    returncode: int


def tune(folder: Path, stage: str, fids: dict[str, float]) -> None:
    for method, fid in fids.items():
        seed = SMALL.coarse_seed if stage == "coarse" else SMALL.fine_seed
        run = fabricate(folder / stage / method.replace(":", "_"), method, seed, tasks=3, held_out="validation")
        measured_as(run, fid=fid)


def final(folder: Path, methods: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        for method in methods.split():
            fabricate(folder / "final" / f"{method.replace(':', '_')}-seed{seed}", method, seed, tasks=3)


@pytest.fixture
def tuned(tmp_path):
    folder = tmp_path / "runs"
    tune(folder, "coarse", BASELINES | COARSE)
    tune(folder, "fine", BASELINES | FINE)
    return folder


def test_lambda_is_the_best_of_the_fine_runs_and_the_dominated_are_dropped(tuned):
    screening = Tuning(tuned, SMALL).screening()
    bands, diagonal, rank1 = screening["gd+bands8:slopes"], screening["gd+diagonal"], screening["gd+rank1"]
    assert (bands.coarse.lam, bands.lam) == (30.0, 90.0)
    assert bands.coarse.excess == pytest.approx(-1.0)
    assert diagonal.coarse.excess > 0
    assert diagonal.lam == 100.0  # required
    assert rank1.coarse.lam == 100.0
    assert rank1.fine is not None
    assert rank1.lam is None  # -0.1 is within the margin
    assert screening["rank1"].fine is None  # against fine-tuning, whose replay it shares


def test_stages_follow_from_the_finished_runs(tuned):
    stages = tuning.stages(SMALL, tuned)
    assert "rank1:lam=10" in stages["coarse"][0].split()
    assert set(stages["fine"][0].split()) == {"gd", "fine-tune", *FINE}
    assert stages["final"] == (
        "fine-tune joint gd gd+bands8:slopes,lam=90 gd+diagonal:lam=100 gd+bands8:random,slopes,lam=90",
        (0, 1),
    )


def test_nothing_is_chosen_from_missing_runs(tuned, tmp_path):
    assert {row.lam for row in Tuning(tmp_path, SMALL).screening().values()} == {None}
    always = replace(SMALL, margin=None)
    for gone in ("fine/gd+rank1_lam=*", "coarse/gd"):  # a candidate's own runs; its baseline
        for run in tuned.glob(gone):
            shutil.rmtree(run)
        screened = Tuning(tuned, always).screening()
        assert screened["gd+rank1"].lam is None
        assert tuning_sheet(always, screened).body[0][-1] == "not tuned yet"
        assert "gd+rank1" not in tuning.stages(always, tuned)["final"][0]


def test_only_runs_of_the_tuning_s_own_seeds_count_and_only_comparable_ones(tuned):
    before = Tuning(tuned, SMALL).fids
    fabricate(tuned / "coarse" / "other", "gd", 999, tasks=3, held_out="validation")
    assert Tuning(tuned, SMALL).fids == before
    fabricate(tuned / "coarse" / "shorter", "gd+rank1:lam=7", SMALL.coarse_seed, tasks=3, steps=5)
    with pytest.raises(OptionError, match="these runs differ in their"):
        Tuning(tuned, SMALL)


def test_before_any_run_everything_goes_into_the_coarse_stage(tmp_path):
    methods = tuning.stages(SMALL, tmp_path)["coarse"][0].split()
    assert set(methods) == {*BASELINES, *COARSE}
    sweep = Tuning(tmp_path, SMALL).sweep("coarse", "gd+rank1", (10.0, 100.0))
    assert all(math.isnan(value) for value in sweep.values.values())


def test_without_a_margin_every_candidate_is_kept(tuned):
    tune(tuned, "fine", {"rank1:lam=3.3": 81.0, "rank1:lam=10": 82.0, "rank1:lam=30": 83.0})
    screening = Tuning(tuned, replace(SMALL, margin=None)).screening()
    assert {name: row.lam for name, row in screening.items()} == {
        "gd+rank1": 33.0, "gd+bands8:slopes": 90.0, "gd+diagonal": 100.0, "rank1": 3.3
    }  # fmt: skip


def test_without_a_fine_stage_the_coarse_lambdas_are_kept(tuned):
    coarse = replace(SMALL, fine_seed=None)
    screening = Tuning(tuned, coarse).screening()
    assert {name: row.lam for name, row in screening.items()} == {
        "gd+rank1": 100.0, "gd+bands8:slopes": 30.0, "gd+diagonal": 300.0, "rank1": None
    }  # fmt: skip
    stages = tuning.stages(coarse, tuned)
    assert stages["coarse"] == tuning.stages(SMALL, tuned)["coarse"]
    assert stages["fine"] == ("", ())
    assert "gd+bands8:slopes,lam=30" in stages["final"][0].split()
    sheet = tuning_sheet(coarse, screening)
    assert "no fine stage" in sheet.caption
    assert sheet.body[1][-3:] == ["–", "–", "30"]


def test_a_candidate_that_the_experiment_ends_gets_no_further_runs(tuned):
    ended = replace(SMALL, ended={"gd+bands8:slopes": "too dear"})
    assert Tuning(tuned, ended).screening()["gd+bands8:slopes"].fine is None
    assert "bands8" not in tuning.stages(ended, tuned)["final"][0]
    assert tuning_sheet(ended, Tuning(tuned, ended).screening()).body[1][-1] == "too dear"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_commands_of_the_experiments_are_understood(name, tmp_path):
    experiment = EXPERIMENTS[name]
    assert not {experiment.coarse_seed, experiment.fine_seed} & set(experiment.seeds)
    assert {*experiment.required, *experiment.controls.values()} <= set(experiment.grid)
    for stage, (methods, seeds) in tuning.stages(experiment, tmp_path).items():
        if not methods:
            assert not experiment.grid or (stage == "fine" and experiment.fine_seed is None)
            continue
        arguments = compare_arguments(experiment, stage, methods, seeds[0])
        command = parser.parse(["compare", "--out", str(tmp_path), *arguments])
        assert command.held_out == ("test" if stage == "final" else "validation")
        for method in command.methods:
            settings = {field.name: getattr(command, field.name) for field in fields(Settings)}
            check(RunConfig(method=method, **settings))


def test_a_ledger_restores_the_runs_that_a_report_needs(tuned, tmp_path):
    final(tuned, tuning.stages(SMALL, tuned)["final"][0], (0, 1))
    lines, elsewhere = tmp_path / "results" / "small.jsonl", tmp_path / "elsewhere"
    count = ledger.record(lines, tuned)
    assert count == len(BASELINES) * 2 + len(COARSE) + len(FINE) + 12
    assert ledger.record(lines, tuned) == 0
    assert str(tmp_path) not in lines.read_text()

    assert ledger.restore(lines, elsewhere) == count
    assert ledger.restore(lines, elsewhere) == 0
    before, after = (runs.find([root / "final"])[0] for root in (tuned, elsewhere))
    assert [(run.config, run.summary) for run in before] == [(run.config, run.summary) for run in after]
    assert ledger.record(lines, elsewhere) == 0
    pages = []
    for root in (tuned, elsewhere):
        write_report("small", SMALL, root, lines, lines.parent)
        pages.append((lines.parent / "small.md").read_text())
        (lines.parent / "small.png").unlink()
    assert pages[0] == pages[1]
    assert "Not finished" not in pages[0]
    assert "| `gd+rank1` | 10: 12.90, 100: 12.50 | −0.50 |" in pages[0]
    assert pages[0].count("gd+bands8:slopes,lam=90") == 2  # headline and differences


def test_a_ledger_survives_a_line_cut_short_and_refuses_runs_that_contradict_it(tuned, tmp_path):
    lines = tmp_path / "small.jsonl"
    count = ledger.record(lines, tuned)
    content = lines.read_bytes()
    lines.write_bytes(content[:-40])
    assert ledger.record(lines, tuned) == 1
    assert lines.read_bytes() == content
    assert ledger.record(lines, tuned) == 0

    measured_as(tuned / "coarse" / "gd", accuracy=0.1)
    with pytest.raises(SystemExit, match="differ in accuracy"):
        ledger.record(lines, tuned)
    assert lines.read_bytes() == content
    assert len(content.splitlines()) == count


def test_final_runs_that_are_not_chosen_are_left_out(tuned, tmp_path):
    chosen = tuning.stages(SMALL, tuned)["final"][0]
    final(tuned, f"{chosen} gd+bands8:slopes,lam=30", (0, 1))
    shutil.rmtree(next(tuned.glob("final/gd+diagonal*-seed1")))
    runs, remarks = final_runs(SMALL, tuned)
    assert {run.method for run in runs} == set(chosen.split())
    assert remarks == [
        "**Not finished**: 1 of the final runs.",
        "**Left out**: 2 final runs, not chosen by the tuning.",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, -15])
def test_an_interrupted_stage_ends_the_experiment_and_failed_runs_do_not(tmp_path, monkeypatch, code):
    ran = []
    monkeypatch.setattr(evidence.subprocess, "run", lambda words, check: ran.append(words) or Ended(code))
    command = evidence.Command(experiment="small", out=tmp_path, results=tmp_path)
    if code in (0, 1):
        evidence.run(SMALL, tmp_path, tmp_path / "small.jsonl", command)
        assert len(ran) == 4  # coarse, fine, two final seeds
    else:
        with pytest.raises(SystemExit, match=f"coarse stage ended early .exit code {code}.; to resume"):
            evidence.run(SMALL, tmp_path, tmp_path / "small.jsonl", command)
        assert len(ran) == 1


def test_the_page_of_an_unfinished_experiment_counts_the_missing_runs(tuned, tmp_path):
    methods = tuning.stages(SMALL, tuned)["final"][0]
    final(tuned, methods, (0,))
    ledger.record(tmp_path / "small.jsonl", tuned)
    write_report("small", SMALL, tuned, tmp_path / "small.jsonl", tmp_path)
    assert "**Not finished**: 6 of the final runs." in (tmp_path / "small.md").read_text()
    shutil.rmtree(tuned / "final")
    write_report("small", SMALL, tuned, tmp_path / "small.jsonl", tmp_path)
    assert "12 of the final runs" in (tmp_path / "small.md").read_text()
    shutil.rmtree(tuned / "fine")
    write_report("small", SMALL, tuned, tmp_path / "small.jsonl", tmp_path)
    text = (tmp_path / "small.md").read_text()
    assert f"**Not finished**: {len(BASELINES) + len(FINE)} of the fine runs, and what follows from them." in text
    assert "nan" not in text


def test_an_experiment_without_candidates_has_nothing_to_tune(tmp_path, monkeypatch):
    untuned = Experiment(
        options="--data digits --tasks 3 --steps 20", seeds=(0, 1), references=("gd", "gd+rank1:lam=33")
    )
    ran = []
    monkeypatch.setattr(
        evidence.subprocess, "run", lambda words, check: ran.append(words[words.index("--methods") + 1 :]) or Ended(0)
    )
    command = evidence.Command(experiment="untuned", out=tmp_path, results=tmp_path)
    evidence.run(untuned, tmp_path, tmp_path / "untuned.jsonl", command)
    expected = ["gd", "gd+rank1:lam=33", "--seeds", "{}", "--baseline", "gd"]
    assert ran == [[word.format(seed) for word in expected] for seed in untuned.seeds]
    final(tmp_path, "gd gd+rank1:lam=33", untuned.seeds)
    ledger.record(tmp_path / "untuned.jsonl", tmp_path)
    write_report("untuned", untuned, tmp_path, tmp_path / "untuned.jsonl", tmp_path)
    text = (tmp_path / "untuned.md").read_text()
    assert "Tuning" not in text
    assert "lambda was chosen" not in text
