"""SIGINT, SIGTERM and SIGHUP: a checkpoint, one line, the signal's exit status, and the same bits after resuming."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, errors, files, signals
from crl_diffusion.comparison import cells, runner
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.evaluation import evaluate, summaries
from crl_diffusion.methods import penalties
from crl_diffusion.methods.replay import Pool
from crl_diffusion.reporting import run_pictures, runs
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.training import loop
from crl_diffusion.training import run as training_run
from helpers.trainer_runs import (
    SHORT,
    TrainCommand,
    at_call,
    child_environment,
    few_samples,
    options,
    python,
    same_end,
    train_words,
)
from rich.console import Console

pytestmark = [
    few_samples,
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.skipif(os.name != "posix", reason="SIGHUP and a SIGTERM to handle are missing: they need POSIX"),
]


@pytest.fixture(autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """nohup ignores SIGHUP, and a script's background command SIGINT; the trainer leaves an ignored signal ignored."""
    ignored = [number for number in signals.HANDLED if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def _kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture
def interrupted(
    train_command: TrainCommand, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Sends `train` a signal when a function is called for the call-th time; returns its output on stderr."""

    def run(owner: Any, name: str, call: int, number: signal.Signals = signal.SIGTERM, **settings: Any) -> str:
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, call, _kill(number))
            assert train_command(**settings) == 128 + number
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("number", "call", "kept", "where"),
    [
        (signal.SIGTERM, 1, "00-00000001", "after step 1 of stage 1"),
        (signal.SIGTERM, 9, "01-00000003", "after step 3 of stage 2"),  # between two rows of losses
        (signal.SIGHUP, 11, "01-00000005", "after step 5 of stage 2"),
        (signal.SIGINT, 10, "01-00000004", "after step 4 of stage 2"),  # where there is a checkpoint anyway
        (signal.SIGTERM, 6, "00-00000006", "after step 6 of stage 1"),  # the last of its stage
    ],
)
def test_after_a_signal_the_step_is_finished_and_a_checkpoint_written(
    number: signal.Signals,
    call: int,
    kept: str,
    where: str,
    finished: Path,
    train_command: TrainCommand,
    interrupted: Callable[..., str],
    tmp_path: Path,
) -> None:
    before = signal.getsignal(number)
    assert interrupted(training_run, "training_step", call, number) == (
        f"crl-diffusion: interrupted by {number.name} {where}, with a checkpoint; "
        "give the same command again to resume\n"
    )
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == kept
    assert signal.getsignal(number) == before
    assert train_command() == 0
    same_end(finished, tmp_path / "run")


def test_losses_since_the_last_row_survive_interruptions(
    train_command: TrainCommand, interrupted: Callable[..., str], tmp_path: Path
) -> None:
    """Interrupted in every step of a row of losses over five steps."""
    sparse = {"log_every": 5, "checkpoint_every": 100, "tasks": 1}
    assert train_command("uninterrupted", **sparse) == 0
    for _ in range(6):
        interrupted(training_run, "training_step", 1, **sparse)
    assert train_command(**sparse) == 0
    runs = [tmp_path / name for name in ("uninterrupted", "run")]
    expected, resumed = ((run / "metrics.jsonl").read_bytes() for run in runs)
    assert resumed == expected
    ends = [checkpoint.load(run / "checkpoints" / "01-00000000.safetensors") for run in runs]
    assert all(torch.equal(x, ends[1].tensors[name]) for name, x in ends[0].tensors.items())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (penalties, "estimate_fisher"),
        (Pool, "refill"),
        (evaluate, "measure"),
        (files, "save_file"),
        (run_pictures, "of_run"),
        (summaries, "summarise"),
    ],
)
def test_outside_the_steps_a_signal_ends_the_run_at_once_and_it_resumes(
    owner: Any, name: str, finished: Path, train_command: TrainCommand, interrupted: Callable[..., str], tmp_path: Path
) -> None:
    error = interrupted(owner, name, 1)
    assert error.startswith("crl-diffusion: interrupted by SIGTERM")
    assert error.endswith("; give the same command again to resume\n")
    assert error.count("\n") == 1
    assert train_command() == 0
    same_end(finished, tmp_path / "run")


def test_two_signals_at_once_count_as_one(
    finished: Path, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        _kill(signal.SIGTERM)()
        _kill(signal.SIGHUP)()

    with monkeypatch.context() as patch:
        at_call(patch, training_run, "training_step", 3, twice)
        assert train_command() == 128 + signal.SIGTERM
    assert train_command() == 0
    same_end(finished, tmp_path / "run")


def test_a_signal_interrupts_report(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_call(monkeypatch, runs, "find", 1, _kill(signal.SIGHUP))
    assert cli.main(["report", str(finished), "--out", str(tmp_path)]) == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "crl-diffusion: interrupted by SIGHUP; give the same command again to resume\n"


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.handled():
            _kill(signal.SIGHUP)()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(signals.Stopped, match="interrupted by SIGTERM"):
                _kill(signal.SIGTERM)()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_deferred_blocks_may_be_nested_and_pass_errors_on() -> None:
    pending = []

    def block(error: type[Exception] | None) -> None:
        with signals.deferred():
            pending.append(signals.pending())
            if error is not None:
                raise error
            with signals.deferred():
                _kill(signal.SIGTERM)()
            pending.append(signals.pending())

    with signals.handled(), pytest.raises(signals.Stopped, match="SIGTERM"):
        block(None)
    with signals.handled(), pytest.raises(ZeroDivisionError):
        block(ZeroDivisionError)
    assert pending == [0, signal.SIGTERM, 0]
    assert signals._State.depth == 0


def test_a_signal_that_python_drops_comes_again() -> None:
    class Dropping:
        def __del__(self) -> None:
            _kill(signal.SIGTERM)()

    def run() -> None:
        Dropping()
        time.sleep(10)

    with signals.handled(), pytest.raises(signals.Stopped, match="SIGTERM"):
        run()


def test_a_signal_while_python_compiles_a_module_is_not_lost() -> None:
    """Where it computes constants, Python looks for signals and drops what their handlers raise."""

    def run() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        compile(f"x = [{'10**30 * 10**30, ' * 20_000}]", "module", "exec")

    before = signal.signal(signal.SIGALRM, signals._receive)
    try:
        with signals.handled(), pytest.raises(signals.Stopped, match="SIGALRM"):
            run()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_error_that_other_code_makes_of_a_signal_is_still_the_signal() -> None:
    def run() -> None:
        try:
            _kill(signal.SIGHUP)()
        finally:
            raise OSError(5, "the terminal has hung up")

    with pytest.raises(signals.Stopped, match="SIGHUP") as raised, signals.handled():
        run()
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(OSError, match="without a signal"), signals.handled():
        raise OSError("without a signal")


# Imported by Python before the program. The signal comes when a module is about to be imported, or at the very end.
AT_A_MOMENT = """
import atexit, os, signal, sys
moment = os.environ["MOMENT"]
def kill():
    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == moment.removeprefix("dropped in "):
            try:
                kill()
            except BaseException:
                if name == moment:
                    raise
if moment == "the end":
    atexit.register(kill)
    sys.modules["rich"] = None  # so the command ends at once
else:
    sys.meta_path.insert(0, AtImport())
"""


@pytest.mark.parametrize("number", signals.HANDLED)
@pytest.mark.parametrize(
    ("moment", "handled"),
    [
        ("crl_diffusion.cli", False),
        ("crl_diffusion.cli.commands", True),
        ("crl_diffusion.config", True),
        ("dropped in crl_diffusion.config", True),  # as C code does, or torch's C++, which aborts the process
        ("the end", False),
    ],
)
def test_a_signal_at_the_start_or_the_end_of_a_command_is_one_line_at_most(
    moment: str, handled: bool, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_A_MOMENT)
    env = {**os.environ, **child_environment(), "MOMENT": moment, "SIGNAL": str(int(number))}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    words = [sys.executable, "-m", "crl_diffusion", "list"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    line = f"crl-diffusion: interrupted by {number.name}; give the same command again to resume\n"
    if handled:
        assert (done.returncode, done.stderr) == (128 + number, line)
    else:  # the process ends by the signal, which a shell calls 128 + number, too
        assert done.returncode == -number
        assert done.stderr.count("\n") == (moment == "the end"), done.stderr
        assert ("'rich' is missing" in done.stderr) == (moment == "the end")


# Two signals, as if they were seconds apart, in a step that takes a minute.
SECOND = """
import os, signal, sys, threading, time
from crl_diffusion import signals
from crl_diffusion.training import run
from crl_diffusion.cli import main
original, calls = run.training_step, 0
def slow(*args):
    global calls
    calls += 1
    if calls == 8:
        signals.SAME_WITHIN = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return original(*args)
run.training_step = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_signal_ends_a_process_at_once(finished: Path, extractor_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = python("-c", SECOND, *train_words(out, extractor_folder))
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert sorted(path.stem for path in (out / "checkpoints").iterdir())[-1] == "01-00000000"
    assert cli.main(train_words(out, extractor_folder)) == 0
    same_end(finished, out)


# A run that `compare` has started, as far as signals go.
RUN = """
import time
from crl_diffusion import signals
with signals.handled():
    signals.end_with_compare()
    print("begun, stdin:", repr(open(0).read()), flush=True)
    try:
        time.sleep(100)
    except signals.Stopped as stop:
        print(stop, flush=True)
"""


def _pool(slots: int = 1, script: str = RUN) -> runner.Pool:
    return runner.Pool(slots, lambda cell: [sys.executable, "-c", script])


@pytest.fixture
def cells_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[cells.Cell]:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    return cells.cells(Settings(), ["gd", "rank1"], [0], tmp_path)


def _wait_for_text(path: Path, text: str) -> None:
    end = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, path.read_text() if path.exists() else f"{path} is missing"
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing")
def test_a_run_ends_when_compare_is_killed(cells_of_two: list[cells.Cell]) -> None:
    log = runner.log_path(cells_of_two[0])
    compare = os.fork()
    if compare == 0:
        _pool().start(cells_of_two[:1])
        time.sleep(100)
        os._exit(0)
    _wait_for_text(log, "begun, stdin: ''\n")  # which is as empty as /dev/null
    assert "interrupted" not in log.read_text()
    os.kill(compare, signal.SIGKILL)
    os.waitpid(compare, 0)
    _wait_for_text(log, "interrupted by SIGTERM\n")


@pytest.mark.parametrize("variable", ["", "1"])  # set by hand, where stdin is no pipe
def test_a_process_that_compare_has_not_started_does_not_watch_stdin(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signals.OF_COMPARE, variable)
    before = os.fstat(0)
    assert not stat.S_ISFIFO(before.st_mode), "pytest has a stdin of its own, which is no pipe"
    signals.end_with_compare()
    assert not signals.of_compare()
    assert os.path.samestat(os.fstat(0), before)


def _run_until_signal(work: list[cells.Cell], pool: runner.Pool) -> None:
    with signals.handled(), pytest.raises(signals.Stopped, match="SIGTERM"):
        runner.run(work, pool, Console(file=io.StringIO()), quiet=True)


def test_a_signal_while_compare_starts_runs_reaches_all_of_them(cells_of_two: list[cells.Cell]) -> None:
    def command(cell: cells.Cell) -> list[str]:
        if cell is cells_of_two[1]:
            _wait_for_text(runner.log_path(cells_of_two[0]), "begun")
            _kill(signal.SIGTERM)()
        return [sys.executable, "-c", RUN]

    _run_until_signal(cells_of_two, runner.Pool(2, command))
    for cell in cells_of_two:
        assert cell.process is not None
        assert cell.process.poll() is not None


def test_compare_ends_a_run_that_was_stopped(cells_of_two: list[cells.Cell]) -> None:
    (cell, _) = cells_of_two
    rescued: list[int] = []

    def stop_both() -> None:
        _wait_for_text(runner.log_path(cell), "begun")
        assert isinstance(cell.process, subprocess.Popen)
        cell.process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        if cell.process.returncode is None:
            rescued.append(cell.process.pid)
            cell.process.kill()

    thread = threading.Thread(target=stop_both, daemon=True)
    thread.start()
    _run_until_signal([cell], _pool())
    assert rescued == []
    assert "interrupted by SIGTERM" in runner.log_path(cell).read_text()


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_compare_passes_a_signal_on_and_starts_no_other_run(extractor_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    settings = options({**SHORT, "steps": 100_000, "tasks": 1, "checkpoint_every": 10})
    words = ["compare", "--methods", "fine-tune", "gd", "--jobs", "1", *settings, "--out", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "crl_diffusion", *map(str, [*words, "--extractor-folder", extractor_folder])],
        env={**os.environ, **child_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = out / "gd-seed0"
    _wait_for(first / "checkpoints" / "00-00000010.safetensors", process)
    process.send_signal(signal.SIGTERM)
    _, error_output = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert error_output == "crl-diffusion: interrupted by SIGTERM; give the same command again to resume\n"
    log = (first / "log.txt").read_text()
    assert "interrupted by SIGTERM after step" in log
    assert "Traceback" not in log
    step = int(log.split("after step ")[1].split()[0])
    newest, complaints = checkpoint.latest(first / "checkpoints")
    assert newest is not None
    assert (newest.stage, newest.step, complaints) == (0, step, [])
    assert not (out / "fine-tune-seed0").exists()


# One process of two gets a signal in its 9th step.
ONE_OF_TWO = """
import os, signal, sys
from crl_diffusion.training import run
from crl_diffusion.cli import main
original, calls = run.training_step, 0
def counted(*args):
    global calls
    calls += 1
    if calls == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)
run.training_step = counted
code = main(sys.argv[1:])
print("ended with", code, flush=True)
sys.exit(code)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
@pytest.mark.slow
def test_one_process_of_several_stops_all_of_them(extractor_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ONE_OF_TWO)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    done = python(*launch, script, *train_words(tmp_path / "run", extractor_folder))
    assert done.returncode != 0
    assert done.stdout.count(f"ended with {128 + signal.SIGTERM}") == 2, done.stderr
    assert done.stderr.count("crl-diffusion: interrupted by SIGTERM after step 3 of stage 2, with a checkpoint") == 1
    newest, complaints = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert (newest.stage, newest.step, complaints) == (1, 3, [])
    for name in ("run", "uninterrupted"):
        done = python(*launch, "-m", "crl_diffusion", *train_words(tmp_path / name, extractor_folder))
        assert done.returncode == 0, done.stderr
    same_end(tmp_path / "uninterrupted", tmp_path / "run")


def test_a_library_call_leaves_signals_alone(
    extractor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(number: int, frame: object) -> None:
        raise InterruptedError("mine")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        at_call(monkeypatch, training_run, "training_step", 2, _kill(signal.SIGTERM))
        config = RunConfig(method="gd", **SHORT)
        with pytest.raises(errors.TrainingError, match="mine"):
            loop.train(config, tmp_path / "run", extractor_folder=extractor_folder, say=lambda line: None)
    finally:
        signal.signal(signal.SIGTERM, before)
