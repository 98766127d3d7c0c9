"""Running the cells of a comparison, several processes at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from crl_diffusion.comparison.cells import Cell, train_command
from crl_diffusion.comparison.progress import progress_display
from crl_diffusion.signals import Stopped
from crl_diffusion.training import forecast

POLL_SECONDS = 0.5
LOG_TAIL = 12  # lines of the log of a failed run


def run(
    work: Sequence[Cell],
    jobs: int,
    data_root: Path,
    extractor: str,
    extractor_folder: Path,
    console: Console,
    quiet: bool,
) -> list[Cell]:
    """Run all cells that are not finished, `jobs` at a time; returns those that failed."""
    waiting = [cell for cell in work if not cell.finished]
    running: list[Cell] = []
    failed: list[Cell] = []
    # One thread for each process: on models this small a second thread costs more than it gains.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with progress_display(work, console, quiet) as show:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    cell.folder.mkdir(parents=True, exist_ok=True)
                    with open(cell.folder / "log.txt", "ab") as log:
                        cell.process = subprocess.Popen(
                            train_command(cell, data_root, extractor, extractor_folder),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, **threads, "CI": "true"},
                        )
                    running.append(cell)
                time.sleep(POLL_SECONDS)
                for cell in [cell for cell in running if cell.process is not None and cell.process.poll() is not None]:
                    running.remove(cell)
                    cell.finished = cell.process is not None and cell.process.returncode == 0
                    if not cell.finished:
                        failed.append(cell)
                show.update(running)
        except BaseException as error:  # the same command continues each run from its last checkpoint
            end(running, error.signum if isinstance(error, Stopped) else signal.SIGTERM)
            raise
    return failed


def end(running: Sequence[Cell], signum: int) -> None:
    """Send a signal to all processes and wait for their checkpoints; after a second signal, kill them."""
    started = [cell.process for cell in running if cell.process is not None]
    for process in started:
        process.send_signal(signum)
    try:
        for process in started:
            process.wait()
    except Stopped:
        for process in started:
            process.kill()
        raise


def tail(cell: Cell) -> str:
    """The last lines of the log of a failed run."""
    path = cell.folder / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    killed = cell.process is not None and (cell.process.poll() or 0) < 0  # a killed process cannot write that itself
    ended = [f"(killed by signal {-cell.process.returncode})"] if killed and cell.process is not None else []
    return "\n".join(lines[-LOG_TAIL:] + ended)


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
