"""Many runs: methods x seeds as processes of their own, one a core, and then one table.

Each cell is a run folder made by `crl-diffusion train` and named by `folder_name`; finished cells are kept, interrupted
ones go on from their last checkpoint. A folder holds one comparison: more methods and seeds add to it, other settings
are refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion import cost
from crl_diffusion.method import Method, OptionError, RunConfig, Settings, parse_method, spell
from crl_diffusion.readers import read_config, read_metrics
from crl_diffusion.records import RecordError
from crl_diffusion.signals import Stopped

POLL_SECONDS = 0.5
LOG_TAIL = 12  # lines of a failed run that are shown


@dataclass
class Cell:
    """One run of the comparison, and its process once it has started."""

    config: RunConfig
    folder: Path
    stage_steps: Sequence[int] = ()  # of each stage; known once the data are
    process: subprocess.Popen[bytes] | None = None
    finished: bool = False  # with whole records

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    @property
    def steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def steps_done(self) -> int:
        """Read from the run's own log, which is all that processes share; 0 where that is damaged, as the run says."""
        if self.finished:
            return self.steps
        try:
            rows = [row for row in read_metrics(self.folder) if row["kind"] == "step"]
        except RecordError:
            return 0
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
            spelled += [spell(f"{method}{',' if ':' in method else ':'}lam={lam!r}") for lam in lams]
    return list(dict.fromkeys(spelled))


def folder_name(method: str, seed: int) -> str:
    """What files may be called on every system: gd+bands8:top,lam=60 -> gd+bands8_top_lam=60-seed0."""
    return f"{method.replace(':', '_').replace(',', '_')}-seed{seed}"


def _cost(method: Method) -> tuple[int, bool]:
    return len(method.replays), method.penalty is not None


def check_others(work: Sequence[Cell], out: Path) -> None:
    """Refuse a folder that holds runs with other settings than these, whose numbers would not compare, or finished ones
    that are not part of this comparison and could not be shown beside it."""
    from crl_diffusion.report import read_finished  # torch: not before the options are known to be good

    for path in sorted(out.glob("*/summary.json")):
        if path.parent not in [cell.folder for cell in work]:
            read_finished(path.parent)
    wanted = _comparable(work[0].config.as_json())
    for path in sorted(out.glob("*/config.json")):
        saved = _comparable(read_config(path.parent)["run"])
        differ = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
        if differ:
            what = ", ".join(f"{key} {saved.get(key)!r} there, {wanted.get(key)!r} asked for" for key in differ)
            raise OptionError(
                f"--out {str(out)!r} holds runs with other settings: {path.parent.name} ({what}); use another folder"
            )


def _comparable(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in ("method", "recipe", "seed")}


def options(config: RunConfig) -> list[str]:
    """The options of `crl-diffusion train` that give this configuration."""
    default, words = RunConfig(method=config.method), []
    for name, value in asdict(config).items():
        option = f"--{name.replace('_', '-')}"
        if name not in ("method", "seed") and value == getattr(default, name):
            continue
        words += [option, str(value)]
    return words


def command(cell: Cell, data_root: Path, extractor: str, extractor_folder: Path) -> list[str]:
    """The command that makes this cell, which anyone can give again by hand."""
    places = ["--out", str(cell.folder), "--data-root", str(data_root), "--extractor-folder", str(extractor_folder)]
    return [sys.executable, "-m", "crl_diffusion", "train", *options(cell.config), "--extractor", extractor, *places]


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
                            command(cell, data_root, extractor, extractor_folder),
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
        except BaseException as error:  # each run goes on from its last checkpoint when asked again
            end(running, error.signum if isinstance(error, Stopped) else signal.SIGTERM)
            raise
    return failed


def end(running: Sequence[Cell], signum: int) -> None:
    """Pass a signal on and wait until all have written their checkpoints; after a second signal, do not wait."""
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
    """The last lines that a failed run has written."""
    path = cell.folder / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    killed = cell.process is not None and (cell.process.poll() or 0) < 0  # it could not say so itself
    ended = [f"(killed by signal {-cell.process.returncode})"] if killed and cell.process is not None else []
    return "\n".join(lines[-LOG_TAIL:] + ended)


def estimate(work: Sequence[Cell], jobs: int, seconds_per_pass: float) -> str:
    """What is still to be done, in words, from the time that one image takes."""
    left = [cost.passes(cell.config, cell.stage_steps) * (1 - cell.steps_done / cell.steps) for cell in work]
    longest, total = max(left) * seconds_per_pass, sum(left) * seconds_per_pass
    wall = max(longest, total / min(jobs, len(work)))
    return (
        f"estimated {cost.in_words(wall)}: {sum(left):.2g} forward passes of one image in {sum(x > 0 for x in left)} "
        f"run(s), {1e3 * seconds_per_pass:.3g} ms each on this machine, {jobs} at a time; the longest run takes "
        f"{cost.in_words(longest)}"
    )


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
