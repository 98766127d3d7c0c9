"""``benchmarks.gpu`` on a machine without a GPU: what fails or has no time is recorded. ``--dry-run`` runs in CI."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers.device import ON_DEVICE

from ..common import command
from . import kit, report
from .stages import STAGES, in_own_process, run_stage


def test_a_stage_that_cannot_run_is_recorded_as_failed(tmp_path):
    stage = in_own_process("races", "tpu", True, 100, tmp_path / "log")
    assert stage["status"] == "failed"
    assert "CRL_KERNELS_BACKEND='tpu'" in stage["reason"]
    assert stage["reason"] in (tmp_path / stage["log"]).read_text()


def test_a_stage_that_needs_a_gpu_is_not_called_ok(tmp_path):
    stage = in_own_process("large", "auto", True, 100, tmp_path / "log")
    assert stage == {"status": "not run", "reason": "needs a GPU"}


def test_a_stage_ends_with_the_time_that_is_left(tmp_path):
    stage = in_own_process("roofline", "auto", True, 1, tmp_path / "log")
    assert (stage["status"], stage["reason"]) == ("failed", "took more than 1 s")
    stage = in_own_process("roofline", "auto", True, 0.5, tmp_path / "log")
    assert stage == {"status": "not run", "reason": "no time was left"}


def test_a_stage_of_tests_says_what_failed(monkeypatch, capsys):
    monkeypatch.setitem(STAGES, "races", STAGES["races"]._replace(run=lambda *_: {"failures": ["tests/x.py::y"]}))
    run_stage("races", "cpu", True)
    stage = json.loads(capsys.readouterr().out)
    assert (stage["status"], stage["reason"]) == ("failed", "1 failed: tests/x.py::y")


def test_without_pytest_the_stages_of_tests_say_so(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run_stage("operators", "cpu", True)
    assert json.loads(capsys.readouterr().out)["reason"] == "needs pytest, not installed"


def test_every_test_of_the_device_is_in_a_stage():
    files = {file for stage in STAGES.values() for file in getattr(stage.run, "args", ((),))[0]}
    tests = command.ROOT / "tests"
    every = {path for part in ON_DEVICE for path in [*(tests / part).glob("test_*.py"), tests / part] if path.is_file()}
    run = {path for file in files for path in [*(tests / file).glob("test_*.py"), tests / file] if path.is_file()}
    assert run == every


def test_a_command_that_is_killed_leaves_what_it_had(tmp_path):
    options = ["--dry-run", "--stages", "large", "roofline", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=command.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "auto: large: not run needs a GPU\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = json.loads((tmp_path / "gpu.json").read_text())
    stage = record["stages"]["auto: large"]
    assert (stage["status"], stage["reason"]) == ("not run", "needs a GPU")
    assert "| auto | large | not run | needs a GPU |" in (tmp_path / "gpu.md").read_text()


def test_the_command_ends_in_time_with_what_it_had(tmp_path):
    process = command.run("gpu", ["--dry-run", "--seconds", "6", "--out", str(tmp_path)], {}, timeout=120)
    assert process.returncode in (0, 1), process.stderr  # 1: a stage was running when the time was over
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [name.partition(": ")[2] for name in stages] == list(STAGES)
    assert stages["auto: trainers"]["reason"] == "no time was left"


def test_a_gpu_that_is_not_there_is_an_error_of_one_line():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    process = command.run("gpu", [], {})
    assert (process.returncode, process.stderr.strip()) == (
        1,
        "torch finds no GPU; --dry-run runs the code on a CPU.",
    )


def test_the_table_names_percentiles_host_time_and_what_is_missing():
    row = {"ms": 1.0, "ms_p20": 0.9, "ms_p80": 1.2, "host_us": 31.0, "gb_per_s": 10.0, "share_of_copy": 0.5}
    record = {
        "command": "c",
        "machine": {},
        "missing": {"tyro": "the stage regime"},
        "stages": {
            "cuda: roofline": {"status": "ok", "result": {"5/1": {"copy": row, "peer": {"skipped": "not installed"}}}},
            "cuda: fisher": {"status": "ok", "result": {"collected": 7, "passed": 5, "failed": 0, "skipped": 2}},
        },
    }
    text = report.markdown(record)
    assert "what did not run without it: tyro: the stage regime." in text
    assert "| copy | 1.000 | 0.900 to 1.200 | 31 | 10 | 50 % |" in text
    assert "| peer | not installed |" in text
    assert "| cuda | fisher | ok | 7 collected, 5 passed, 2 skipped |" in text


def test_the_kit_is_refused_where_it_is_too_large(tmp_path, monkeypatch):
    wheel = tmp_path / "crl_kernels.whl"
    wheel.write_bytes(b"0" * 1000)
    monkeypatch.setattr(kit, "pip", lambda *words: None)  # no downloads
    out = tmp_path / "kit"
    monkeypatch.setattr(sys, "argv", ["kit", "--wheel", str(wheel), "--out", str(out)])
    kit.main()
    assert {path.name for path in out.iterdir()} == {"benchmarks", "pyproject.toml", "run", "tests", "wheels"}
    assert (out / "wheels/crl_kernels.whl").exists()
    monkeypatch.setattr(kit, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match="expected at most"):
        kit.main()
