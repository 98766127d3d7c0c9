"""``benchmarks.gpu`` on a machine without a GPU: what fails or has no time is recorded. ``--dry-run`` runs in CI."""

import json
import signal
import subprocess
import sys

from ..common import command
from .stages import STAGES, in_own_process


def test_a_stage_that_cannot_run_is_recorded_as_failed():
    stage = in_own_process("races", "tpu", small=True, seconds=100)
    assert stage["status"] == "failed"
    assert "CRL_KERNELS_BACKEND='tpu'" in stage["reason"]


def test_a_stage_that_needs_a_gpu_is_not_called_ok():
    stage = in_own_process("graphs", "auto", small=True, seconds=100)
    assert (stage["status"], stage["reason"]) == ("not run", "needs CUDA graphs")


def test_a_stage_ends_with_the_time_that_is_left():
    stage = in_own_process("correctness", "auto", small=True, seconds=1)
    assert (stage["status"], stage["reason"]) == ("failed", "took more than 1 s")
    stage = in_own_process("correctness", "auto", small=True, seconds=0.5)
    assert stage == {"status": "not run", "reason": "no time was left"}


def test_a_command_that_is_killed_leaves_what_it_had(tmp_path):
    options = ["--dry-run", "--stages", "graphs", "correctness", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=command.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "auto: graphs: not run needs CUDA graphs\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["stages"]) == ["auto: graphs"]
    stage = record["stages"]["auto: graphs"]
    assert (stage["status"], stage["reason"]) == ("not run", "needs CUDA graphs")
    assert "| auto | graphs | not run | needs CUDA graphs |" in (tmp_path / "gpu.md").read_text()


def test_without_time_every_stage_says_so(tmp_path):
    options = ["--dry-run", "--seconds", "0", "--out", str(tmp_path)]
    process = command.run("gpu", options, {})
    assert process.returncode == 0, process.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [name.partition(": ")[2] for name in stages] == list(STAGES)
    assert {stage["reason"] for stage in stages.values()} == {"no time was left"}
