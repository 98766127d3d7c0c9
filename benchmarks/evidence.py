"""Does a penalty help on top of distillation? Lambda tuned on other seeds, then frozen; then paired differences.

    python -m benchmarks.evidence digits-drift --out runs/evidence            # hours; resumes where it stood
    python -m benchmarks.evidence digits-drift --out runs/evidence --stage coarse

Tuning runs are measured against validation images, on seeds that are not shown afterwards, and every candidate gets the
same number of them. Coarse: each candidate with each lambda of its grid, on the first tuning seed. One whose best
lambda is worse than its baseline (the same replay without a penalty) by more than `DOMINATED` goes no further, unless
the experiment requires it. Fine: a third of the best lambda, itself, and three times it, on all tuning seeds; the one
with the lowest mean average FID is kept. Final: what is left, and the references, on the other seeds against test
images. Nothing is chosen after that.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from crl_diffusion.method import spell
from crl_diffusion.records import read_json, write_json
from crl_diffusion.report import find

from .measure import processor

DOMINATED = 1.0  # FID points


@dataclass(frozen=True)
class Experiment:
    """A setting, what is compared in it, and how lambda is chosen."""

    options: tuple[str, ...]  # of every run
    tuning: tuple[str, ...]  # of the tuning runs only
    grids: dict[str, tuple[float, ...]]  # candidate -> its coarse lambdas
    required: tuple[str, ...]  # candidates that are never dropped
    references: tuple[str, ...]  # run without tuning
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]


LOW_RANK, BANDS, DIAGONAL = (10.0, 100.0, 1000.0), (30.0, 300.0, 3000.0), (300.0, 3000.0, 30000.0)
CANDIDATES = {
    **dict.fromkeys(("gd+diagonal", "gd+diagonal:gradient"), DIAGONAL),
    **dict.fromkeys(
        (
            *("gd+rank1", "gd+rank1:gradient", "gd+rank1:slopes", "gd+rank1:slopes,gradient"),
            *("gd+rank10", "gd+rank10:gradient", "gd+rank10:slopes", "gd+rank10:slopes,gradient"),
            *("gd+rank50", "gd+rank50:gradient", "gd+rank50:slopes"),
        ),
        LOW_RANK,
    ),
    **dict.fromkeys(
        (
            *("gd+bands8", "gd+bands8:gradient", "gd+bands8:slopes", "gd+bands8:slopes,gradient"),
            *("gd+bands8:top", "gd+bands8:top,slopes", "gd+bands8:top,slopes,gradient"),
            *("gd+bands16", "gd+bands16:slopes", "gd+bands16:top,slopes"),
        ),
        BANDS,
    ),
    **dict.fromkeys(("rank1", "rank1:gradient", "rank10", "rank50"), LOW_RANK),
    **dict.fromkeys(("diagonal", "diagonal:gradient"), DIAGONAL),
}
PAIRS = ("gd+diagonal", "gd+diagonal:gradient", "gd+rank1", "gd+rank1:gradient")
DIGITS = ("--data", "digits", "--model", "mini", "--batch", "16", "--replay-batch", "16", "--fisher-samples", "2000")
EXPERIMENTS = {
    "digits-drift": Experiment(
        options=(
            *DIGITS,
            "--tasks",
            "10",
            "--classes-per-task",
            "1",
            "--steps",
            "200",
            "--pool",
            "4",
            "--pool-steps",
            "2",
        ),
        tuning=("--tasks", "4", "--eval-samples", "50"),
        grids=CANDIDATES,
        required=(*PAIRS, "rank1", "rank10", "diagonal", "gd+bands8:slopes"),
        references=("fine-tune", "joint", "gd"),
        tuning_seeds=(100, 101),
        seeds=(0, 1, 2, 3, 4, 5),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """Run one experiment, or one stage of it. To resume, give the same command again."""

    experiment: Annotated[str, tyro.conf.Positional]
    """Its name."""
    out: Path = Path("runs/evidence")
    """Folder of all experiments; each has one in it, with tuning/, final/, coarse.md and choice.json."""
    stage: Literal["all", "coarse", "fine", "final"] = "all"
    """Which stage to run; each needs those before it."""
    jobs: int = 0
    """Runs at a time; 0 means one a CPU core."""
    data_root: Path = Path("data")
    """Where data sets are kept, in torchvision's layout."""


def with_lam(name: str, lam: float) -> str:
    return spell(f"{name}{',' if ':' in name else ':'}lam={lam:g}")


def baseline(name: str) -> str:
    """The same replay without a penalty."""
    return "gd" if name.startswith("gd+") else "fine-tune"


def compare(
    folder: Path, experiment: Experiment, methods: Sequence[str], seeds: Sequence[int], command: Command
) -> None:
    """One comparison. Finished cells are kept; a cell that fails (a loss that is not finite) does not stop the rest."""
    arguments = ["compare", "--out", str(folder), *experiment.options]
    if folder.name == "tuning":
        arguments += ["--held-out", "validation", *experiment.tuning]
    arguments += ["--methods", *dict.fromkeys(methods), "--seeds", *map(str, seeds), "--baseline", "gd"]
    arguments += ["--jobs", str(command.jobs), "--data-root", str(command.data_root)]
    print("crl-diffusion", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "crl_diffusion", *arguments], check=False)


class Tuning:
    """Average FIDs of the tuning runs, and what follows from them."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.experiment = experiment
        self.found: dict[tuple[str, int], float] = {}
        for run in find([folder])[0]:
            self.found[run.method, run.seed] = run.summary["average_fid"]

    def values(self, method: str, seeds: Sequence[int]) -> list[float]:
        """Average FIDs; infinite where a run failed."""
        return [self.found.get((method, seed), math.inf) for seed in seeds]

    def best(self, name: str, lams: Sequence[float], seeds: Sequence[int]) -> float:
        return min(lams, key=lambda lam: sum(self.values(with_lam(name, lam), seeds)))

    def screen(self) -> dict[str, dict[str, Any]]:
        """For each candidate the best coarse lambda, its excess over the baseline, and whether it goes on."""
        first = self.experiment.tuning_seeds[:1]
        screened = {}
        for name, lams in self.experiment.grids.items():
            lam = self.best(name, lams, first)
            excess = self.values(with_lam(name, lam), first)[0] - self.values(baseline(name), first)[0]
            kept = excess <= DOMINATED or name in self.experiment.required
            coarse = {f"{x:g}": self.values(with_lam(name, x), first)[0] for x in lams}
            screened[name] = {"coarse": coarse, "best_coarse": lam, "excess": excess, "kept": kept}
        return screened

    def choose(self) -> dict[str, dict[str, Any]]:
        """The screening, and for each kept candidate its values on the fine grid and the lambda that is frozen."""
        seeds = self.experiment.tuning_seeds
        chosen = self.screen()
        for name, row in chosen.items():
            if row["kept"]:
                lams = fine_grid(row["best_coarse"])
                row["fine"] = {f"{lam:g}": self.values(with_lam(name, lam), seeds) for lam in lams}
                row["lam"] = self.best(name, lams, seeds)
        return chosen


def markdown(experiment: str, tuning: Tuning, screened: dict[str, dict[str, Any]]) -> str:
    """The coarse tuning as a table."""
    seed = tuning.experiment.tuning_seeds[0]
    baselines = dict.fromkeys(baseline(name) for name in screened)
    without = ", ".join(f"{name} {tuning.values(name, [seed])[0]:.2f}" for name in baselines)
    lines = [
        f"# {experiment}: the coarse tuning",
        "",
        f"`python -m benchmarks.evidence {experiment} --stage coarse`, {date.today()}, {processor()}.",
        f"Average FID on validation images, one tuning seed ({seed}): a screening without error bars, not a result.",
        f"Without a penalty on the same seed: {without}.",
        "",
        "| method | lam: average FID | best, less the same replay without a penalty | goes on |",
        "|---|---|---:|---|",
    ]
    for name, row in screened.items():
        values = ", ".join(f"{lam}: {value:.2f}" for lam, value in row["coarse"].items())
        lines.append(f"| `{name}` | {values} | {row['excess']:+.2f} | {'yes' if row['kept'] else 'no'} |")
    return "\n".join([*lines, ""])


def fine_grid(lam: float) -> tuple[float, float, float]:
    return float(f"{lam / 3:.2g}"), lam, 3 * lam


def main(command: Command) -> None:
    if command.experiment not in EXPERIMENTS:
        sys.exit(f"experiment {command.experiment!r} is not known; choose one of {', '.join(EXPERIMENTS)}")
    experiment, folder = EXPERIMENTS[command.experiment], command.out / command.experiment
    tuning, seeds = folder / "tuning", experiment.tuning_seeds
    baselines = [baseline(name) for name in experiment.grids]
    if command.stage in ("all", "coarse"):
        methods = [with_lam(name, lam) for name, lams in experiment.grids.items() for lam in lams]
        compare(tuning, experiment, [*baselines, *methods], seeds[:1], command)
        found = Tuning(tuning, experiment)
        (folder / "coarse.md").write_text(markdown(command.experiment, found, found.screen()), encoding="utf-8")
    if command.stage in ("all", "fine"):
        kept = {name: row for name, row in Tuning(tuning, experiment).screen().items() if row["kept"]}
        methods = [with_lam(name, lam) for name, row in kept.items() for lam in fine_grid(row["best_coarse"])]
        compare(tuning, experiment, [*baselines, *methods], seeds, command)
        choice = Tuning(tuning, experiment)
        references = {name: choice.values(name, seeds) for name in dict.fromkeys(baselines)}
        write_json(folder / "choice.json", {"tuning_seeds": seeds, **references, "candidates": choice.choose()})
    if command.stage in ("all", "final"):
        candidates = read_json(folder / "choice.json")["candidates"]
        methods = [with_lam(name, row["lam"]) for name, row in candidates.items() if row["kept"]]
        compare(folder / "final", experiment, [*experiment.references, *methods], experiment.seeds, command)


if __name__ == "__main__":
    main(tyro.cli(Command))
