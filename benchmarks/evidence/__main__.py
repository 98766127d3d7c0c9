"""Does a penalty help on top of distillation? Lambda tuned on other seeds, then frozen; then paired differences.

    python -m benchmarks.evidence digits-drift     # hours; the same command goes on where it stood, on any machine

Tuning runs are measured against validation images, on seeds that are not shown afterwards, and every candidate gets the
same number of them. Coarse: each candidate with each lambda of its grid, on one seed. Fine, unless the experiment does
without: a third of the best lambda, itself, and three times it, on another seed; the one with the lowest average FID is
kept. A candidate that is not better than its baseline (the same replay without a penalty) by the experiment's margin,
in either, goes no further, unless the experiment requires it. Final: what is left, its controls and the references, on
the other seeds against test images, one seed after another, so that an unfinished experiment has whole seeds. No lambda
is chosen after that; exceptions and controls that were thought of on the way are named in `experiments.py`.

Every finished run is a line of RESULTS/EXPERIMENT.jsonl (`ledger.py`), and the networks that FIDs are measured on are
kept in RESULTS/extractors, so that runs of several machines compare.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro
from crl_diffusion import effects, tables
from crl_diffusion.method import in_order, spell
from crl_diffusion.records import read_rows
from crl_diffusion.report import Finished, comparable, find, grouped

from . import ledger
from .experiments import EXPERIMENTS, Experiment

BASELINE = "gd"
SOME_FAILED = 1  # exit code of `crl-diffusion compare`: all runs have been tried, and some could not go on


@dataclass(frozen=True, kw_only=True)
class Command:
    """Run one experiment. To resume, give the same command again."""

    experiment: Annotated[str, tyro.conf.Positional]
    """Its name."""
    out: Path = Path("runs/evidence")
    """Folder of the runs: EXPERIMENT/{coarse,fine,final}/RUN."""
    results: Path = Path("benchmarks/results/evidence")
    """Folder of what is kept: lines of finished runs, extractors, the report."""
    report_only: bool = False
    """Take up what has finished, write the report, and run nothing."""
    jobs: int = 0
    """Runs at a time; 0 means one a CPU core."""
    data_root: Path = Path("data")
    """Where data sets are kept, in torchvision's layout."""


def with_lam(name: str, lam: float) -> str:
    return spell(f"{name}{',' if ':' in name else ':'}lam={lam:g}")


def baseline(name: str) -> str:
    """The same replay without a penalty."""
    return BASELINE if name.startswith(f"{BASELINE}+") else "fine-tune"


def fine_grid(lam: float) -> tuple[float, float, float]:
    return float(f"{lam / 3:.2g}"), lam, 3 * lam


class Sweep(NamedTuple):
    """One candidate's runs of one seed: average FIDs by lambda, NaN where no run has finished, and the best one's
    excess over the baseline."""

    values: Mapping[float, float]
    lam: float
    excess: float


class Screened(NamedTuple):
    """One candidate's tuning."""

    coarse: Sweep
    fine: Sweep | None  # None if the coarse one has ended it, or chooses alone
    lam: float | None  # what is frozen; None if the last one has ended it, or has not been run


class Tuning:
    """What the tuning runs say. `stage` is coarse or fine; each has one seed."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        self.found: dict[tuple[str, str], float] = {}
        for stage, seed in (("coarse", experiment.coarse_seed), ("fine", experiment.fine_seed)):
            runs = [] if seed is None else finished(folder / stage, [seed])
            self.found |= {(stage, run.method): run.summary["average_fid"] for run in runs}

    def sweep(self, stage: str, name: str, lams: Sequence[float]) -> Sweep:
        values = {lam: self.found.get((stage, with_lam(name, lam)), math.nan) for lam in lams}
        best = min(lams, key=lambda lam: math.inf if math.isnan(values[lam]) else values[lam])
        return Sweep(values, best, values[best] - self.found.get((stage, baseline(name)), math.nan))

    def goes_on(self, name: str, sweep: Sweep) -> bool:
        margin = self.experiment.margin
        if name in self.experiment.ended or math.isnan(sweep.excess):
            return False
        return margin is None or name in self.experiment.required or sweep.excess <= -margin

    def screened(self, name: str) -> Screened:
        coarse = self.sweep("coarse", name, self.experiment.grid[name])
        if not self.goes_on(name, coarse):
            return Screened(coarse, None, None)
        if self.experiment.fine_seed is None:
            return Screened(coarse, None, coarse.lam)
        fine = self.sweep("fine", name, fine_grid(coarse.lam))
        return Screened(coarse, fine, fine.lam if self.goes_on(name, fine) else None)

    def screening(self) -> dict[str, Screened]:
        return {name: self.screened(name) for name in self.experiment.grid}


def finished(folder: Path, seeds: Sequence[int]) -> list[Finished]:
    """The finished runs of a stage's folder with these seeds, which must be comparable."""
    runs = [run for run in find([folder])[0] if run.seed in seeds] if folder.is_dir() else []
    comparable(runs)
    return runs


def stages(experiment: Experiment, folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Methods and seeds of each stage, separated by blanks; those of the later ones follow from what has been found."""
    screening = Tuning(folder, experiment).screening()
    references = dict.fromkeys(baseline(name) for name in experiment.grid)
    coarse = [with_lam(name, lam) for name, row in screening.items() for lam in row.coarse.values]
    fine = [with_lam(name, lam) for name, row in screening.items() if row.fine for lam in row.fine.values]
    kept = {name: row.lam for name, row in screening.items() if row.lam is not None}
    final = [with_lam(name, lam) for name, lam in kept.items()]
    controls = [with_lam(name, kept[of]) for name, of in experiment.controls.items() if of in kept]
    return {
        "coarse": (" ".join([*references, *coarse]), (experiment.coarse_seed,)),
        "fine": ("", ()) if experiment.fine_seed is None else (" ".join([*references, *fine]), (experiment.fine_seed,)),
        "final": (" ".join([*experiment.references, *final, *controls]), experiment.seeds),
    }


def compare_arguments(experiment: Experiment, stage: str, methods: str, seed: int) -> list[str]:
    words = [*experiment.options.split()]
    if stage != "final":
        words += ["--held-out", "validation", *experiment.tuning.split()]
    return [*words, "--methods", *dict.fromkeys(methods.split()), "--seeds", str(seed), "--baseline", BASELINE]


def run(experiment: Experiment, folder: Path, lines: Path, command: Command) -> None:
    """All stages. A run that fails (a loss that is not finite) does not stop the others; an interrupted stage ends the
    program, since the next one would choose from what happens to have finished."""
    for stage in ("coarse", "fine", "final"):
        for seed in stages(experiment, folder)[stage][1]:
            methods = stages(experiment, folder)[stage][0]
            if not methods:
                continue
            arguments = compare_arguments(experiment, stage, methods, seed)
            print("crl-diffusion compare", *arguments, flush=True)
            places = ["--out", folder / stage, "--extractor-folder", command.results / "extractors"]
            places += ["--data-root", command.data_root, "--jobs", command.jobs]
            words = [sys.executable, "-m", "crl_diffusion", "compare", *map(str, places), *arguments]
            code = subprocess.run(words, check=False).returncode
            ledger.record(lines, folder)
            if code not in (0, SOME_FAILED):
                sys.exit(f"the {stage} stage ended early (exit code {code}); to resume, give the same command again")


# The report


def tuning_sheet(experiment: Experiment, screening: Mapping[str, Screened]) -> tables.Sheet:
    def said(sweep: Sweep | None) -> list[str]:
        if sweep is None:
            return [tables.NONE, tables.NONE]
        known = {lam: value for lam, value in sweep.values.items() if not math.isnan(value)}
        values = ", ".join(f"{lam:g}: {tables.number(value, 2)}" for lam, value in known.items())
        excess = tables.NONE if math.isnan(sweep.excess) else tables.number(sweep.excess, 2, plus=True)
        return [values or "not run", excess]

    head = ["candidate", "coarse, lam: average FID", "best less baseline"]
    head += ["fine, lam: average FID", "best less baseline", "lam kept"]
    body = []
    for name, row in screening.items():
        last = row.fine or row.coarse
        why = "not tuned yet" if math.isnan(last.excess) else experiment.ended.get(name, "dropped")
        kept = why if row.lam is None else f"{row.lam:g}"
        body.append([f"`{name}`", *said(row.coarse), *said(row.fine), kept])
    text = (
        f"Average FID on validation images, one run each: coarse on seed {experiment.coarse_seed}, "
        + ("no fine stage" if experiment.fine_seed is None else f"fine on seed {experiment.fine_seed}")
        + ". Baseline: the same replay without a penalty"
        + (
            "."
            if experiment.margin is None
            else f"; dropped: not better than it by {experiment.margin:g}, unless required."
        )
        + " These are choices, not results."
    )
    return tables.Sheet(head, body, text)


def final_runs(experiment: Experiment, folder: Path) -> tuple[list[Finished], list[str]]:
    """The final runs that the tuning has chosen, and remarks on what is missing and what has been left out."""
    chosen: list[Finished] = []
    remarks: list[str] = []
    for stage, (methods, seeds) in stages(experiment, folder).items():
        found = finished(folder / stage, seeds)
        chosen = [run for run in found if run.method in methods.split()]
        missing = len(set(methods.split())) * len(seeds) - len(chosen)
        if missing and not remarks:
            later = "" if stage == "final" else ", and what follows from them"
            remarks.append(f"**Not finished**: {missing} of the {stage} runs{later}.")
        if stage == "final" and len(found) > len(chosen):
            remarks.append(f"**Left out**: {len(found) - len(chosen)} final runs, not chosen by the tuning.")
    return chosen, remarks  # `chosen` is the last stage's


def write_report(name: str, experiment: Experiment, folder: Path, lines: Path, results: Path) -> None:
    """RESULTS/NAME.md and its picture, from the runs that have finished."""
    screening, rows = Tuning(folder, experiment).screening(), read_rows(lines)
    machines = dict.fromkeys(row["record"]["environment"].get("processor", "unknown") for row in rows)
    parts = [
        f"# {name}",
        f"`python -m benchmarks.evidence {name}`; {len(rows)} runs, {min(row['date'] for row in rows)} to "
        f"{max(row['date'] for row in rows)}, {', '.join(machines)}; this page: {date.today()}. Every run's values: "
        f"[{lines.name}]({lines.name}).",
        f"Final runs: `crl-diffusion compare {experiment.options}`."
        + (f" Tuning runs: the same with `--held-out validation {experiment.tuning}`." if screening else ""),
    ]
    runs, remarks = final_runs(experiment, folder)
    parts += remarks
    if runs:
        order = in_order(run.method for run in runs)
        parts += ["## Result", tables.markdown_sheets(runs, BASELINE, order)]
        picture = effects.forest(grouped(runs, order), BASELINE, name) if tables.several(runs) else None
        if picture is not None:
            picture.save(results)
            parts += [f"![{picture.alt}]({name}.png)", picture.caption]
    if screening:
        parts += ["## How lambda was chosen", tables.markdown(tuning_sheet(experiment, screening))]
    (results / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")


def main(command: Command) -> None:
    if command.experiment not in EXPERIMENTS:
        sys.exit(f"experiment {command.experiment!r} is not known; choose one of {', '.join(EXPERIMENTS)}")
    experiment, folder = EXPERIMENTS[command.experiment], command.out / command.experiment
    lines = command.results / f"{command.experiment}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    ledger.restore(lines, folder)
    ledger.record(lines, folder)
    if not command.report_only:
        run(experiment, folder, lines, command)
    write_report(command.experiment, experiment, folder, lines, command.results)


if __name__ == "__main__":
    main(tyro.cli(Command))
