"""``python -m benchmarks.penalty`` and ``benchmarks.sample_gradients`` run and write what they say they write. What
they measure here is worth nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are run from a checkout, and are not installed

from benchmarks import optimizer, penalty, trainers  # noqa: E402
from benchmarks.contenders import CONTENDERS, YARDSTICKS  # noqa: E402
from benchmarks.operators import OPERATORS  # noqa: E402
from benchmarks.problem import Unavailable  # noqa: E402
from benchmarks.sample_gradient_contenders import CONTENDERS as SAMPLE_GRADIENTS  # noqa: E402
from benchmarks.sample_gradient_contenders import PLAIN, Case, errors  # noqa: E402
from benchmarks.sample_gradient_models import TINY, Transformer, UNet  # noqa: E402
from benchmarks.sample_gradients import error_cell, table_row  # noqa: E402


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


def test_optimizer_writes_a_row_for_each_step(tmp_path):
    command = [sys.executable, "-m", "benchmarks.optimizer", "--parameters", "5000", "--tensors", "7", "--rounds", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "optimizer_cpu_1thread.json").read_text())["rows"]
    assert len(rows) == 4 + 3 * len(optimizer.HISTORIES)  # inside in both modes, and before
    assert all(row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    assert (rows[0]["times_adamw"], rows[-1]["loop_over_this"]) == (1, 1)
    text = (tmp_path / "optimizer_cpu_1thread.md").read_text()
    assert all(f"\n| {row['name']} |" in text for row in rows)


def test_trainers_writes_a_row_for_each_way_and_history(tmp_path):
    command = [sys.executable, "-m", "benchmarks.trainers", "--models", "transformer-tiny", "--rounds", "2"]
    done = subprocess.run([*command, "--passes", "1", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads((tmp_path / "trainers_cpu_1thread.json").read_text())["models"]
    rows = part["rows"]
    assert len(rows) == len(trainers.WAYS) * len(trainers.HISTORIES) + len(trainers.DIAGONAL_WAYS) + 1
    state = {row["past_tasks"]: round(row["state_bytes_per_parameter"]) for row in rows if "diagonal" not in row["way"]}
    assert state == {"1, fp32": 4, "1, bf16": 2, "4, fp32": 16}
    assert {round(row["state_bytes_per_parameter"]) for row in rows if "diagonal" in row["way"]} == {8}
    text = (tmp_path / "trainers_cpu_1thread.md").read_text()
    assert all(f"\n| {row['way']} | {row['past_tasks']} | {row['extra_ms']:.2f} |" in text for row in rows)


def test_summary_is_made_of_rows_of_the_table():
    assert set(penalty.SUMMARY) <= set(CONTENDERS)
    assert penalty.parse_size("0.6M/100") == (600_000, 100)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("name", SAMPLE_GRADIENTS)
def test_contenders_find_the_truth(model, name):
    """In float64; peers that leave parameters out, or fail, are pinned in test_sample_gradient_peers.py."""
    contender = SAMPLE_GRADIENTS[name]
    if "BackPACK" in name or ("Opacus" in name and model == "transformer-tiny"):
        pytest.skip(f"{name} has no rule for a layer of {model}")
    case = Case(TINY[model], samples=3, dtype=torch.float64)
    try:
        found = contender.make(case)()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert sorted(found) == sorted(contender.gives)
    told = errors(found, case.truth())
    assert told.keys() >= {"norms", "projections", "mean"} & {*contender.gives}
    assert all(error < 1e-10 for error in told.values()), told
    if "gram" in found:
        torch.testing.assert_close(found["gram"].diagonal(), found["norms"])
        torch.testing.assert_close(found["gram"].mean(1), found["projections"])


def test_models_have_the_size_that_is_said_of_them():
    assert sum(parameter.numel() for parameter in UNet().parameters()) == 1_036_737
    assert sum(parameter.numel() for parameter in Transformer().parameters()) == 1_024_144


def test_sample_gradients_writes_what_was_asked_for(tmp_path):
    only = ["SampleGradients, gram", "vmap(grad), finished", "Opacus ghost"]
    command = [sys.executable, "-m", "benchmarks.sample_gradients", "--models", "transformer-tiny", "--samples", "2"]
    command += ["--rounds", "2", "--out", str(tmp_path), "--only", *only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (model,) = json.loads((tmp_path / "sample_gradients.json").read_text())["models"]
    by_name = {row["name"]: row for row in model["rows"]}
    assert [*by_name] == [PLAIN, "SampleGradients, gram", "vmap(grad), finished", "Opacus ghost norms"]
    ghost = by_name.pop("Opacus ghost norms")  # not installed, or without a rule for the root's own parameter
    assert "not installed" in ghost.get("skipped", "") or ghost.get("failed", "").startswith("TypeError: Transformer")
    for row in by_name.values():
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["times_plain_p20"] <= row["times_plain"] <= row["times_plain_p80"]
        assert max(row["errors"].values()) < 1e-4
    text = (tmp_path / "sample_gradients.md").read_text()
    assert all(f"\n| {name} |" in text and f"\n- {name}: " in text for name in [*by_name, ghost["name"]])


def test_rows_that_fail_or_are_wrong_say_so():
    row = {"name": "peer", "gives": ["norms"], "failed": "TypeError: no key"}
    assert "| fails: TypeError: no key |" in table_row(row)
    assert error_cell({"norms": 0.23, "mean": 1e-7}) == "**wrong**: norms by 23 %"
    assert error_cell({"norms": float("nan")}) == "**wrong**: norms by nan %"
    assert error_cell({"norms": 2e-7}) == "2e-07"


def test_estimation_writes_what_was_asked_for(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers has the demo's UNet")
    command = [sys.executable, "-m", "benchmarks.estimation", "--size", "8", "--samples", "32", "--batch-size", "8"]
    done = subprocess.run([*command, "--rounds", "1", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "estimation_cpu.json").read_text())["rows"]
    assert len(rows) == 7
    assert rows[0]["times_paper"] == 1
    assert all(row["samples_per_s"] == 32e3 / row["ms"] for row in rows)
    text = (tmp_path / "estimation_cpu.md").read_text()
    assert all(f"\n| {row['name']} |" in text for row in rows)


def test_trainer_cost_writes_what_was_asked_for(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers has the trainer's UNet")
    only = ["masip", "gd+diagonal", "gd+rank10:gradient"]
    command = [sys.executable, "-m", "benchmarks.trainer_cost", "--sizes", "8", "--methods", *only, "--rounds", "2"]
    command += ["--model", "mini", "--model-rounds", "1", "--no-peaks", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "trainer_cost.json").read_text())
    (part,) = result["sizes"]
    assert [row["method"] for row in part["rows"]] == ["fine-tune", *only]
    assert part["rows"][0]["times_plain"] == 1
    assert part["rows"][2]["state_bytes"] == 8 * part["parameters"] + 8
    assert [row["fisher_steps"] is None for row in part["rows"]] == [True, True, False, False]
    assert all(row["fisher_steps"] > 10 for row in part["rows"][2:])  # of 1,000 images: a step sees 32
    assert part["rows"][3]["state_bytes"] > 40 * 4 * part["parameters"]  # 10 directions of 4 tasks
    assert [row["name"] for row in result["rank1"]["rows"]] == [
        "plain step",
        *(f"rank1, {mode}, {n}" for mode in ("decoupled", "gradient") for n in ("1 past task", "4 past tasks")),
    ]
    text = (tmp_path / "trainer_cost.md").read_text()
    assert all(f"\n| {method} |" in text for method in only)
