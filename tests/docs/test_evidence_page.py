"""Every number of docs/evidence.md is what the experiments wrote."""

import re
from typing import Any

import pytest
from helpers.page_text import TABLE, page, prose, records, result, table_after, tables

EVIDENCE = page("docs/evidence.md")
PROSE = prose(EVIDENCE)


INSTEAD = {
    "distillation alone, as above": "digits-drift",
    "60 more steps per task, which see about as many images as a Fisher of 2,000 samples": "digits-drift-matched",
    "125 more steps per task": "digits-drift-longer",
    "32 replay images per class, not 4": "digits-drift-pool",
}


def evidence(name: str) -> str:
    return result(f"evidence/{name}.md")


def command(experiment: str) -> str:
    return f"`python -m benchmarks.evidence {experiment}`"


def final_runs(name: str) -> list[dict[str, Any]]:
    return [run for run in records(f"evidence/{name}.jsonl") if run["folder"].startswith("final/")]


def means_and_intervals(row: list[str]) -> list[str]:
    return [re.sub(r" ± [\d.]+|, p [\d.]+", "", cell) for cell in row]


def bare_method(method: str) -> str:
    return re.sub(r"[:,]lam=[^,]*", "", method)


def test_controls_are_what_their_experiments_wrote():
    (table,) = (table for table in tables(EVIDENCE) if table[0][0].startswith("instead, in the first experiment"))
    quoted = {label: row for label, *row in table[2:]}
    assert quoted.keys() == INSTEAD.keys()
    for label, row in quoted.items():
        (written,) = (line for line in tables(evidence(INSTEAD[label]))[0] if line[:2] == ["gd", "6"])
        assert row == means_and_intervals(written[2:5])


LABELS = {
    "diagonal, decoupled": "gd+diagonal",
    "diagonal, in the gradient": "gd+diagonal:gradient",
    "rank 1, decoupled": "gd+rank1",
    "rank 1, in the gradient": "gd+rank1:gradient",
    "8 bands of timesteps, one direction each, decoupled": "gd+bands8",
    "rank 1 with slopes, decoupled": "gd+rank1:slopes",
    "8 bands with slopes, decoupled": "gd+bands8:slopes",
    "16 bands with slopes, decoupled": "gd+bands16:slopes",
    "control: 8 random directions, with the slopes of the 8 bands": "gd+bands8:random,slopes",
    "control: the slopes of the 8 bands, applied as one step at the end of a task": "gd+bands8:slopes,once",
    "control: the slopes of the 8 bands only, no quadratic penalty": "gd+bands8:slopes,alone",
    "control: the slope of rank 1 only, no quadratic penalty": "gd+rank1:slopes,alone",
}


@pytest.mark.parametrize(
    ("experiment", "rows"),
    [("digits-drift", 12), ("digits-easy", 4), ("mnist", 4), ("mnist-longer", 4), ("fashion-mnist", 4)],
)
def test_differences_are_those_that_the_experiment_wrote(experiment, rows):
    """A row of the page is the report's, without standard deviations and p values."""
    _, differences, *_ = tables(evidence(experiment))
    written = {}
    for method, count, *row in differences[2:]:
        fid, learnt, forgetting, accuracy = means_and_intervals(row)
        all_alike = row[0].endswith(f", p {count.rpartition(' ')[2]}")  # the smallest that so many seeds can give
        sign = ("better" if fid.startswith("−") else "worse") if all_alike else "no"
        written[bare_method(method)] = [fid, sign, learnt, forgetting, accuracy]
    quoted = {label: row for label, *row in table_after(EVIDENCE, command(experiment))[2:]}
    assert len(quoted) == rows
    assert quoted == {label: written[LABELS[label]] for label in quoted}


@pytest.mark.parametrize("experiment", ["digits-drift", "digits-easy", "mnist", "mnist-longer", "fashion-mnist"])
def test_references_are_what_the_experiment_wrote(experiment):
    """What stands in brackets after a command: means of distillation alone, and of the reference named after it."""
    report = {row[0]: row[2:] for row in tables(evidence(experiment))[0]}
    column = {name.rstrip(" ↓↑"): k for k, name in enumerate(report["method"])}
    column["forgetting"] = column["forgetting, ÷ (T − 1)"]
    after = EVIDENCE.partition(command(experiment))[2]
    means = " ".join(re.match(r"\s*\(([^)]*)\)", after)[1].split())
    for part, method in zip(means.split("; "), ("gd", "fine-tune" if "fine-tuning" in means else "joint"), strict=True):
        name, _, numbers = part.partition(": ")
        assert name == {"gd": "distillation alone", "fine-tune": "fine-tuning", "joint": "joint training"}[method]
        for words in numbers.split(", "):
            quantity, _, value = words.rpartition(" ")
            assert value == report[method][column[quantity]].split()[0]


def test_numbers_in_paragraphs_on_the_first_experiment_are_in_its_reports():
    def report(name: str, table: int) -> dict[str, list[str]]:
        return {bare_method(row[0]): means_and_intervals(row[2:]) for row in tables(evidence(name))[table][2:]}

    held_out = report("digits-drift-held-out", 1)
    quoted = re.search(r"as much with 8 bands \((.*?)\) and nothing with rank 1 \((.*?)\);", PROSE).groups()
    assert quoted == (held_out["gd+bands8:slopes"][0], held_out["gd+rank1:slopes"][0])

    def fid(method: str, column: int = 0) -> float:
        return float(finals[method][column].split()[0])

    finals = report("digits-drift", 0)
    quoted = re.search(
        r"average FID of (\d+), but because .*? \((.*?) when learnt, fine-tuning (.*?)\)\. "
        r"The others end at (\d+) to (\d+), near fine-tuning's (\d+)",
        PROSE,
    )
    without_replay = [fid(method) for method in ("diagonal", "rank1", "rank1:gradient")]
    assert quoted.groups() == (
        *(f"{fid('diagonal:gradient'):.0f}", f"{fid('diagonal:gradient', 1)}", f"{fid('fine-tune', 1)}"),
        *(f"{min(without_replay):.0f}", f"{max(without_replay):.0f}", f"{fid('fine-tune'):.0f}"),
    )

    (held,) = {
        run["summary"]["state_bytes"]
        for run in final_runs("digits-drift")
        if bare_method(run["summary"]["method"]) == "gd+bands8"
    }
    assert re.search(r"8 bands keep (\d+) MB", PROSE)[1] == f"{held / 1e6:.0f}"

    pools = {name: final_runs(name)[0]["record"]["run"]["pool"] for name in ("digits-drift", "digits-drift-pool")}
    more = pools["digits-drift-pool"] - pools["digits-drift"]
    quoted = re.search(r"(\d+) KB more of replay images \((\d+) more of each of (\d+) old classes", PROSE).groups()
    assert quoted == (f"{9 * more * (8 * 8 + 8) / 1e3:.0f}", str(more), "9")


def test_counts_of_fishers_are_those_of_the_runs():
    paragraphs = PROSE[PROSE.index("Why is there no larger gain?") :]
    for experiment, pattern in (
        (
            "digits-drift",
            r"first experiment on digits, .*?below 0\.1 in (\d+) of (\d+) estimates.*?below 0\.8 in (\d+)",
        ),
        ("mnist", r"4,000 samples: on MNIST.*?below 0\.1 in (\d+) of (\d+) estimates.*?below 0\.8 in (\d+)"),
        ("fashion-mnist", r"on FashionMNIST in (\d+) of (\d+), and (\d+);"),
        ("mnist-longer", r"with 1,500 steps in (\d+) of (\d+), and (\d+)\."),
    ):
        rows = [row for run in final_runs(experiment) for row in run["fisher"] if row["rho"] is not None]
        counts = sum(row["rho"] < 0.1 for row in rows), len(rows), sum(row["signal_share"] < 0.8 for row in rows)
        assert tuple(map(int, re.search(pattern, paragraphs).groups())) == counts
    rows = [row for run in final_runs("digits-drift-held-out") for row in run["fisher"] if row["rho"] is not None]
    less_noisy = re.search(r"less noisy \(below 0\.8 in (\d+) of (\d+)\)", paragraphs).groups()
    assert tuple(map(int, less_noisy)) == (sum(row["signal_share"] < 0.8 for row in rows), len(rows))


def test_the_demos_time_and_its_extractor_are_those_of_its_log():
    log = result("demo/log.txt")
    date, machine, cores = re.search(r"in a new clone: ([\d-]+), (.*?), (\d+) cores", log).groups()
    minutes, seconds = re.search(r"^real\t(\d+)m(\d+)\.", log, re.MULTILINE).groups()
    time = f"{machine}, {cores} cores, {minutes} min {seconds} s with the installation"
    assert f"{date} ({time}" in PROSE
    assert f"({date}, {time})" in prose(page("README.md"))
    accuracy = re.search(r"test accuracy (0\.\d+)", log)[1]
    assert f"(test accuracy {accuracy}, as `make demo` prints)" in PROSE


def test_the_demos_fishers_are_those_of_its_record():
    fishers = [row for row in records("demo/gd+rank1-metrics.jsonl") if row["kind"] == "fisher"]
    quoted = re.search(r"\(signal share (.*?) to (.*?)\) and holds (.*?) to (.*?) % of", PROSE).groups()
    shares = [row["signal_share"] for row in fishers]
    percent = [100 * row["rho"] for row in fishers]
    assert quoted == (f"{min(shares):.2f}", f"{max(shares):.2f}", f"{min(percent):.1f}", f"{max(percent):.1f}")


def test_accuracy_forgetting_is_that_of_the_reports():
    sentence = re.search(
        r"By accuracy, it forgets (.*?) on MNIST, (.*?) with 1,500 steps, and (.*?) on FashionMNIST", PROSE
    )
    for experiment, quoted in zip(("mnist", "mnist-longer", "fashion-mnist"), sentence.groups(), strict=True):
        report = {row[0]: row for row in tables(evidence(experiment))[0]}
        (interval,) = means_and_intervals([report["gd"][report["method"].index("accuracy forgetting ↓")]])
        assert interval == quoted


def test_first_tasks_are_as_good_when_learnt_as_the_runs_say():
    means = re.search(r"MNIST's first task.*? (0\.\d+) of.*? it is (0\.\d+)\..*? learnt is (0\.\d+)\.", PROSE).groups()
    for experiment, quoted in zip(("mnist", "mnist-longer", "fashion-mnist"), means, strict=True):
        accuracies = {
            run["summary"]["seed"]: run["summary"]["accuracy_task_1_when_learnt"] for run in final_runs(experiment)
        }
        assert quoted == f"{sum(accuracies.values()) / len(accuracies):.3f}"


def test_the_demos_table_is_what_the_demo_wrote():
    written = re.search(TABLE, result("demo/comparison.md"), re.MULTILINE)[0]
    assert written.count("\n") >= 4
    assert written in EVIDENCE
