"""Many runs: methods x seeds as processes of their own, one a core, and then one table.

Each cell is a run folder made by `crl-diffusion train` and named by `folder_name`; finished cells are kept, interrupted
ones go on from their last checkpoint.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion.method import Method, RunConfig, Settings, parse_method, spell
from crl_diffusion.records import read_rows

POLL_SECONDS = 0.5
LOG_TAIL = 12  # lines of a failed run that are shown


@dataclass
class Cell:
    """One run of the comparison, and its process once it has started."""

    config: RunConfig
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    stage_steps: Sequence[int] = ()  # of each stage; known once the data are

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def steps_done(self) -> int:
        """Read from the run's own log, which is all that processes share."""
        if self.finished:
            return self.steps
        rows = [row for row in read_rows(self.folder / "metrics.jsonl") if row["kind"] == "step"]
        if not rows:
            return 0
        return int(sum(self.stage_steps[: rows[-1]["stage"] - 1]) + rows[-1]["step"])


def cells(
    settings: Settings, methods: Sequence[str], seeds: Sequence[int], out: Path, lams: Sequence[float] = ()
) -> list[Cell]:
    """All cells, the longest first, so that no core is left alone with a long one at the end. With `lams`, a method
    that has a penalty gets one cell for each."""
    common = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    made = [
        Cell(RunConfig(**common, method=method, seed=seed), out / folder_name(method, seed))
        for seed in seeds
        for method in with_lams(methods, lams)
    ]
    return sorted(made, key=lambda cell: _cost(cell.config.recipe), reverse=True)


def with_lams(methods: Sequence[str], lams: Sequence[float]) -> list[str]:
    """The methods in their one spelling, each that has a penalty once for each lam."""
    spelled: list[str] = []
    for method in methods:
        if parse_method(method).penalty is None or not lams:
            spelled.append(spell(method))
        else:
            spelled += [spell(f"{method}{',' if ':' in method else ':'}lam={lam:g}") for lam in lams]
    return list(dict.fromkeys(spelled))


def folder_name(method: str, seed: int) -> str:
    """What files may be called on every system: gd+bands8:top,lam=60 -> gd+bands8_top_lam=60-seed0."""
    return f"{method.replace(':', '_').replace(',', '_')}-seed{seed}"


def _cost(method: Method) -> tuple[int, bool]:
    return len(method.replays), method.penalty is not None


def command(cell: Cell, data_root: Path, extractor: Path) -> list[str]:
    """The command that makes this cell, which anyone can give again by hand."""
    options = []
    default = RunConfig(method=cell.config.method)
    for name, value in asdict(cell.config).items():
        if name in ("method", "seed") or value != getattr(default, name):
            options += [f"--{name.replace('_', '-')}", str(value)]
    places = ["--out", str(cell.folder), "--data-root", str(data_root), "--extractor", str(extractor)]
    return [sys.executable, "-m", "crl_diffusion", "train", *options, *places]


def run(work: Sequence[Cell], jobs: int, data_root: Path, extractor: Path, console: Console, quiet: bool) -> list[Cell]:
    """Run all cells that are not finished, `jobs` at a time; returns those that failed."""
    waiting = [cell for cell in work if not cell.finished]
    running: list[Cell] = []
    failed: list[Cell] = []
    # One thread a process: on models this small a second thread costs more than it gives.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with _progress(work, console, quiet) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    cell.folder.mkdir(parents=True, exist_ok=True)
                    with open(cell.folder / "log.txt", "ab") as log:
                        cell.process = subprocess.Popen(
                            command(cell, data_root, extractor),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, **threads, "CI": "true"},
                        )
                    running.append(cell)
                time.sleep(POLL_SECONDS)
                for cell in [cell for cell in running if cell.process is not None and cell.process.poll() is not None]:
                    running.remove(cell)
                    if not cell.finished:
                        failed.append(cell)
                show.update(running)
        finally:
            for cell in running:  # only if interrupted: each goes on from its last checkpoint when asked again
                if cell.process is not None:
                    cell.process.terminate()
                    cell.process.wait()
    return failed


def tail(cell: Cell) -> str:
    """The last lines that a failed run has written."""
    path = cell.folder / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join(lines[-LOG_TAIL:])


class _Bars:
    """One bar a cell, for people."""

    def __init__(self, work: Sequence[Cell], progress: Progress) -> None:
        self.progress = progress
        self.all = progress.add_task(
            "all runs", total=sum(c.steps for c in work), completed=sum(c.steps_done for c in work)
        )
        self.work = work
        self.bars = {
            c.name: progress.add_task(c.name, total=c.steps, completed=c.steps_done, start=c.finished) for c in work
        }

    def update(self, running: Sequence[Cell]) -> None:
        done = 0
        for cell in self.work:
            steps = cell.steps_done
            done += steps
            if cell in running:
                self.progress.start_task(self.bars[cell.name])
            self.progress.update(self.bars[cell.name], completed=steps)
        self.progress.update(self.all, completed=done)


class _Lines:
    """One line when a cell begins and when it ends, for logs."""

    def __init__(self, work: Sequence[Cell], console: Console) -> None:
        self.work, self.console = work, console
        self.begun: set[str] = set()
        self.ended: set[str] = set()
        for cell in work:
            if cell.finished:
                self.ended.add(cell.name)
                self._say(f"{cell.name}: already finished")

    def update(self, running: Sequence[Cell]) -> None:
        for cell in running:
            if cell.name not in self.begun:
                self.begun.add(cell.name)
                self._say(f"{cell.name}: running, {cell.steps} steps")
        for cell in self.work:
            if cell.process is not None and cell not in running and cell.name not in self.ended:
                self.ended.add(cell.name)
                self._say(f"{cell.name}: {'finished' if cell.finished else 'FAILED'}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)


@contextmanager
def _progress(work: Sequence[Cell], console: Console, quiet: bool) -> Iterator[_Bars | _Lines]:
    if quiet:
        yield _Lines(work, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(work, progress)
