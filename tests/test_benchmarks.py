"""``python -m benchmarks.penalty`` runs and writes what it says it writes. What it measures here is worth nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are run from a checkout, and are not installed

from benchmarks import penalty  # noqa: E402
from benchmarks.contenders import CONTENDERS, YARDSTICKS  # noqa: E402
from benchmarks.operators import OPERATORS  # noqa: E402


def test_penalty_writes_what_was_asked_for(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the roofline")
    only = ["rank-1, add_penalty_grad_", "the paper's way", "Avalanche", "torch.compile", "diagonal_shrink_"]
    # More tensors than are compiled, because compiling would take most of the time.
    command = [sys.executable, "-m", "benchmarks.penalty", "--sizes", "5K/101", "--rounds", "2", "--only", *only]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (size,) = json.loads((tmp_path / "penalty_cpu_1thread.json").read_text())["sizes"]
    names = [row["name"] for row in size["rows"]]
    assert set(YARDSTICKS) < set(names)
    assert names == [
        name for name in CONTENDERS | OPERATORS if name in YARDSTICKS or any(word in name for word in only)
    ]
    for row in size["rows"]:
        assert ("ms" in row) != ("skipped" in row)
        assert "ms" in row or "torch.compile" in row["name"] or "Avalanche" in row["name"]
        assert "ms" not in row or row["ms_p20"] <= row["ms"] <= row["ms_p80"]
    text = (tmp_path / "penalty_cpu_1thread.md").read_text()
    assert all(f"\n| {name} |" in text and f"\n- {name}: " in text for name in names)
    by_name = {row["name"]: row for row in size["rows"]}
    ours, paper = by_name["rank-1, add_penalty_grad_"], by_name["rank-1, the paper's way"]
    assert ours["paper_over_this"] == paper["times_limit"] / ours["times_limit"]
    assert (tmp_path / "roofline_cpu_1thread.png").stat().st_size > 0


def test_summary_is_made_of_rows_of_the_table():
    assert set(penalty.SUMMARY) <= set(CONTENDERS)
    assert penalty.parse_size("0.6M/100") == (600_000, 100)


def test_estimation_writes_what_was_asked_for(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers has the demo's UNet")
    command = [sys.executable, "-m", "benchmarks.estimation", "--size", "8", "--samples", "8", "--batch-size", "4"]
    done = subprocess.run([*command, "--rounds", "1", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "estimation_cpu.json").read_text())["rows"]
    assert len(rows) == 5
    assert rows[0]["times_paper"] == 1
    assert all(row["samples_per_s"] == 8e3 / row["ms"] for row in rows)
    text = (tmp_path / "estimation_cpu.md").read_text()
    assert all(f"\n| {row['name']} |" in text for row in rows)
