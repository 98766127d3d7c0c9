"""The cells of a comparison as jobs of Slurm, through submitit.

Each cell is one job that runs the same `crl-diffusion train` command as on one machine, in the same run folder, so the
folder of the comparison must be on a file system that all nodes share. The jobs outlive the `compare` that has
submitted them: `jobs.json` names them, and the next `compare` waits for those that are still queued or running. A job
that reaches its time limit or is preempted writes a checkpoint and is queued again.

Whether a job has ended is asked of `squeue`: `sacct`, which submitit asks, needs an accounting database.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_diffusion.comparison.cells import Cell
from crl_diffusion.comparison.runner import THREADS, Command
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.files import read_json, write_json

if TYPE_CHECKING:
    import submitit

DEFAULTS = {"job-name": "crl-diffusion", "time": "4:00:00", "cpus-per-task": "1"}
REQUEUES = 1000  # times that a job may reach its time limit
ASK_SECONDS = 15.0  # between two calls of squeue
LATE_SECONDS = 60.0  # until a file that a node has written is seen here
NO_JOBS = "end the jobs that squeue shows, if any, and delete it"
NO_RESULT = -1  # in place of an exit code


def options(texts: Sequence[str]) -> dict[str, str]:
    """Options of sbatch from KEY=VALUE, with `DEFAULTS`. OptionError if they cannot be used here."""
    chosen = dict(DEFAULTS)
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.lstrip("-").replace("_", "-")
        if not (equals and value and re.fullmatch(r"[a-z][a-z0-9-]*", key)):
            raise OptionError(
                f"--slurm has {text!r}; write KEY=VALUE with an option of sbatch, for example partition=gpu gres=gpu:1"
            )
        chosen[key] = value
    minutes(chosen["time"])
    if not chosen["cpus-per-task"].isdecimal() or int(chosen["cpus-per-task"]) < 1:
        raise OptionError(f"--slurm has cpus-per-task={chosen['cpus-per-task']}; it must be 1 or more")
    return chosen


def minutes(text: str) -> int:
    """A time limit of Slurm in minutes, rounded up: minutes[:seconds], hours:minutes:seconds, days-hours[:..[:..]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None or not any(int(x or 0) for x in match.groups()):
        raise OptionError(f"--slurm has time={text}; write a time limit as Slurm does, for example 4:00:00 or 2-12")
    days, *rest = match.groups()
    parts = [int(x) for x in rest if x is not None]
    if days is None and len(parts) < 3:  # minutes, or minutes:seconds
        parts = [0, *parts]
    hours, mins, seconds = [*parts, 0, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def asks_for_gpus(chosen: dict[str, str]) -> bool:
    return any("gpu" in key or (key == "gres" and "gpu" in value) for key, value in chosen.items())


def require() -> None:
    """OptionError unless submitit is installed and this machine can submit jobs."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise OptionError("--launcher is slurm, which needs submitit: pip install submitit") from None
    if missing := [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]:
        raise OptionError(
            f"--launcher is slurm, but this machine has no {missing[0]}; run it where Slurm's commands are installed, "
            "or use --launcher local"
        )


def executor(folder: Path, chosen: dict[str, str], slots: int) -> submitit.Executor:
    """Jobs with the options of sbatch, at most `slots` at a time."""
    import submitit

    made = submitit.SlurmExecutor(folder, max_num_timeout=REQUEUES)
    own = ("job-name", "time", "cpus-per-task")
    made.update_parameters(
        job_name=chosen["job-name"],
        time=minutes(chosen["time"]),
        cpus_per_task=int(chosen["cpus-per-task"]),
        array_parallelism=slots,
        srun_args=[f"--cpus-per-task={chosen['cpus-per-task']}"],  # srun does not inherit it from Slurm 22.05 on
        additional_parameters={"requeue": True, **{key: value for key, value in chosen.items() if key not in own}},
    )
    return made


class TrainJob:
    """What a job does: the command of a cell, whose output is appended to the cell's log. submitit pickles it."""

    def __init__(self, command: list[str], log: Path, threads: str) -> None:
        self.command, self.log, self.threads = command, log, threads
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """The exit code of the command."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(THREADS, self.threads), "CI": "true"},
                # Slurm sends the warning of the time limit to all processes of a job; `checkpoint` passes it on.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        _wait(self.process)
        return self.process.wait()

    def checkpoint(self) -> Any:
        """submitit calls it before the time limit and upon preemption, and queues the job again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            _wait(self.process)
        return DelayedSubmission(TrainJob(self.command, self.log, self.threads))


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process, also within a signal handler that has interrupted this very function: Popen.wait
    would wait for itself there."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


class Job:
    """The job of one cell, as a process."""

    def __init__(self, job: submitit.Job[int], queue: Queue) -> None:
        self.job, self.queue = job, queue
        self.code: int | None = None
        self.unseen: float | None = None  # since when it is not in the queue, without a result

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        path = self.job.paths.result_pickle
        os.listdir(path.parent)  # network file systems then look again
        if path.exists():
            try:
                self.code = int(self.job.result())
            except RuntimeError:  # submitit's: the job has no result but an exception, which is in its log
                self.code = NO_RESULT
        elif not self.queue.has_left(self.job.job_id):
            self.unseen = None
        elif self.unseen is None:
            self.unseen = time.monotonic()
        elif time.monotonic() - self.unseen > LATE_SECONDS:
            self.code = NO_RESULT
        return self.code


class Queue:
    """Jobs of Slurm, which are submitted together as an array; at most `parallel` of them run at a time."""

    begun = "submitted"

    def __init__(self, out: Path, chosen: dict[str, str], parallel: int, command: Command) -> None:
        self.folder, self.chosen, self.parallel, self.command = out / "slurm", chosen, parallel, command
        self.slots = 10_000  # Slurm queues them
        self.asked = -ASK_SECONDS
        self.queued: set[str] | None = None  # None: Slurm does not answer

    def attach(self, cells: Sequence[Cell]) -> None:
        """Find the jobs of these cells that an earlier `compare` has submitted and that have not ended."""
        import submitit

        found = self.recorded()
        for cell in cells:
            if (name := found.get(cell.folder.name)) is not None:
                cell.process = Job(submitit.SlurmJob(self.folder, name), self)

    def start(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            cell.folder.mkdir(parents=True, exist_ok=True)
        threads = self.chosen["cpus-per-task"]
        work = [TrainJob(self.command(cell), (cell.folder / "log.txt").absolute(), threads) for cell in cells]
        try:
            with redirect_stderr(io.StringIO()):  # submitit also prints what it raises
                jobs = executor(self.folder, self.chosen, self.parallel).submit_array(work)
        except RuntimeError as error:  # submitit's, with the words of sbatch
            reason = (str(error).strip().splitlines() or ["sbatch has failed"])[0]
            raise OptionError(f"Slurm has refused the jobs ({reason}); change --slurm") from error
        self.asked, found = -ASK_SECONDS, self.recorded()
        for cell, job in zip(cells, jobs, strict=True):
            cell.process = Job(job, self)
            found[cell.folder.name] = job.job_id
        write_json(self.folder / "jobs.json", found)

    def recorded(self) -> dict[str, str]:
        """The jobs of an earlier `compare` that have not ended, by the names of their run folders."""
        path = self.folder / "jobs.json"
        if not path.exists():
            return {}
        found = read_json(path, NO_JOBS)
        if not isinstance(found, dict):
            raise RecordError(path, "is damaged (expected a JSON object)", NO_JOBS)
        return {folder: str(name) for folder, name in found.items() if not self.has_left(str(name))}

    def has_left(self, name: str) -> bool:
        """Whether a job is neither queued nor running; False if Slurm does not answer."""
        if time.monotonic() - self.asked >= ASK_SECONDS:
            words = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            self.asked = time.monotonic()
            self.queued = None if done.returncode else set(done.stdout.split())
        return self.queued is not None and name not in self.queued

    def stop(self, running: Sequence[Cell], signum: int, say: Callable[[str], None]) -> None:
        """Leave the jobs alone, and say how to end them."""
        names = sorted({cell.process.job.job_id for cell in running if isinstance(cell.process, Job)})
        if names:
            say(f"{len(names)} Slurm job(s) go on; to end them, each with a checkpoint: scancel {' '.join(names)}")

    def ending(self, cell: Cell) -> str:
        if not isinstance(cell.process, Job):
            return ""
        job, code = cell.process.job, cell.process.code
        how = "ended without a result" if code == NO_RESULT else f"ended with exit code {code}"
        return f"(Slurm job {job.job_id} {how}; what Slurm and submitit wrote: {job.paths.stderr})"
