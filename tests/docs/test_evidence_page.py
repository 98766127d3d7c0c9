"""Every number of docs/evidence.md is what the experiments wrote."""

import re
import statistics
from functools import partial
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


SIGNS = "control: the mean gradient with random signs, at rank 1's strength"
REGIME = {
    "distillation alone": "constant gd",
    "rank 1 in the gradient, as in the paper": "constant gd+rank1:gradient",
    "control: its square in Adam's second moment, no pull": "constant gd+rank1:damping",
    "rank 1, decoupled": "constant gd+rank1",
    "later tasks at 0.3 of the rate": "later-0.3 gd",
    "EMA": "ema gd",
    "EMA, rank 1 in the gradient": "ema gd+rank1:gradient",
    "one-cycle": "one-cycle gd",
    "one-cycle, rank 1 in the gradient": "one-cycle gd+rank1:gradient",
}
ALL_CONTROLS = REGIME | {
    "control: a random direction": "constant gd+rank1:random,gradient",
    "control: a random direction, at the strength whose drop of Adam's rate is most like rank 1's on the tuning seed": (
        "constant gd+rank1:random,gradient, same precision"
    ),
    SIGNS: "constant gd+rank1:signs,gradient, same lam",
    "control: the mean gradient with random signs, at its own strength": "constant gd+rank1:signs,gradient",
    "control: the top eigenvector": "constant gd+rank1:top,gradient",
    "control: the top eigenvector, at rank 1's strength times curvature": "constant gd+rank1:top,gradient, same lam a",
    "rank 10 in the gradient": "constant gd+rank10:gradient",
    "8 bands of timesteps in the gradient": "constant gd+bands8:gradient",
    "diagonal in the gradient": "constant gd+diagonal:gradient",
    "rank 10, decoupled": "constant gd+rank10",
    "8 bands, decoupled": "constant gd+bands8",
    "diagonal, decoupled": "constant gd+diagonal",
    "rank 1, added after Adam's moments": "constant gd+rank1:preconditioned",
    "8 bands with slopes": "constant gd+bands8:slopes",
    "later tasks at 0.1 of the rate": "later-0.1 gd",
    "twice the rate": "twice-the-rate gd",
    "a third of the rate throughout": "a-third-of-the-rate gd",
    "a third of the rate throughout, rank 1 in the gradient": "a-third-of-the-rate gd+rank1:gradient",
    "a tenth of the rate throughout": "a-tenth-of-the-rate gd",
    "EMA, later tasks at 0.3 of the rate": "ema-later-0.3 gd",
    "EMA, 8 bands with slopes": "ema gd+bands8:slopes",
    "one-cycle, 8 bands with slopes": "one-cycle gd+bands8:slopes",
    "SGD": "sgd gd",
    "SGD, rank 1 in the gradient": "sgd gd+rank1:gradient",
    "all classes at once: joint training": "constant joint",
    "one-cycle, joint training": "one-cycle joint",
}

ON_MNIST = REGIME | {
    SIGNS: "constant gd+rank1:signs,gradient, same lam",
    "control: a random direction": "constant gd+rank1:random,gradient",
    "8 bands of timesteps in the gradient": "constant gd+bands8:gradient",
    "diagonal in the gradient": "constant gd+diagonal:gradient",
    "8 bands, decoupled": "constant gd+bands8",
    "later tasks at 0.1 of the rate": "later-0.1 gd",
    "EMA, later tasks at 0.3 of the rate": "ema-later-0.3 gd",
    "EMA, control without a pull": "ema gd+rank1:damping",
    "one-cycle, 8 bands, decoupled": "one-cycle gd+bands8",
    "one-cycle, 8 bands with slopes": "one-cycle gd+bands8:slopes",
    "no replay: fine-tuning": "constant fine-tune",
    "all classes at once: joint training": "constant joint",
}

WITH_UNET = REGIME | {name: ON_MNIST[name] for name in ("diagonal in the gradient", SIGNS)}


def sheet_after(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table after a heading, row by row, by the names of its columns; of two alike, the first."""
    head, _, *rows = table_after(text, heading)
    return {row[0]: dict(reversed(list(zip(head, row, strict=True)))) for row in rows}


@pytest.mark.parametrize(
    ("experiment", "labels", "seeds"),
    [
        ("regime-mlp-longer", REGIME, 10),
        ("regime-mlp", ALL_CONTROLS, 10),
        ("regime-mnist", ON_MNIST, 8),
        ("regime-digits", WITH_UNET, 4),
    ],
)
def test_rows_at_a_constant_rate_are_what_the_experiment_wrote(experiment, labels, seeds):
    quoted = sheet_after(EVIDENCE, command(experiment))
    written = sheet_after(evidence(experiment), "## Result")
    columns = ("average FID ↓", "forgetting ↓", "average FID, difference", "p")
    assert quoted.keys() == labels.keys()
    for label, row in quoted.items():
        assert [row[name] for name in columns] == [written[labels[label]][name] for name in columns]
        assert written[labels[label]]["seeds"] == str(seeds)


@pytest.mark.parametrize(("experiment", "labels"), [("regime-mlp-longer", REGIME), ("regime-mnist", ON_MNIST)])
def test_recipes_are_those_of_the_experiment(experiment, labels):
    """All of them, or on MNIST those with one-cycle, an EMA or a lower rate, and the paper's; in the report's order."""
    quoted = sheet_after(page("docs/how-to/what-to-use.md"), f"{experiment}`")
    written = sheet_after(evidence(experiment), "## Which to use")
    labels = labels | {"control: rank 1 in Adam's second moment, no pull": "constant gd+rank1:damping"}
    rows = [labels[label] for label in quoted]
    assert rows == [name for name in written if name in rows]
    assert len(rows) == (len(written) if experiment == "regime-mlp-longer" else 10)
    for label, row in quoted.items():
        assert list(row.values())[:-1] == list(written[labels[label]].values())[:-1]  # all but the label


def test_what_to_use_quotes_the_experiments():
    use = prose(page("docs/how-to/what-to-use.md"))
    pattern = r"was (\S+) on digits with 2,000 steps \(distillation alone: (\S+)\) and (\S+) on MNIST \((\S+)\)\."
    quoted = re.search(pattern, use).groups()
    digits, mnist = (sheet_after(evidence(name), "## Which to use") for name in ("regime-mlp", "regime-mnist"))
    assert quoted == tuple(
        sheet[name]["average FID ↓"] for sheet in (digits, mnist) for name in ("ema-later-0.3 gd", "constant gd")
    )
    assert float(mnist["later-0.1 gd"]["average FID ↓"]) > float(mnist["constant gd"]["average FID ↓"])
    unet = sheet_after(evidence("regime-digits"), "## Which to use")
    quoted = re.search(r"four seeds, the EMA had (\S+) and one-cycle (\S+)\.\)", use).groups()
    assert quoted == tuple(unet[name]["average FID ↓"] for name in ("ema gd", "one-cycle gd"))
    names = "regime-mlp", "regime-mlp-longer", "regime-mnist"
    rows = [
        {row[0]: row for row in table_after(evidence(name), "## Within other settings")}["ema gd+rank1:gradient"]
        for name in names
    ]
    *cut, p = re.search(r"\(by (\S+), (\S+) and (\S+); p at most (\S+)\)", use).groups()
    assert [f"−{value}" for value in cut] == [row[3].split()[0] for row in rows]
    assert p == max(row[4] for row in rows)
    less, of = re.search(r"on MNIST rank 1 cut forgetting by (\S+) of (\S+), not the average FID", use).groups()
    assert of == mnist["one-cycle gd"]["forgetting ↓"]
    on_top = {name: row for name, *row in table_after(evidence("regime-mnist"), "## Within other settings")[2:]}
    assert on_top["one-cycle gd+rank1:gradient"][2].startswith(f"−{less} ")
    (settings,) = {line for line in evidence("regime-mnist").splitlines() if line.startswith("Settings of all runs")}
    samples, batch, replay = (
        int(re.search(rf"{key} (\d+)", settings)[1]) for key in ("fisher_samples", r"\bbatch", "replay_batch")
    )
    assert f"{samples:,} samples, the images of {samples // (batch + replay)} steps" in use


def test_what_the_page_says_of_steepness_was_measured():
    def means(heading: str, name: str, *columns: str) -> list[str]:
        row = sheet_after(evidence("steepness"), heading)[name]
        return [row[column].split(" [")[0] for column in columns]

    rates = ("constant rate", "one-cycle")
    gradient, order = "## The old task's gradient", "## Order of the pairs"
    for pattern, expected in (
        (r"square norm is (\S+), with one-cycle (\S+);", means(gradient, "square norm of the mean gradient", *rates)),
        (r"holds (\S+) of the Fisher's trace \(rho; one-cycle: (\S+)\)", means(gradient, "rho of rank 1", *rates)),
        (r"signal share of its estimate is (\S+) \((\S+)\)", means(gradient, "signal share", *rates)),
        (
            r"rank 1 holds (\S+) of the Fisher's quadratic \(one-cycle: (\S+)\)",
            means("## Relative to the Fisher matrix along the displacement", "rank 1", *rates),
        ),
        (
            r"predicts (\S+) times the measured rise\.",
            [
                *means("## Predicted over measured", "curvature along δ, ½ δᵀHδ", rates[0]),
            ],
        ),
        (
            r"have moved \((\S+)\), then like the diagonal's quadratic \((\S+)\) and the Fisher's \((\S+)\), and not "
            r"at all like rank 1's \((\S+); rank",
            [
                *means(order, "square of the displacement, \\|δ\\|²", "all pairs, both"),
                *means(order, "diagonal", "all pairs, both"),
                *means(order, "Fisher, ½ δᵀFδ", "all pairs, both"),
                *means(order, "rank 1", "all pairs, both"),
            ],
        ),
    ):
        assert list(re.search(pattern, PROSE).groups()) == expected


def difference_in(report: str, text: str) -> tuple[str, str]:
    """(mean and interval, p) of a difference that tests a prediction."""
    return re.search(rf"\| [^|]*: {re.escape(text)} \| ([^|]*) \| ([^|]*) \|", report).groups()


def test_findings_at_a_constant_rate_are_those_of_the_experiment():
    report = evidence("regime-mlp-longer")
    difference = partial(difference_in, report)
    rank1, base = "constant gd+rank1:gradient", "constant gd"
    which = sheet_after(report, "## Which to use")["one-cycle gd"]
    margin = which["average FID, difference"], which["p"]
    findings = {
        r"better than distillation alone\*\*: (.*?) \(p (\S+)\)": difference(f"{rank1} less {base}"),
        r"better than rank 1 at 300: (.*?) \(p (\S+)\)": difference(f"constant gd+rank1:damping less {rank1}"),
        r"rate in later tasks: (.*?) \(p (\S+)\)": difference(f"later-0.3 gd less {rank1}"),
        r"not shown to gain anything: (.*?) \(p (\S+)\)": difference(f"constant gd+rank1 less {base}"),
        r"ahead of rank 1 in the gradient by far: (.*?) \(p (\S+)\)": margin,
        r"rank 1 adds a little\*\*: (.*?) \(p (\S+)\)": difference("ema gd+rank1:gradient less ema gd"),
        r"one-cycle, nothing is shown: (.*?) \(p (\S+)\)": difference("one-cycle gd+rank1:gradient less one-cycle gd"),
    }
    for pattern, expected in findings.items():
        assert re.search(pattern, PROSE).groups() == expected
    use = prose(page("docs/how-to/what-to-use.md"))
    quoted = re.search(r"as far as shown, in one \((−\S+ \[.*?\]), p (\S+)\)\.", use).groups()
    assert quoted == difference("ema gd+rank1:gradient less ema gd")
    assert re.search(r"the paper's method, by (.*?) of average FID", use)[1] == margin[0]

    result_of = sheet_after(report, "## Result")
    assert [result_of[f"constant gd+rank1:{kind}"]["lam"] for kind in ("gradient", "damping")] == ["300", "1000"]
    rates = re.search(r"log rate from (\S+) to (\S+), the control to (\S+)\. ", PROSE).groups()
    assert rates == tuple(result_of[name]["log rate"] for name in (base, rank1, "constant gd+rank1:damping"))
    tuned = sheet_after(report, "## How lam and rates were chosen")[rank1]
    fids = [float(value.split(": ")[1]) for value in tuned["lam: average FID"].split(", ")]
    assert fids[0] == min(fids)
    assert fids[0] > float(tuned["no penalty"])  # "no strength was better than none"
    lost = {name: row["forgetting ↓"].split()[0] for name, row in result_of.items()}
    quoted = re.search(r"forgetting falls from (\S+) to (\S+), with one-cycle to (\S+)\. ", PROSE).groups()
    assert quoted == (lost[base], lost["ema gd"], lost["one-cycle gd"])


def test_the_readmes_findings_are_those_of_the_experiments():
    quoted = re.search(
        r"on digits from (\S+) to (\S+) \(ten seeds, p (\S+)\), on MNIST from (\S+) to (\S+) \(eight, p (\S+)\)\. A "
        r"control .*? reaches (\S+) and (\S+); 0\.3 of the rate in later tasks (\S+) and (\S+); a rate that falls "
        r"within each task (\S+) and (\S+)\. On top of an EMA of the weights \((\S+) and (\S+)\), rank 1 forgets less",
        prose(page("README.md")),
    ).groups()
    reports = [evidence(name) for name in ("regime-mlp-longer", "regime-mnist")]
    means = [
        {name: row["average FID ↓"].split()[0] for name, row in sheet_after(report, "## Result").items()}
        for report in reports
    ]
    rank1, base = "constant gd+rank1:gradient", "constant gd"
    for report, of, first in zip(reports, means, (0, 3), strict=True):
        assert quoted[first : first + 3] == (of[base], of[rank1], difference_in(report, f"{rank1} less {base}")[1])
    names = "constant gd+rank1:damping", "later-0.3 gd", "one-cycle gd", "ema gd"
    assert quoted[6:] == tuple(of[name] for name in names for of in means)
    for report in reports:
        (row,) = (row for row in table_after(report, "## Within other settings") if row[0] == "ema gd+rank1:gradient")
        assert row[3].startswith("−")
        assert float(row[4]) <= 0.01


def test_findings_with_all_controls_are_those_of_the_experiment():
    report = evidence("regime-mlp")
    difference, of_rows = partial(difference_in, report), sheet_after(report, "## Result")
    section = PROSE[PROSE.index("As above. One other seed") : PROSE.index("MNIST, at 16 pixels")]
    within = {name: row for name, *row in table_after(report, "## Within other settings")[2:]}
    rank1, base = "constant gd+rank1:gradient", "constant gd"
    random, signs, top = (f"constant gd+rank1:{kind},gradient" for kind in ("random", "signs", "top"))
    diagonal = of_rows["constant gd+diagonal:gradient"]
    recipes = {name: row[-2:] for name, *row in table_after(report, "## Which to use")[2:]}
    findings = {
        r"ahead of distillation alone\*\*: (.*?) \(p (\S+)\)\.": difference(f"{rank1} less {base}"),
        r"The diagonal in the gradient is not: (.*?) \(p (\S+)\)\.": (
            diagonal["average FID, difference"],
            diagonal["p"],
        ),
        r"control without a pull, (.*?) \(p (\S+)\);": difference(f"constant gd+rank1:damping less {rank1}"),
        r"rate in later tasks, (.*?) \(p (\S+)\);": difference(f"later-0.3 gd less {rank1}"),
        r"at the same strength, (.*?) \(p (\S+)\),": difference(f"{signs}, same lam less {rank1}"),
        r"worse than rank 1 at 3,000: (.*?) \(p (\S+)\)\.": difference(f"{signs} less {rank1}"),
        r"strength times curvature: (.*?) \(p (\S+)\)\.": difference(f"{top}, same lam a less {rank1}"),
        r"their own best strength, (.*?) \(p (\S+)\),": difference(f"{random} less {rank1}"),
        r"Adam's log rate more, (.*?) \(p (\S+);": difference(f"{random}, same precision less {rank1}"),
        r"rank 1 still forgets less\*\*: (.*?) \(p (\S+)\)\.": within["a-third-of-the-rate gd+rank1:gradient"][2:],
        r"is shown there: (.*?) \(p (\S+)\)\.": within["a-third-of-the-rate gd+rank1:gradient"][:2],
        r"at the full rate: (.*?) \(p (\S+)\)\.": recipes["a-third-of-the-rate gd"],
        r"worse than nothing: (.*?) \(p (\S+)\)\.": difference("sgd gd+rank1:gradient less sgd gd"),
        r"EMA, rank 1 forgets less\*\*: (.*?) \(p (\S+)\);": within["ema gd+rank1:gradient"][2:],
        r"nothing is shown: (−.*?) \(p (\S+)\)\.": difference("ema gd+rank1:gradient less ema gd"),
        r"rank 1 less that is (.*?) \(p (\S+)\)\.": difference("ema gd+rank1:gradient less ema-later-0.3 gd"),
        r"nothing is shown: (\+.*?) \(p (\S+)\)\.": difference("one-cycle gd+rank1:gradient less one-cycle gd"),
        r"the paper has it, by (.*?) \(p (\S+)\)\.": recipes["one-cycle gd"],
        r"which is better by (.*?) \(p (\S+)\)\.": within["one-cycle joint"][:2],
    }
    for pattern, expected in findings.items():
        assert re.search(pattern, section).groups() == tuple(expected), pattern
    means = {name: row["average FID ↓"].split()[0] for name, row in of_rows.items()}
    rates = re.search(r"; to (\S+), rank 1 to (\S+), from (\S+)\)\.", section).groups()
    assert rates == tuple(of_rows[name]["log rate"] for name in (f"{random}, same precision", rank1, base))
    assert [of_rows[name]["lam"] for name in (signs, rank1)] == ["1000", "3000"]
    assert re.search(r"joint training itself ends at (\S+):", section)[1] == means["constant joint"]
    slopes = re.search(r"on top of the EMA from (\S+) to (\S+),", section).groups()
    assert slopes == tuple(of_rows[f"ema gd{rest}"]["average FID ↓"].split()[0] for rest in ("", "+bands8:slopes"))
    runs = records("evidence/regime-mlp.jsonl")
    assert re.search(r"ten seeds, (\d+) runs: `python", PROSE)[1] == str(len(runs))


def test_findings_on_mnist_are_those_of_the_experiment():
    report = evidence("regime-mnist")
    difference, of_rows = partial(difference_in, report), sheet_after(report, "## Result")
    against_rank1 = {name: row[-2:] for name, *row in table_after(report, "## Which to use")[2:]}
    on_top = {name: row for name, *row in table_after(report, "## Within other settings")[2:]}
    section = PROSE[PROSE.index("Eight seeds cannot") : PROSE.index("By the rules in the reports")]
    rank1, base = "constant gd+rank1:gradient", "constant gd"
    ema, falling = on_top["ema gd+rank1:gradient"], on_top["one-cycle gd+rank1:gradient"]
    bands = on_top["one-cycle gd+bands8"]
    findings = {
        r"at a constant rate\*\*: (.*?) \(p (\S+)\)\.": difference(f"{rank1} less {base}"),
        r"control without a pull, (.*?) \(p (\S+)\);": difference(f"constant gd+rank1:damping less {rank1}"),
        r"rate in later tasks, (.*?) \(p (\S+)\);": difference(f"later-0.3 gd less {rank1}"),
        r"with random signs, (.*?) \(p (\S+)\)\.": against_rank1["constant gd+rank1:signs,gradient, same lam"],
        r"worse than rank 1: (.*?) \(p (\S+)\)\.": difference(f"constant gd+rank1:random,gradient less {rank1}"),
        r"in the gradient\*\* by (.*?) \(p (\S+)\), and": against_rank1["one-cycle gd"],
        r"shown to differ from it, (\+.*?) \(p (\S+)\)\.": difference("ema gd+rank1:gradient less ema-later-0.3 gd"),
        r"less forgetting is not shown, (.*?) \(p (\S+)\)\.": difference(f"ema gd less {base}"),
        r"forgets less: (.*?) \(p (\S+)\);": ema[2:],
        r"for the average FID, (.*?) \(p (\S+)\) is not": ema[:2],
        r"is shown: (.*?) \(p (\S+)\) and": falling[:2],
        r"is shown: .*?\) and (.*?) \(p (\S+)\)\.": bands[:2],
    }
    for pattern, expected in findings.items():
        assert re.search(pattern, section).groups() == tuple(expected), pattern
    means = re.search(r"at (\S+) also ahead of joint training at the constant rate, (\S+):", section).groups()
    assert means == tuple(of_rows[name]["average FID ↓"].split()[0] for name in ("one-cycle gd", "constant joint"))
    lost = re.search(r"forgets less still \((\S+); rank 1 (\S+)\)", section).groups()
    rows = "ema-later-0.3 gd", "ema gd+rank1:gradient"
    assert lost == tuple(of_rows[name]["forgetting ↓"].split()[0] for name in rows)
    falls = r"by (\S+) \[(\S+), (\S+)\]"
    quoted = re.search(rf"{falls} with rank 1 and {falls} with 8 decoupled bands \(p (\S+) each\)", section).groups()
    for (mean, low, high), row in zip((quoted[:3], quoted[3:6]), (falling, bands), strict=True):
        assert row[2:] == [f"−{mean} [−{high}, −{low}]", quoted[6]]


def test_findings_with_the_unet_are_those_of_the_experiment():
    report = evidence("regime-digits")
    of_rows = sheet_after(report, "## Result")
    section = PROSE[PROSE.index("Four seeds cannot give a p below 0.12") : PROSE.index("By the rules in the reports")]
    fids, lost = (
        {name: row[column].split()[0] for name, row in of_rows.items()} for column in ("average FID ↓", "forgetting ↓")
    )
    rank1, base = "constant gd+rank1:gradient", "constant gd"
    replacements = "constant gd+rank1:damping", "constant gd+rank1:signs,gradient, same lam", "later-0.3 gd"
    findings = {
        r"alone \((\S+); (\S+)\)\. The diagonal is not \((\S+)\), and decoupled rank 1 is by less \((\S+)\)\.": [
            fids[name] for name in (rank1, base, "constant gd+diagonal:gradient", "constant gd+rank1")
        ],
        r"without a pull (\S+), with random signs (\S+), with 0\.3 of the rate in later tasks (\S+)\. ": [
            fids[name] for name in replacements
        ],
        r"is left\*\*: (\S+) and (\S+), of (\S+)\. ": [lost[name] for name in ("ema gd", "one-cycle gd", base)],
        r"lowest average FID, (\S+), one-cycle has (\S+)\. With rank 1 on top, they have (\S+) and (\S+)\. ": [
            fids[f"{setting} {method}"] for method in ("gd", "gd+rank1:gradient") for setting in ("ema", "one-cycle")
        ],
        r"with distillation alone \((\S+); (\S+)\)\. ": [of_rows[name]["moved"] for name in ("ema gd", base)],
    }
    for pattern, expected in findings.items():
        assert [*re.search(pattern, section).groups()] == expected, pattern
    assert min(fids, key=lambda name: float(fids[name])).startswith("ema ")
    assert all(float(row["p"]) > 0.01 for name, row in of_rows.items() if name != base)  # "no difference is shown"
    runs = {run["folder"]: run["summary"]["average_fid"] for run in records("evidence/regime-digits.jsonl")}
    curve = re.search(r"ends at (\S+) with 1,500 steps, (\S+) with 3,000 and (\S+) with 6,000", PROSE).groups()
    folders = (f"{part}-constant/gd-seed0" for part in ("final", "steps-3000", "steps-6000"))
    assert curve == tuple(f"{runs[folder]:.1f}" for folder in folders)


@pytest.mark.parametrize(
    ("experiment", "column"),
    [
        ("regime-mlp", "2,000 steps, all controls"),
        ("regime-mlp-longer", "4,000 steps"),
        ("regime-mnist", "MNIST"),
        ("regime-digits", "UNet"),
    ],
)
def test_verdicts_are_those_of_the_experiments(experiment, column):
    written = re.findall(r"^### \d\. .*\*\*(.*)\*\*$", evidence(experiment), re.MULTILINE)
    quoted = [row[column] for row in sheet_after(EVIDENCE, "By the rules in the reports:").values()]
    assert [cell.partition(":")[0] for cell in quoted] == [verdict.lower() for verdict in written]


@pytest.mark.parametrize(
    ("experiment", "pattern"),
    [
        ("regime-mlp", r"residual MLPs of (\S+) and \S+ M parameters"),
        ("regime-mnist", r"The same kind of network, (\S+) M parameters"),
        ("regime-digits", r"`--model mini`, (\S+) M parameters"),
    ],
)
def test_networks_have_the_parameters_of_the_runs(experiment, pattern):
    """A random direction's drift is the displacement over the root of their number."""
    stages = next(run["stages"] for run in records(f"evidence/{experiment}.jsonl") if run["stages"])
    row = next(row for row in stages if row["kind"] == "movement")
    quoted = re.search(pattern, PROSE)[1]
    millions = (row["displacement"] / row["random_drift"]) ** 2 / 1e6
    assert quoted == f"{millions:.{len(quoted.partition('.')[2])}f}"


def test_more_steps_do_not_help_on_mnist_at_the_constant_rate():
    fids = {run["folder"]: run["summary"]["average_fid"] for run in records("evidence/regime-mnist.jsonl")}
    means = [
        statistics.mean(fids[f"{folder}/gd-seed{seed}"] for seed in (0, 1))
        for folder in ("final-constant", "steps-4000-constant")
    ]
    assert means[1] >= means[0]
    assert "more steps no longer help at the constant rate" in PROSE


def test_the_curve_is_that_of_the_runs():
    fids = {run["folder"]: run["summary"]["average_fid"] for run in records("evidence/regime-mlp.jsonl")}
    quoted = re.search(r"average FID of (\S+) with 2,000 steps, (\S+) with 4,000 and (\S+) with 8,000", PROSE).groups()
    folders = ("final-constant", "steps-4000-constant", "steps-8000-constant")
    means = [statistics.mean(fids[f"{folder}/gd-seed{seed}"] for seed in range(3)) for folder in folders]
    assert quoted == tuple(f"{mean:.1f}" for mean in means)
    curve = [folder for folder in fids if folder.startswith("steps-8000-constant/")]
    assert len(curve) == 3  # "on the three seeds of the curve"
    assert "on the three seeds of the curve" in PROSE


def test_systems_are_what_their_experiment_wrote():
    head, _, *quoted = table_after(EVIDENCE, "### Every system in one table")
    _, _, *written = table_after(evidence("systems"), "## Result")
    shown = [[row[0], row[1], *means(row[4:7]), row[7], *row[8:]] for row in written]
    assert quoted == shown
    assert len(head) == len(quoted[0])
    below = {name for name, *_, difference, _, _, _ in quoted if re.match(r"−.*, −", difference)}
    assert below == {
        "joint-training", "generative-distillation", "rank1-ewc-distillation", "trust-region", "adapters"
    }  # fmt: skip


def means(cells: list[str]) -> list[str]:
    return [cell.partition(" ± ")[0] for cell in cells]
