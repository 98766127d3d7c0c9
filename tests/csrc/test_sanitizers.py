"""The tests of this folder again, with crl_core under AddressSanitizer and UndefinedBehaviorSanitizer.

They run in a Python of their own and leave torch out, so that the sanitizer sees nothing but crl_core and numpy.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS", "-Wno-psabi"]

pytestmark = pytest.mark.sanitizers

# One faulty call each, and the sanitizer's message about it.
FAULTS = {
    "address": (
        "import numpy as np; core.LOOPS['baseline']['combine'](np.zeros(1), [np.zeros(2)], np.ones(1), 1, 2, False)",
        "heap-buffer-overflow",
    ),
    "undefined": ("core.SegmentTable([2**62, 2**62])", "signed integer overflow"),
}


@pytest.fixture(scope="module", params=FAULTS)
def sanitizer(request):
    return request.param


@pytest.fixture(scope="module")
def run_python(sanitizer, build_core):
    folder = build_core(f"core_{sanitizer}", f"-fsanitize={sanitizer}", *OPTIONS)
    environment = os.environ | {"PYTHONPATH": str(folder), "ASAN_OPTIONS": "detect_leaks=0"}
    if sanitizer == "address":
        # ASan must be the first library of the process; it looks for __cxa_throw at once, so libstdc++ comes along.
        paths = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        environment["LD_PRELOAD"] = " ".join(paths)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    return run


def test_no_finding(run_python):
    # --confcutdir leaves out tests/conftest.py, which imports torch.
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={HERE}", str(HERE))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_fault_is_reported(run_python, sanitizer):
    fault, finding = FAULTS[sanitizer]
    result = run_python("-c", f"import crl_core as core; {fault}")
    assert result.returncode != 0
    assert finding in result.stderr, result.stderr
