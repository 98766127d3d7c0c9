"""How lambda is chosen from the tuning runs, and which runs each stage needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from crl_diffusion.config.spelling import add_lam
from crl_diffusion.reporting.runs import Finished, comparable, find, grouped

from .experiments import Experiment

BASELINE = "gd"


def baseline(name: str) -> str:
    """The same replay without a penalty."""
    return BASELINE if name.startswith(f"{BASELINE}+") else "fine-tune"


def fine_grid(lam: float) -> tuple[float, float, float]:
    return float(f"{lam / 3:.2g}"), lam, float(f"{3 * lam:g}")


class Sweep(NamedTuple):
    """One candidate's runs of one seed: average FIDs by lambda, NaN where no run has finished, and the best one's
    excess over the baseline."""

    values: Mapping[float, float]
    lam: float
    excess: float


class Screened(NamedTuple):
    """One candidate's tuning."""

    coarse: Sweep
    fine: Sweep | None  # None if the coarse sweep dropped the candidate, or there is no fine stage
    lam: float | None  # the lambda that is kept; None if the candidate is dropped, or the last sweep has not been run


class Tuning:
    """The tuning runs. `stage` is coarse or fine; each has one seed."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        self.fids: dict[tuple[str, str], float] = {}
        for stage, seed in (("coarse", experiment.coarse_seed), ("fine", experiment.fine_seed)):
            runs = [] if seed is None else finished(folder / stage, [seed])
            self.fids |= {(stage, run.method): run.summary["average_fid"] for run in runs}

    def sweep(self, stage: str, name: str, lams: Sequence[float]) -> Sweep:
        values = {lam: self.fids.get((stage, add_lam(name, lam)), math.nan) for lam in lams}
        best = min(lams, key=lambda lam: math.inf if math.isnan(values[lam]) else values[lam])
        return Sweep(values, best, values[best] - self.fids.get((stage, baseline(name)), math.nan))

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
    comparable(grouped(runs))
    return runs


def stages(experiment: Experiment, folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Methods, separated by blanks, and seeds of each stage; later stages depend on finished runs of earlier ones."""
    screening = Tuning(folder, experiment).screening()
    references = dict.fromkeys(baseline(name) for name in experiment.grid)
    coarse = [add_lam(name, lam) for name, row in screening.items() for lam in row.coarse.values]
    fine = [add_lam(name, lam) for name, row in screening.items() if row.fine for lam in row.fine.values]
    kept = {name: row.lam for name, row in screening.items() if row.lam is not None}
    final = [add_lam(name, lam) for name, lam in kept.items()]
    controls = [add_lam(name, kept[candidate]) for name, candidate in experiment.controls.items() if candidate in kept]
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
