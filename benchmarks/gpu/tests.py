"""Stages that run files of ``tests/`` on the device: what they check is not checked a second time here."""

from typing import Any

from ..common import command
from . import needs


def run(files: tuple[str, ...], device: str, small: bool) -> dict[str, Any]:
    """Counts of outcomes, and what failed. A dry run collects the tests, which run on a CPU elsewhere."""
    needs.packages("pytest")
    import pytest

    class Outcomes:
        def __init__(self) -> None:
            self.counts = {"collected": 0, "passed": 0, "failed": 0, "skipped": 0}
            self.failures: list[str] = []

        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            self.counts["collected"] = len(items)

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed:
                self.failures.append(report.nodeid)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] += 1
            if report.outcome == "failed":
                self.failures.append(report.nodeid)

    outcomes = Outcomes()
    options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["--rootdir", str(command.ROOT), "--device", device]
    options += ["--collect-only", "-qq"] if small else []
    status = pytest.main([*(str(command.ROOT / "tests" / file) for file in files), *options], plugins=[outcomes])
    if status != pytest.ExitCode.OK and not outcomes.failures:
        raise AssertionError(f"pytest ended with {status!r}")
    return {**outcomes.counts, "failures": outcomes.failures}
