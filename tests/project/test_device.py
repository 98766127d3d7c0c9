"""``pytest --device``: a GPU that is not there, and the rehearsal that stands in for one on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import device

TESTS = Path(__file__).parents[1]
# Few, because all of them take many minutes.
REHEARSED = ("operators/test_rehearsal.py", "penalty/test_rebind.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_of_one_line():
    process = run("--device", "cuda")
    assert process.returncode == pytest.ExitCode.USAGE_ERROR
    assert (process.stdout, process.stderr.strip()) == ("", "ERROR: --device cuda: torch finds no GPU")


def assert_rehearsed(files: tuple[str, ...]) -> None:
    process = run("--device", "rehearsal", *(str(TESTS / file) for file in files))
    assert process.returncode == 0, process.stdout + process.stderr
    assert " passed" in process.stdout


def test_a_rehearsal_on_a_cpu():
    assert_rehearsed(REHEARSED)


@pytest.mark.slow
@pytest.mark.parametrize("file", device.ON_DEVICE)
def test_a_rehearsal_of_every_test(file):
    assert_rehearsed((file,))
