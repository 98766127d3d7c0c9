"""Cells as jobs of Slurm: with submitit's executor of local processes in its place and, where Slurm is installed,
with Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crl_diffusion import cli
from crl_diffusion.comparison import cells, runner, slurm
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.errors import OptionError
from helpers.trainer_runs import SHORT, child_environment, options, require_one_line, same_end, train

submitit = pytest.importorskip("submitit", reason="submitit is missing: pip install submitit")

LONG = {**SHORT, "model": "mlp", "steps": 300, "checkpoint_every": 50, "log_every": 10}  # time to be interrupted in
# Every living process is "queued": a job of the local executor is named by its process.
SQUEUE = "#!/bin/sh\nps -e -o pid=,stat= | awk '$2 !~ /^Z/ { print $1 }'\n"


@pytest.fixture
def local_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jobs are processes of this machine, and squeue lists them; returns a folder for a comparison."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("sbatch", "srun", "squeue"):
        (commands / name).write_text(SQUEUE)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)

    def executor(folder: Path, chosen: dict[str, str], slots: int) -> submitit.Executor:
        made = submitit.LocalExecutor(folder)
        made.update_parameters(timeout_min=slurm.minutes(chosen["time"]))
        return made

    monkeypatch.setattr(slurm, "executor", executor)
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(slurm, "LATE_SECONDS", 1.0)
    return tmp_path / "comparison"


def words(out: Path, extractor_folder: Path, *methods: str, **settings: object) -> list[str]:
    out.mkdir(exist_ok=True)
    if not list(out.glob("cnn-*")):
        shutil.copytree(extractor_folder, out, dirs_exist_ok=True)
    places = ["--launcher", "slurm", "--out", str(out)]
    return ["compare", "--methods", *methods, *options({**SHORT, "model": "mlp", **settings}), *places]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stopped(job: slurm.Job) -> int:
    wait_for(lambda: job.poll() is not None)
    code = job.poll()
    assert code is not None
    return code


# Jobs as local processes


def test_each_cell_is_a_job_and_finished_ones_are_kept(
    local_jobs: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(local_jobs, extractor_folder, "fine-tune", "gd")
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    for cell in ("fine-tune, seed 0", "gd, seed 0"):
        assert f"{cell}: submitted, 12 steps\n" in output
        assert f"{cell}: finished\n" in output
    jobs = json.loads((local_jobs / "slurm" / "jobs.json").read_text())
    assert set(jobs) == {"fine-tune-seed0", "gd-seed0"}
    assert "| gd | 1 |" in (local_jobs / "comparison.md").read_text()
    # A run is the one that `train` makes, and its log has what `train` prints.
    config = json.loads((local_jobs / "gd-seed0" / "config.json").read_text())
    assert config["command"].split()[1:4] == ["-m", "crl_diffusion", "train"]
    assert "average FID" in (local_jobs / "gd-seed0" / "log.txt").read_text()

    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("already finished") == 2
    assert json.loads((local_jobs / "slurm" / "jobs.json").read_text()) == jobs


def test_a_killed_run_is_named_with_its_log_and_the_same_command_continues_it(
    local_jobs: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = local_jobs / "gd-seed0"
    arguments = words(local_jobs, extractor_folder, "gd", **LONG)

    def kill_after_a_checkpoint() -> None:
        wait_for(lambda: bool(list(out.glob("checkpoints/00-*.safetensors"))))
        os.kill(json.loads((out / ".lock.json").read_text())["process"], signal.SIGKILL)

    killer = threading.Thread(target=kill_after_a_checkpoint)
    killer.start()
    assert cli.main(arguments) == 1
    killer.join()
    written = capsys.readouterr()
    assert "gd, seed 0: FAILED" in written.out
    job = json.loads((local_jobs / "slurm" / "jobs.json").read_text())["gd-seed0"]
    assert f"gd, seed 0 failed; the end of {out / 'log.txt'}:\n" in written.err
    assert f"(Slurm job {job} ended with exit code -9; what Slurm and submitit wrote: " in written.err
    assert "1 of 1 runs failed; finished ones are kept; give the same command again to continue" in written.err

    assert cli.main(arguments) == 0
    assert "resuming after " in (out / "log.txt").read_text()


def test_a_job_at_its_time_limit_is_queued_again_and_continues_bit_for_bit(
    local_jobs: Path, extractor_folder: Path, tmp_path: Path
) -> None:
    config = RunConfig(method="fine-tune", **LONG)
    (cell,) = cells.cells(Settings(**LONG), ["fine-tune"], [0], local_jobs)
    queue = slurm.Queue(
        local_jobs, slurm.options([]), 1, lambda cell: cells.train_command(cell, Path("data"), "cnn", extractor_folder)
    )
    queue.start([cell])
    assert isinstance(cell.process, slurm.Job)
    wait_for(lambda: bool(list(cell.folder.glob("checkpoints/00-*.safetensors"))))
    # Slurm warns all processes of a job of its time limit; the controller of the local executor, only its own child.
    os.kill(json.loads((cell.folder / ".lock.json").read_text())["process"], signal.SIGUSR2)
    os.kill(parent(json.loads((cell.folder / ".lock.json").read_text())["process"]), signal.SIGUSR2)
    assert stopped(cell.process) == 0
    log = (cell.folder / "log.txt").read_text()
    assert "interrupted by SIGTERM after step" in log
    assert "resuming after " in log
    train(config, tmp_path / "uninterrupted", extractor_folder)
    same_end(cell.folder, tmp_path / "uninterrupted")


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_compare_can_be_ended_and_the_next_one_waits_for_its_jobs(
    local_jobs: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(local_jobs, extractor_folder, "fine-tune", **LONG)
    out = local_jobs / "fine-tune-seed0"

    def interrupt() -> None:
        wait_for(lambda: (out / "metrics.jsonl").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=interrupt)
    killer.start()
    assert cli.main(arguments) == 128 + signal.SIGTERM
    killer.join()
    written, job = capsys.readouterr(), json.loads((local_jobs / "slurm" / "jobs.json").read_text())["fine-tune-seed0"]
    assert f"1 Slurm job(s) go on; to end them, each with a checkpoint: scancel {job}\n" in written.out
    assert "interrupted by SIGTERM; give the same command again" in written.err
    assert not (out / "summary.json").exists()

    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "fine-tune, seed 0: finished" in output
    assert json.loads((local_jobs / "slurm" / "jobs.json").read_text()) == {"fine-tune-seed0": job}
    assert "resuming" not in (out / "log.txt").read_text()  # nobody has interrupted the run


def test_a_job_that_leaves_the_queue_without_a_result_has_failed(
    local_jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells.cells(Settings(), ["gd"], [0], local_jobs)
    queue = slurm.Queue(
        local_jobs, slurm.options([]), 1, lambda cell: [sys.executable, "-c", "import time; time.sleep(99)"]
    )
    queue.start([cell])
    assert isinstance(cell.process, slurm.Job)
    controller = int(cell.process.job.job_id)
    wait_for(lambda: (cell.folder / "log.txt").exists())
    for process in (controller, *descendants(controller)):
        os.kill(process, signal.SIGKILL)
    os.waitpid(controller, 0)
    assert stopped(cell.process) == slurm.NO_RESULT
    assert f"(Slurm job {controller} ended without a result" in queue.ending(cell)
    (local_jobs / "slurm" / "jobs.json").write_text("[]")
    with pytest.raises(
        OptionError, match=r"jobs.json' is damaged \(expected a JSON object\); end the jobs that squeue"
    ):
        queue.attach([cell])
    # While squeue does not answer, nothing is known.
    monkeypatch.setenv("PATH", str(local_jobs.parent / "commands"))
    (local_jobs.parent / "commands" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert not slurm.Queue(local_jobs, slurm.options([]), 1, queue.command).has_left("1")


def descendants(process: int) -> list[int]:
    children = [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [*children, *(deeper for child in children for deeper in descendants(child))]


# What cannot be used


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("0:30:01", 31), ("2-12", 3600), ("1-0:30", 1470), ("1-1:1:1", 1502)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert slurm.minutes(text) == expected
    assert slurm.options([f"time={text}"])["time"] == text


@pytest.mark.parametrize(
    "text", ["time=soon", "time=0", "partition", "=gpu", "gres=", "Gres=1", "cpus-per-task=0", "a\nb=1"]
)
def test_options_that_sbatch_cannot_have_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--slurm has "):
        slurm.options([text])


def test_options_of_sbatch_and_whether_they_ask_for_gpus() -> None:
    chosen = slurm.options(["--partition=gpu", "cpus_per_task=4"])
    assert (chosen["partition"], chosen["cpus-per-task"], chosen["time"]) == ("gpu", "4", "4:00:00")
    asking = {text: slurm.asks_for_gpus(slurm.options([text])) for text in ("gres=gpu:1", "gpus=1", "gpus-per-node=1")}
    assert all(asking.values())
    assert not slurm.asks_for_gpus(slurm.options(["partition=gpu", "gres=nic:1"]))


@pytest.mark.parametrize("missing", ["submitit", "srun", "the launcher"])
def test_what_is_missing_is_one_line(
    missing: str, local_jobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", *options(SHORT), "--out", str(local_jobs), "--launcher", "slurm"]
    expected = {
        "submitit": "--launcher is slurm, which needs submitit: pip install submitit",
        "srun": "--launcher is slurm, but this machine has no srun; run it where Slurm's commands are installed",
        "the launcher": "--slurm is 'partition=gpu'; it needs --launcher slurm",
    }
    if missing == "submitit":
        monkeypatch.setitem(sys.modules, "submitit", None)
    elif missing == "srun":
        (local_jobs.parent / "commands" / "srun").unlink()
        monkeypatch.setenv("PATH", str(local_jobs.parent / "commands"))
    else:
        arguments = [*arguments[:-2], "--slurm", "partition=gpu"]
    assert cli.main(arguments) == 2
    require_one_line(capsys.readouterr().err, expected[missing])
    assert not local_jobs.exists()


# With Slurm


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is missing: this machine has no sbatch")
def test_slurm_runs_the_cells_and_its_refusal_is_one_line(
    tmp_path: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    arguments = [*words(tmp_path / "out", extractor_folder, "fine-tune", "gd"), "--slurm", "time=5"]
    assert cli.main([*arguments, "partition=nowhere"]) == 2
    require_one_line(capsys.readouterr().err, "Slurm has refused the jobs", "nowhere", "change --slurm")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count(": finished") == 2
    assert runner.log_path(cells.Cell(RunConfig(method="gd"), tmp_path / "out" / "gd-seed0")).stat().st_size > 0
