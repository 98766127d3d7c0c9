"""Shared by all tests: one thread, so that results and times do not depend on the machine's load.

CRL_TEST_LIBRARY names a library whose operators are tested in place of the package's own.
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

import crl_kernels  # noqa: F401  (defines the operators' schemas)
from crl_kernels.backends import registry

torch.set_num_threads(1)
if library := os.environ.get("CRL_TEST_LIBRARY"):
    torch.ops.load_library(library)
if registry.INTERPRETED:
    import helpers.triton_interpreter  # noqa: F401  (corrects its rounding)


@pytest.fixture
def fresh_accelerate_state() -> Iterator[None]:
    """The state that Accelerators share in a process ends with the test."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts of the cases that one test goes through: ``record_property("count", ...)``."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    for report in reports:
        for name, value in report.user_properties:
            if name == "count":
                terminalreporter.write_line(value)
