"""What the README shows runs as it stands there."""

import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="only .* of the trace")
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    assert len(namespace["history"]) == 2
    assert bool(torch.isfinite(namespace["value"]))


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_and_pictures_exist(target):
    assert (ROOT / target).exists()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make (\w+)", README, re.MULTILINE)):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("result", ["demo/comparison.md", "penalty_cpu_1thread_summary.md"])
def test_tables_are_those_that_the_benchmarks_wrote(result):
    written = (ROOT / "benchmarks" / "results" / result).read_text()
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) >= 4
    assert "\n".join(rows) in README


def test_differences_are_those_that_the_experiment_wrote():
    """A row of the README's is a method's two rows of the report's, less standard deviations and p values."""
    report = (ROOT / "benchmarks" / "results" / "evidence" / "digits-drift.md").read_text()
    result, differences, *_ = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE)
    )
    accuracy = {row[0]: row[6].partition(" ")[0] for row in result}
    written = set()
    for method, _, *cells in differences:
        fid, forgetting = (re.sub(r" ± [\d.]+", "", cell) for cell in (cells[0], cells[2]))
        all_alike = cells[1] == "0.0312 smallest possible 0.0312"
        sign = ("better" if fid.startswith("−") else "worse") if all_alike else "no"
        written.add((fid, sign, forgetting, accuracy[method]))
    section = README.partition("## Does it help?")[2].partition("\n## ")[0]
    rows = [tuple(row.split(" | ")[1:]) for row in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)]
    shown = [row for row in rows if row[0].startswith(("+", "−"))]
    assert len(shown) >= 10
    assert set(shown) <= written
