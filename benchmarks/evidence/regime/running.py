"""Makes the runs of a regime, some at a time, and records them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from crl_diffusion import signals
from crl_diffusion.comparison import cells, runner
from crl_diffusion.data.tasks import load
from crl_diffusion.evaluation import evaluate
from crl_diffusion.training.plan import resolve
from rich.console import Console

from .. import ledger
from .definitions import BASELINE, Regime
from .runs import Runs, cell

AT_ONCE = 20  # runs between two updates of the ledger


def run(regime: Regime, folder: Path, lines: Path, extractors: Path, data_root: Path, jobs: int) -> Runs:
    """Make the runs that are missing. A run that fails is left out, and is tried again by the next command."""
    console, failed = Console(soft_wrap=True), set[str]()
    example = Runs(regime, folder).config("constant", BASELINE, 0)
    for held_out in ("test", "validation"):
        config = resolve(type(example)(**{**vars(example), "held_out": held_out}))
        data = load(config, data_root)
        evaluate.prepare(evaluate.instruments("cnn", data, extractors, "cpu"), config, data)

    def train_command(cell: cells.Cell) -> list[str]:
        return cells.train_command(cell, data_root, "cnn", extractors)

    pool = runner.Pool(jobs or os.cpu_count() or 1, train_command)
    while missing := (runs := Runs(regime, folder, failed)).missing():
        console.print(f"{len(missing)} runs or more are missing", highlight=False)
        work = [cell(wanted, folder, data) for wanted in missing[:AT_ONCE]]
        try:
            with signals.handled():  # on a signal, the runs write checkpoints
                ended = runner.run(work, pool, console, quiet=True)
        except signals.Stopped as stop:
            sys.exit(f"{stop}; to resume, give the same command again")
        failed |= {str(one.folder.relative_to(folder)) for one in ended}
        ledger.record(lines, folder)
    return runs
