"""Running the cells of a comparison: as processes of this machine (`Pool`), or as jobs of Slurm (`slurm.Queue`)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from crl_diffusion.comparison.cells import Cell
from crl_diffusion.comparison.progress import progress_display
from crl_diffusion.files import holder
from crl_diffusion.run_folder.layout import in_use
from crl_diffusion.signals import OF_COMPARE, Stopped, deferred
from crl_diffusion.training import forecast

POLL_SECONDS = 0.5
LOG_TAIL = 12  # lines of the log of a failed run
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Command = Callable[[Cell], list[str]]  # the command line of a cell


class Launcher(Protocol):
    """Where cells run."""

    slots: int  # cells that may be started at a time
    begun: str  # what a started cell is said to be

    def start(self, cells: Sequence[Cell]) -> None:
        """Start the processes of cells."""

    def stop(self, running: Sequence[Cell], signum: int, say: Callable[[str], None]) -> None:
        """What becomes of running cells when a signal, or an error, ends this process."""

    def ending(self, cell: Cell) -> str:
        """How a failed cell ended, as far as its log cannot say that; "" if it can."""


class Pool:
    """Processes of this machine."""

    begun = "running"

    def __init__(self, slots: int, command: Command) -> None:
        self.slots, self.command = slots, command
        self.pipe, _ = os.pipe()  # closed when this process ends, however it ends: see `signals.end_with_compare`

    def start(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
            with open(cell.folder / "log.txt", "ab") as log:
                # One thread for each process: on models this small a second thread costs more than it gains.
                cell.process = subprocess.Popen(
                    self.command(cell),
                    stdin=self.pipe,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **dict.fromkeys(THREADS, "1"), "CI": "true", OF_COMPARE: "1"},
                )

    def stop(self, running: Sequence[Cell], signum: int, say: Callable[[str], None]) -> None:
        """Pass the signal on and wait for checkpoints; after a second signal, kill."""
        started = [cell.process for cell in running if isinstance(cell.process, subprocess.Popen)]
        for process in started:
            process.send_signal(signum)
            process.send_signal(signal.SIGCONT)  # one that was stopped would never end
        try:
            for process in started:
                process.wait()
        except Stopped:
            for process in started:
                process.kill()
            for process in started:
                process.wait()
            raise

    def ending(self, cell: Cell) -> str:
        code = cell.process.poll() if cell.process is not None else None
        if code == -signal.SIGKILL:
            return "(killed by signal 9, as systems do where memory runs out: give fewer --jobs)"
        return f"(killed by signal {-code})" if code is not None and code < 0 else ""


def run(work: Sequence[Cell], launcher: Launcher, console: Console, quiet: bool) -> list[Cell]:
    """Run all cells that are not finished; returns those that failed. Cells that have a process run already. A cell
    whose folder another process writes to waits for that process: it has not failed."""
    waiting = [cell for cell in work if not cell.finished and cell.process is None]
    running = [cell for cell in work if not cell.finished and cell.process is not None]
    failed: list[Cell] = []
    named: set[str] = set()  # cells that were said to wait

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    def ready(cell: Cell) -> bool:
        if not in_use(cell.folder):
            return True
        if cell.name not in named:
            named.add(cell.name)
            say(f"{cell.name}: {holder(cell.folder / '.lock')} writes to its folder; waiting for it")
        return False

    with progress_display(work, launcher.begun, console, quiet) as show:
        try:
            while waiting or running:
                started: list[Cell] = []
                for cell in waiting:
                    if len(running) + len(started) < launcher.slots and ready(cell):
                        started.append(cell)
                if started:
                    running += started
                    with deferred():  # no process starts that `stop` does not know
                        launcher.start(started)
                    waiting = [cell for cell in waiting if cell not in started]
                time.sleep(POLL_SECONDS)
                for cell in [*running]:
                    assert cell.process is not None
                    code = cell.process.poll()
                    if code is None:
                        continue
                    running.remove(cell)
                    cell.finished = code == 0
                    if not cell.finished and in_use(cell.folder):  # another process was faster
                        cell.process = None
                        waiting.append(cell)
                    elif not cell.finished:
                        failed.append(cell)
                show.update(running)
        except BaseException as error:  # the same command continues each run from its last checkpoint
            launcher.stop(running, error.signum if isinstance(error, Stopped) else signal.SIGTERM, say)
            raise
    return failed


def log_path(cell: Cell) -> Path:
    """What a cell's run has printed."""
    return cell.folder / "log.txt"


def tail(cell: Cell, launcher: Launcher) -> str:
    """The last lines of the log of a failed run, and how it ended."""
    path = log_path(cell)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return "\n".join(filter(None, [*lines[-LOG_TAIL:], launcher.ending(cell)]))


def estimate(work: Sequence[Cell], jobs: int, seconds_per_pass: float) -> str:
    """The remaining time in words, from the time of the forward pass of one image."""
    left = [forecast.passes(cell.config, cell.stage_steps) * (1 - cell.steps_done / cell.steps) for cell in work]
    longest, total = max(left) * seconds_per_pass, sum(left) * seconds_per_pass
    wall = max(longest, total / min(jobs, len(work)))
    return (
        f"estimated {forecast.in_words(wall)}: {sum(left):.2g} forward passes of one image in "
        f"{sum(x > 0 for x in left)} run(s), {1e3 * seconds_per_pass:.3g} ms each on this machine, {jobs} at a "
        f"time; the longest run takes "
        f"{forecast.in_words(longest)}"
    )
