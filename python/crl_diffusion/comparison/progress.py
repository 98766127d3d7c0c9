"""Progress of a comparison: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion.comparison.cells import Cell


class _Bars:
    """One bar for each cell, for a terminal."""

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
    """One line when a cell starts and when it ends, for a log file."""

    def __init__(self, work: Sequence[Cell], state: str, console: Console) -> None:
        self.work, self.state, self.console = work, state, console
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
                self._say(f"{cell.name}: {self.state}, {cell.steps} steps")
        for cell in self.work:
            if cell.process is not None and cell not in running and cell.name not in self.ended:
                self.ended.add(cell.name)
                self._say(f"{cell.name}: {'finished' if cell.finished else 'FAILED'}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)


@contextmanager
def progress_display(work: Sequence[Cell], state: str, console: Console, quiet: bool) -> Iterator[_Bars | _Lines]:
    """`state`: what a cell that was started is said to be."""
    if quiet:
        yield _Lines(work, state, console)
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
