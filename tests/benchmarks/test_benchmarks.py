"""The benchmarks' commands answer, and write the tables that they describe. Times that they measure here mean nothing:
all rows of a command share one process, because a process of its own spends its seconds on importing torch."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import optimizer, trainers
from benchmarks.common import command
from benchmarks.common.problem import Unavailable
from benchmarks.penalty.contenders import CONTENDERS, YARDSTICKS
from benchmarks.penalty.operators import OPERATORS
from benchmarks.penalty.report import SUMMARY
from benchmarks.penalty.rows import parse_size
from benchmarks.sample_gradients.contenders import CONTENDERS as SAMPLE_GRADIENTS
from benchmarks.sample_gradients.contenders import PLAIN, Case, errors
from benchmarks.sample_gradients.models import TINY, Transformer, UNet
from benchmarks.sample_gradients.report import error_cell, table_row
from crl_kernels.backends import registry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
COMMANDS = sorted(
    {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    | {path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text()}
)
# ``python -c ROWS_IN_ONE_PROCESS NAME ARGUMENTS``: the command, without the processes that it would start.
ROWS_IN_ONE_PROCESS = """
import contextlib, io, json, runpy, sys
from benchmarks.common import command

def run(name, arguments):
    sys.argv = [name, *arguments]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")

def in_own_process(name, arguments, threads=1):
    argv, output = sys.argv, io.StringIO()
    with contextlib.redirect_stdout(output):
        run(name, arguments)
    sys.argv = argv
    return json.loads(command.last_line(output.getvalue()))

command.in_own_process = in_own_process
run(sys.argv[1], sys.argv[2:])
"""


def run(name: str, out: Path, *arguments: str) -> dict:
    """The record that a command has written to ``out``. It runs in a process of its own, whose allocator it sets."""
    words = [sys.executable, "-c", ROWS_IN_ONE_PROCESS, name, *arguments, "--out", str(out)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (file,) = out.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """As ``run``, in this process, for commands that import diffusers and leave the allocator alone."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
    threads = torch.get_num_threads()

    def call(name: str, *arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path)])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        (file,) = tmp_path.glob("*.json")
        return json.loads(file.read_text())

    yield call
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "argument --rounds: '0' is no integer of at least 1"),
        (["--rounds", "2.5"], "argument --rounds: '2.5' is no integer of at least 1"),
        (["--out", __file__], "is not a folder; give another place"),
        (["--out", ""], "'' is not a folder; give another place"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_before_anything_runs(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = command.parser("penalty", None, "files")
    parser.add_argument("--rounds", type=command.count)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help(name, monkeypatch, capsys):
    if name in ("evidence", "steepness", "trainer_cost"):
        pytest.importorskip("tyro", reason="tyro is not installed (extra trainer)")
        pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert end.value.code == 0
    if name != "sample_matrix":  # which has no files to write
        help_text = capsys.readouterr().out
        assert f"usage: python -m benchmarks.{name} " in help_text
        assert "--out" in help_text


MORE_WORDS = {"evidence": ["digits-drift"], "steepness": ["runs"]}
# Which insist on backends, one by one; which only compile; which only count what operators are given, on any backend.
NOT_MEASURING = ("gpu", "static_gpu", "scale")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in NOT_MEASURING])
def test_plain_pytorch_is_not_measured_unless_it_is_asked_for(name, monkeypatch, capsys, tmp_path):
    if name in ("evidence", "steepness", "trainer_cost"):
        pytest.importorskip("tyro", reason="tyro is not installed (extra trainer)")
        pytest.importorskip("diffusers", reason="diffusers is not installed (extra trainer)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *MORE_WORDS.get(name, [])])
    monkeypatch.setattr(registry, "CPU", registry.Library("cpu", False, "_C.abi3.so was not built"))
    monkeypatch.setattr(registry, "CHOICE", "auto")
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nothing was measured: no kernels run on cpu (_C.abi3.so was not built); type: pip ")
    assert printed.err.endswith("; or CRL_KERNELS_BACKEND=reference, to measure plain PyTorch\n")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(registry, "CHOICE", "reference")
    command.require_kernels()


def test_every_command_that_a_page_quotes_exists():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *FOLDER.glob("results/**/*.md")]
    quoted = {name for page in pages for name in re.findall(r"python -m\s+benchmarks\.([a-z]\w*)", page.read_text())}
    assert quoted
    assert quoted <= {*COMMANDS}


def test_a_row_is_measured_in_a_process_of_its_own():
    row = command.in_own_process("penalty", ["--row", "copy", "--sizes", "5K/1", "--rounds", "2"])
    assert all(len(seconds) == 2 for times in row["seconds"] for seconds in times.values())
    with pytest.raises(SystemExit, match=r"(?s)benchmarks.penalty --row nothing failed:.*invalid choice: 'nothing'"):
        command.in_own_process("penalty", ["--row", "nothing"])


def test_penalty_writes_the_chosen_rows(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    only = ["rank-1, add_penalty_grad_", "the paper's way", "Avalanche", "torch.compile", "diagonal_shrink_"]
    # More tensors than are compiled, because compiling would take most of the time.
    (size,) = run("penalty", tmp_path, "--sizes", "5K/101", "--rounds", "2", "--only", *only)["sizes"]
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
    rows = run("optimizer", tmp_path, "--parameters", "5000", "--tensors", "7", "--rounds", "2")["rows"]
    assert len(rows) == 4 + 3 * len(optimizer.HISTORIES)  # inside in both modes, and before
    assert all(row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in rows)
    assert (rows[0]["times_adamw"], rows[-1]["loop_over_this"]) == (1, 1)
    text = (tmp_path / "optimizer_cpu_1thread.md").read_text()
    assert all(f"\n| {row['name']} |" in text for row in rows)


def test_optimizer_compares_channels_last_with_row_major(tmp_path):
    sizes = "--parameters", "2304", "--tensors", "2", "--rounds", "2"
    rows = run("optimizer", tmp_path, "--channels-last", *sizes)["rows"]
    assert [row["tensors"] for row in rows] == [2] * 9 + [14] * 9
    assert all(row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"] for row in rows)
    text = (tmp_path / "optimizer_channels_last_cpu_1thread.md").read_text()
    assert all(f"\n| {row['tensors']} | {row['name']} |" in text for row in rows)


def test_trainers_writes_a_row_for_each_placement_and_history(tmp_path):
    (part,) = run("trainers", tmp_path, "--models", "transformer-tiny", "--rounds", "2", "--passes", "1")["models"]
    rows = part["rows"]
    assert len(rows) == len(trainers.PLACEMENTS) * len(trainers.HISTORIES) + len(trainers.DIAGONAL_PLACEMENTS) + 1
    state = {row["past_tasks"]: round(row["state_bytes_per_parameter"]) for row in rows if "diagonal" not in row["way"]}
    assert state == {"1, fp32": 4, "1, bf16": 2, "4, fp32": 16}
    assert {round(row["state_bytes_per_parameter"]) for row in rows if "diagonal" in row["way"]} == {8}
    text = (tmp_path / "trainers_cpu_1thread.md").read_text()
    assert all(f"\n| {row['way']} | {row['past_tasks']} | {row['extra_ms']:.2f} |" in text for row in rows)


def test_streams_writes_costs_and_errors_of_every_form(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra trainer)")
    record = run("streams", tmp_path, "--quick")
    size = {(row["tasks"], row["form"]): row["bytes_per_parameter"] for row in record["costs"]}
    assert [size[tasks, "exact"] // 4 for tasks in (1, 2, 5, 10)] == [1, 2, 5, 10]
    assert {size[tasks, "diagonal"] // 8 for tasks in (1, 2, 5, 10)} == {1}
    assert size[10, "10 + diagonal"] == pytest.approx(size[10, "merge to 10"] + 8, abs=0.1)
    for row in record["costs"]:
        for what in ("gradient", "step"):
            assert row[what]["ratio_p20"] <= row[what]["ratio"] <= row[what]["ratio_p80"]
    assert len(record["streams"]) == 4
    for part in record["streams"]:
        assert [row["tasks"] for row in part["rows"]] == list(range(1, 12))
        for row in part["rows"]:
            for form in ("merge to 4", "4 + diagonal"):  # all tasks are there, as they are
                assert (row["forms"][form]["gradient"] < 1e-5) == (row["tasks"] <= 4)
            assert all(-1.001 <= error["cosine"] <= 1.001 for error in row["forms"].values())
    text = (tmp_path / "streams.md").read_text()
    assert text.count("\n| merge to 4 |") == 4
    assert (tmp_path / "streams.png").stat().st_size > 0


def test_summary_consists_of_rows_of_the_table():
    assert set(SUMMARY) <= set(CONTENDERS)
    assert parse_size("0.6M/100") == (600_000, 100)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("name", SAMPLE_GRADIENTS)
def test_contenders_agree_with_a_loop_over_samples(model, name):
    """In float64; peers that leave parameters out, or fail, are pinned in tests/per_sample/test_peers.py."""
    contender = SAMPLE_GRADIENTS[name]
    if "BackPACK" in name or ("Opacus" in name and model == "transformer-tiny"):
        pytest.skip(f"{name} has no rule for a layer of {model}")
    case = Case(TINY[model], samples=3, dtype=torch.float64)
    try:
        statistics = contender.make(case)()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert sorted(statistics) == sorted(contender.gives)
    relative = errors(statistics, case.truth())
    assert relative.keys() >= {"norms", "projections", "mean"} & {*contender.gives}
    assert all(error < 1e-10 for error in relative.values()), relative
    if "gram" in statistics:
        torch.testing.assert_close(statistics["gram"].diagonal(), statistics["norms"])
        torch.testing.assert_close(statistics["gram"].mean(1), statistics["projections"])


def test_models_have_the_documented_sizes():
    assert sum(parameter.numel() for parameter in UNet().parameters()) == 1_036_737
    assert sum(parameter.numel() for parameter in Transformer().parameters()) == 1_024_144


def test_sample_gradients_writes_the_chosen_rows(tmp_path):
    only = ["SampleGradients, gram", "vmap(grad), finished", "Opacus ghost"]
    options = ["--models", "transformer-tiny", "--samples", "2", "--rounds", "2", "--only", *only]
    (model,) = run("sample_gradients", tmp_path, *options)["models"]
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


def test_failed_and_wrong_rows_are_marked_in_the_table():
    row = {"name": "peer", "gives": ["norms"], "failed": "TypeError: no key"}
    assert "| fails: TypeError: no key |" in table_row(row)
    assert error_cell({"norms": 0.23, "mean": 1e-7}) == "**wrong**: norms by 23 %"
    assert error_cell({"norms": float("nan")}) == "**wrong**: norms by nan %"
    assert error_cell({"norms": 2e-7}) == "2e-07"


def test_estimation_writes_a_row_for_each_estimate(run_here, tmp_path):
    options = ["--model", "mini", "--size", "8", "--samples", "24", "--batch-size", "12", "--rounds", "1"]
    rows = run_here("estimation", *options)["rows"]
    assert len(rows) == 7
    assert rows[0]["times_paper"] == 1
    assert all(row["samples_per_s"] == 24e3 / row["ms"] for row in rows)
    text = (tmp_path / "estimation_cpu.md").read_text()
    assert all(f"\n| {row['name']} |" in text for row in rows)


def test_int8_writes_a_row_for_each_direction_and_dtype_and_is_within_its_limits(run_here, tmp_path):
    options = ["--models", "UNet mini, digits", "transformer, digits", "--steps", "5", "--samples", "64"]
    record = run_here("int8", *options)
    for model in record["models"]:
        assert [row["dtype"] for row in model["rows"]] == ["float32", "bfloat16", "int8"] * 2
        for row in model["rows"]:
            exact = row["dtype"] == "float32"
            assert (row["curvature"] == 0) == (row["penalty"] == 0) == exact
            assert row["bytes"] == pytest.approx({"float32": 4, "bfloat16": 2, "int8": 1.11}[row["dtype"]], rel=2e-2)
    assert "Every error of int8 is within 1 %" in (tmp_path / "int8.md").read_text()


def test_sharded_estimation_writes_a_row_for_each_way(tmp_path):
    options = ["--processes", "2", "--layers", "3", "--width", "16", "--out", str(tmp_path)]
    process = command.run("sharded_estimation", options, {})  # whose processes import the command
    assert process.returncode == 0, process.stderr
    rows = json.loads((tmp_path / "sharded_estimation.json").read_text())["rows"]
    assert [(row["processes"], row["way"]) for row in rows] == [(2, "sharded"), (2, "whole")]
    assert rows[0]["curvature"] == pytest.approx(rows[1]["curvature"], rel=1e-4)
    assert all(
        f"| {row['peak_bytes'] / 2**20:.0f} |" in (tmp_path / "sharded_estimation.md").read_text() for row in rows
    )


def test_trainer_cost_writes_the_chosen_methods(run_here, tmp_path):
    only = ["masip", "gd+diagonal", "gd+rank10:gradient"]
    options = ["--fisher-samples", "32", "--model", "mini", "--model-rounds", "1", "--no-peaks"]
    result = run_here("trainer_cost", "--sizes", "8", "--methods", *only, "--rounds", "2", *options)
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
