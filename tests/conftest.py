"""Shared by all tests: one thread, so that results and times do not depend on the machine's load.

CRL_TEST_LIBRARY names a library whose operators are tested in place of the package's own.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import device

import crl_kernels  # noqa: F401  (defines the operators' schemas)
from crl_kernels.backends import registry

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported; peft would ask for a model's config
torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[1]))  # for benchmarks, which are run from a checkout and not installed
if library := os.environ.get("CRL_TEST_LIBRARY"):
    torch.ops.load_library(library)
if registry.INTERPRETED:
    import helpers.triton_interpreter  # noqa: F401  (corrects its rounding)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "where tests run: a GPU, a CPU, or a CPU that refuses what a GPU would (default: cuda where torch finds one)"
    parser.addoption("--device", choices=device.CHOICES, help=text)


def pytest_configure(config: pytest.Config) -> None:
    device.use(config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu"))


def pytest_unconfigure() -> None:
    device.leave()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in [item for item in items if folder in item.path.parents and device.name != "cpu"]:
        path = item.path.relative_to(folder).as_posix()
        mark = item.get_closest_marker("cpu")
        if mark:
            reason = mark.args[0]
        elif "process_group" in item.fixturenames:  # type: ignore[attr-defined]
            reason = "gloo's process groups"
        else:
            reason = None if path.startswith(device.ON_DEVICE) else f"tests of a CPU: {path}"
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"--device {device.name}: {reason}"))


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
