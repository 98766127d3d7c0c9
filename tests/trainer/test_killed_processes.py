"""Real processes of `train` and `compare` that get real signals at random moments and are started again at once."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crl_diffusion import signals
from helpers.trainer_runs import SHORT, child_environment, options, same_end, train_words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="/proc is missing"),
]
LONGER = {**SHORT, "model": "mlp", "steps": 150, "checkpoint_every": 10}
PATIENCE = 120  # seconds until a process that should end has ended


def _defaults() -> None:
    for number in signals.HANDLED:  # nohup ignores SIGHUP, and a script's background command SIGINT
        signal.signal(number, signal.SIG_DFL)


def _begin(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "crl_diffusion", *words],
        env={**os.environ, **child_environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_defaults,
    )


def _processes(out: Path) -> list[str]:
    """The command lines of the processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if str(out) in line:
            found.append(f"{path.parent.name}: {line}")
    return found


def _require_none(out: Path) -> None:
    end = time.monotonic() + PATIENCE
    while processes := _processes(out):
        assert time.monotonic() < end, processes
        time.sleep(0.05)


def _killed(words: list[str], seconds: float, chosen: random.Random) -> str:
    """Start a command and send it a signal, alone or, as terminals do, with its group. How it went in a few words; ""
    if it ended before."""
    process = _begin(words)
    moment = chosen.uniform(1, seconds)  # before, Python itself may not have started: see test_signals.py
    number = chosen.choice([signal.SIGKILL, *signals.HANDLED])
    group = number in (signal.SIGINT, signal.SIGHUP) and chosen.random() < 0.5
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        (os.killpg if group else os.kill)(process.pid, number)
        how = f"{number.name}{' to the group' if group else ''} after {moment:.2f} s"
    else:
        how = ""
    output, _ = process.communicate(timeout=PATIENCE)
    assert "failed" not in output.lower(), f"{how}\n{output}"
    assert "Traceback" not in output, f"{how}\n{output}"
    assert process.returncode in ((128 + number, -number, 0) if how else (0,)), f"{how}\n{output}"
    return how


def _campaign(words: list[str], out: Path, kills: int, runs: list[str]) -> None:
    """Kill a command that writes to `out` so many times, and again from the start whenever it has come to its end.
    `runs` are the run folders in it."""
    chosen = random.Random(seed := secrets.randbelow(2**31))
    print("seed", seed)
    whole = out.with_name("uninterrupted")
    begun = time.monotonic()
    process = _begin([word.replace(str(out), str(whole)) for word in words])
    output, _ = process.communicate()
    assert process.returncode == 0, output
    seconds = time.monotonic() - begun
    done, histories = 0, 0
    while done < kills:
        histories += 1
        history = []
        while done < kills and (how := _killed(words, seconds, chosen)):
            history.append(how)
            done += 1
            print(f"{histories}: {how}", flush=True)
        process = _begin(words)
        output, _ = process.communicate()
        message = "\n".join([*history, output])
        assert process.returncode == 0, message
        assert "failed" not in output.lower(), message
        for run in runs:
            same_end(whole / run, out / run, message)
        assert not [path for path in out.rglob("*") if ".tmp" in path.name], message
        _require_none(out)
        shutil.rmtree(out)


def test_25_kills_of_train(extractor_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _campaign(train_words(out, extractor_folder, **LONGER), out, 25, [""])


def test_10_kills_of_compare(tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    words = ["compare", "--methods", "fine-tune", "gd+rank1", "--jobs", "2", *options(LONGER), "--out", str(out)]
    _campaign(words, out, 10, ["fine-tune-seed0", "gd+rank1-seed0"])
