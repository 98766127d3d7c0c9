"""Does a penalty help on top of distillation? Lambda tuned on other seeds, then frozen; then paired differences.

    python -m benchmarks.evidence digits-drift     # hours; the same command resumes, on any machine

An experiment has three stages. Tuning runs (coarse and fine) are measured against validation images, on seeds that are
not reported, and every candidate gets the same number of them.

Coarse: each candidate with each lambda of its grid, on one seed. A candidate must beat its baseline, which is the same
replay without a penalty, by the experiment's margin; otherwise it is dropped, unless the experiment requires it.
Fine: a third of the best lambda, the best lambda, and three times the best lambda, on another seed. The lambda with the
lowest average FID is kept, and the same margin applies. Some experiments have no fine stage.
Final: the remaining candidates, their controls and the references, on the other seeds, against test images. One seed
follows another, so an unfinished experiment has complete seeds.

No lambda is chosen after that. `experiments.py` names the exceptions, and the controls that were added later. Every
finished run is a line of RESULTS/EXPERIMENT.jsonl (`ledger.py`). RESULTS/extractors keeps the networks whose features
the FIDs are measured on, so runs of several machines can be compared.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..common import command as commands
from . import ledger
from .experiments import EXPERIMENTS, Experiment
from .regime import running
from .regime.definitions import REGIMES, SYSTEMS_REGIME
from .regime.report import write_report as write_regime
from .regime.runs import Runs
from .regime.systems import write_systems
from .report import write_report
from .tuning import compare_arguments, stages

SOME_FAILED = 1  # exit code of `crl-diffusion compare`: all runs have been tried, and some have failed


@dataclass(frozen=True, kw_only=True)
class Command:
    """Run one experiment. To resume, give the same command again."""

    experiment: Annotated[str, tyro.conf.Positional]
    """The experiment's name."""
    out: Path = Path("runs/evidence")
    """Folder of the runs: EXPERIMENT/{coarse,fine,final}/RUN."""
    results: Path = Path("benchmarks/results/evidence")
    """Folder of the lines of finished runs, the extractors and the report."""
    report_only: bool = False
    """Record the finished runs, write the report, and run nothing."""
    jobs: int = 0
    """Runs at a time; 0 means one per CPU core."""
    data_root: Path = Path("data")
    """Where data sets are kept, in torchvision's layout."""


def run(experiment: Experiment, folder: Path, lines: Path, command: Command) -> None:
    """All stages. A run that fails (a loss that is not finite) does not stop the others. An interrupted stage ends the
    program, because the next stage would choose from the runs that happen to have finished."""
    for stage in ("coarse", "fine", "final"):
        methods, seeds = stages(experiment, folder)[stage]
        for seed in seeds if methods else ():
            arguments = compare_arguments(experiment, stage, methods, seed)
            print("crl-diffusion compare", *arguments, flush=True)
            folders = ["--out", folder / stage, "--extractor-folder", command.results / "extractors"]
            folders += ["--data-root", command.data_root]
            options = [*map(str, folders), "--jobs", str(command.jobs)]
            words = [sys.executable, "-m", "crl_diffusion", "compare", *options, *arguments]
            code = subprocess.run(words, check=False).returncode
            ledger.record(lines, folder)
            if code not in (0, SOME_FAILED):
                sys.exit(f"the {stage} stage ended early (exit code {code}); to resume, give the same command again")


def main(command: Command) -> None:
    known = [*EXPERIMENTS, *REGIMES]
    if command.experiment not in known:
        sys.exit(f"experiment {command.experiment!r} is not known; choose one of {', '.join(known)}")
    if not command.report_only:
        commands.require_kernels()
    folder = command.out / command.experiment
    lines = command.results / f"{command.experiment}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    ledger.restore(lines, folder)
    ledger.record(lines, folder)
    if command.experiment in REGIMES:
        regime = REGIMES[command.experiment]
        if not command.report_only:
            running.run(regime, folder, lines, command.results / "extractors", command.data_root, command.jobs)
        write = write_systems if command.experiment == SYSTEMS_REGIME else write_regime
        write(command.experiment, Runs(regime, folder), lines, command.results)
        return
    experiment = EXPERIMENTS[command.experiment]
    if not command.report_only:
        run(experiment, folder, lines, command)
    write_report(command.experiment, experiment, folder, lines, command.results)


if __name__ == "__main__":
    main(tyro.cli(Command, prog="python -m benchmarks.evidence"))
