"""Every table of docs/benchmarks.md, and the ratios in its text, are what the benchmarks wrote."""

import json
import re

from helpers.page_text import TABLE, page, prose, result, table_after, tables

BENCHMARKS = page("docs/benchmarks.md")
PROSE = prose(BENCHMARKS)


def by_name(table: list[list[str]]) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in table[2:]}


def test_table_of_penalties_is_what_the_benchmark_wrote():
    written = re.search(TABLE, result("penalty_cpu_1thread_summary.md"), re.MULTILINE)[0]
    assert written.count("\n") >= 4
    assert written in BENCHMARKS


def test_rows_of_sample_gradients_are_what_the_benchmark_wrote():
    quoted = table_after(BENCHMARKS, "`python -m benchmarks.sample_gradients")
    written = tables(result("sample_gradients.md"))[0]
    assert len(quoted) == 16
    assert [row for row in written if row in quoted] == quoted


def test_ratios_of_other_models_are_what_the_benchmark_wrote():
    transformer, unet = map(by_name, tables(result("sample_gradients_others.md")))
    written = [
        row[column].split()[0]
        for table in (unet, transformer)
        for row in (table["SampleGradients"], table["vmap(grad), finished"])
        for column in (2, 3)
    ]
    pattern = (
        r"takes ([\d.]+) times as long as the plain pass, with ([\d.]+) times its memory, and `vmap\(grad\)` ([\d.]+) "
        r"with ([\d.]+)\. On a small transformer it takes ([\d.]+) with ([\d.]+), and `vmap\(grad\)` ([\d.]+) with "
        r"([\d.]+):"
    )
    assert list(re.search(pattern, PROSE).groups()) == written


def test_ratios_of_a_matrix_that_exists_are_what_the_benchmark_wrote():
    rows = {row[1]: row[-1] for row in tables(result("sample_matrix_cpu_1thread.md"))[0] if "float32" in row[0]}
    quoted = re.search(r"takes ([\d.]+) times as long as one `torch\.sum` .*? PyTorch ([\d.]+) times", PROSE).groups()
    assert quoted == (rows["sample_gradient_stats"], rows["mean, norm, matmul"])


def test_ratios_of_estimation_are_what_the_benchmark_wrote():
    rows = by_name(tables(result("estimation_cpu.md"))[0])
    names = ("batch size 32", "8 strata, batch size 32", "rank=10, batch size 32")
    quoted = re.search(
        r"processes ([\d.]+) times as many .*? ([\d.]+) times .*? rank 10 ([\d.]+) times", PROSE
    ).groups()
    assert quoted == tuple(f"{float(rows[f'estimate_fisher, {name}'][-1]):.1f}" for name in names)


ROWS_IN_A_STEP = {
    "`FusedAdamW`, rank 1, fp32 / bf16": ("FusedAdamW", "1, fp32", "1, bf16"),
    "`FusedAdamW`, diagonal": ("FusedAdamW, diagonal", "any, fp32"),
    "`add_penalty_grad_`, rank 1, fp32 / bf16": ("add_penalty_grad_", "1, fp32", "1, bf16"),
    "`attach`, decoupled, rank 1, fp32 / bf16": ("attach, decoupled", "1, fp32", "1, bf16"),
    "`rank1_ewc_penalty` in the loss, fp32 / bf16": ("rank1_ewc_penalty in the loss", "1, fp32", "1, bf16"),
    "a Python loop of diagonal EWC in the loss": ("diagonal, a Python loop in the loss", "1, fp32"),
}


def test_costs_in_a_training_step_are_what_the_benchmark_wrote():
    unet, transformer = (
        {(method, terms): (added, state) for method, terms, _, added, state in table[2:]}
        for table in tables(result("trainers_cpu_1thread.md"))
    )
    quoted = by_name(table_after(BENCHMARKS, "`python -m benchmarks.trainers`"))
    assert quoted.keys() == ROWS_IN_A_STEP.keys()
    for label, (added, state) in quoted.items():
        method, *terms = ROWS_IN_A_STEP[label]
        assert added.split(" / ") == [unet[method, t][0] for t in terms]
        assert [float(number) for number in state.split(" / ")] == [float(unet[method, t][1]) for t in terms]
        for t in terms:  # "A transformer ... gives the same within half a point"
            assert abs(float(unet[method, t][0].split()[0]) - float(transformer[method, t][0].split()[0])) <= 0.5


OPTIMIZER = {
    "`FusedAdamW`": ("FusedAdamW, one term, {}, gradient", "FusedAdamW, diagonal, gradient", "FusedAdamW, no penalty"),
    "`add_penalty_grad_`, then AdamW": (
        "AdamW(fused=True), add_penalty_grad_, one term, {}",
        "AdamW(fused=True), add_penalty_grad_, diagonal",
        None,
    ),
}


def test_ratios_of_the_optimizer_are_what_the_benchmark_wrote():
    written = by_name(tables(result("optimizer_cpu_1thread.md"))[0])
    quoted = by_name(table_after(BENCHMARKS, "`python -m benchmarks.optimizer`"))
    bound = quoted.pop("lower bound, by bytes moved")
    assert quoted.keys() == OPTIMIZER.keys()
    for label, row in quoted.items():
        rank1, diagonal, without = OPTIMIZER[label]
        names = [rank1.format("bf16"), rank1.format("fp32"), diagonal, without]
        assert row == [written[name][3] if name else "" for name in names]
        if label == "`FusedAdamW`":
            assert bound == [written[name][2] for name in names]
    quoted = re.search(r"plain read of a float32 vector takes ([\d.]+)\. A Python loop .*? takes ([\d.]+)\.", PROSE)
    read, loop = (
        written["AdamW(fused=True), then one vector read"],
        written["AdamW(fused=True) + diagonal, Python loop"],
    )
    assert quoted.groups() == (read[3], f"{float(loop[3]):.1f}")
    quoted = re.search(r"Three and ten terms take ([\d.]+) and ([\d.]+) .*?, and ([\d.]+) and ([\d.]+) with", PROSE)
    names = ("FusedAdamW, {} terms, fp32, gradient", "AdamW(fused=True), add_penalty_grad_, {} terms, fp32")
    ratios = (float(written[name.format(count)][3]) for name in names for count in (3, 10))
    assert quoted.groups() == tuple(f"{ratio:.1f}" for ratio in ratios)


def test_overhead_of_small_models_is_what_the_benchmark_wrote():
    sizes = {size["label"]: size["rows"] for size in json.loads(result("penalty_cpu_1thread.json"))["sizes"]}
    rows = {row["name"]: row for row in sizes["0.6M/100"]}
    ours, autograd = rows["rank-1, add_penalty_grad_"], rows["rank-1, autograd"]
    quoted = re.search(r"`add_penalty_grad_` takes ([\d.]+) ms, ([\d.]+) times .*? autograd takes ([\d.]+) ms", PROSE)
    assert quoted.groups() == (f"{ours['ms']:.2f}", f"{ours['times_addition_kept']:.2f}", f"{autograd['ms']:.1f}")


def test_costs_of_methods_are_what_the_benchmark_wrote():
    quoted = PROSE[PROSE.index("`python -m benchmarks.trainer_cost ") :]
    small, large, alone = map(by_name, tables(result("trainer_cost.md")))

    def ratio(table: dict[str, list[str]], method: str) -> str:
        return table[method][0].split()[0]

    for pattern, written in (
        (r"takes ([\d.]+) \(([\d.]+)\) times as long as fine-tuning's", [ratio(t, "gd") for t in (small, large)]),
        (r"four past tasks, ([\d.]+) \(([\d.]+)\)", [ratio(t, "gd+rank1") for t in (small, large)]),
        (r"as long as (\d+) \((\d+)\) steps", [t["gd+rank1"][-1] for t in (small, large)]),
        (
            r"rank 1 takes ([\d.]+ %) .*? one past task, ([\d.]+ %) for four",
            [alone[f"rank1, decoupled, {n}"][0] for n in ("1 past task", "4 past tasks")],
        ),
    ):
        assert list(re.search(pattern, quoted).groups()) == written


def test_shares_of_arithmetic_on_the_page_without_a_gpu_are_those_that_were_counted():
    quoted = re.search(
        r"at most ([\d.]+) of the time of memory on the cards with slow float64, and at most ([\d.]+) on A100, H100 "
        r"and H200\. On a B200 it takes at most ([\d.]+) with one float32 term or a diagonal; with ten bfloat16 terms "
        r"projections take ([\d.]+) and AdamW ([\d.]+)\. .* with one it takes at most ([\d.]+) on the first cards, "
        r"([\d.]+) on the next and ([\d.]+) on a B200, with ten at most ([\d.]+), ([\d.]+) and ([\d.]+)\.",
        prose(page("docs/without-a-gpu.md")),
    ).groups()
    of_int8 = [(terms, cards) for terms in ("1 of 8 bits", "10 of 8 bits") for cards in ("slow", "fast", "B200")]
    largest = dict.fromkeys(("slow", "fast", "B200", "projections", "AdamW, low rank", *of_int8), 0.0)
    for architecture, rows in json.loads(result("static_gpu.json"))["architectures"].items():
        for row in rows:
            key = {"80": "fast", "90": "fast", "100": "B200"}.get(architecture, "slow")
            if "8 bits" in row["terms"]:
                key = row["terms"], key
            elif key == "B200" and row["terms"].startswith("10 "):
                key = row["kernel"]
            shares = [card["share_of_memory_time"] for card in row["cards"].values()]
            largest[key] = max(largest.get(key, 0.0), *shares)
    assert tuple(map(float, quoted)) == tuple(largest.values())[: len(quoted)]
    assert largest["gradient added"] < 1.0  # with ten terms on a B200, which the page leaves out


def test_ratios_of_channels_last_are_what_the_benchmark_wrote():
    ratios: dict[str, list[float]] = {}
    ends: list[float] = []  # the 20th and 80th percentiles over placements
    for row in tables(result("optimizer_channels_last_cpu_1thread.md"))[0][2:]:
        ratios.setdefault(row[0], []).append(float(row[-1].split()[0]))
        ends += map(float, re.search(r"\[(\S+), (\S+)\]", row[-1]).groups())
    assert round(max(abs(end - 1) for end in ends), 2) == 0.2  # "up to a fifth"
    assert "changes a step's time by up to a fifth" in PROSE
    few, many = ratios.items()
    quoted = re.search(
        r"in channels_last, steps take (\S+) to (\S+) times as long .*? with (\d+) tensors, and (\S+) to (\S+) times "
        r"with (\d+) tensors",
        PROSE,
    ).groups()
    low, high, number, low_of_many, high_of_many, number_of_many = quoted
    assert (number, number_of_many) == (few[0], many[0])
    assert (float(low), float(high)) == (min(few[1]), max(few[1]))
    assert (float(low_of_many), float(high_of_many)) == (min(many[1]), max(many[1]))


def test_errors_of_int8_are_what_the_benchmark_wrote():
    page_of_int8 = prose(page("docs/how-to/mixed-precision.md"))
    quoted = re.search(r"curvature by (\S+) % at most and the penalty .*? by (\S+) % at most", page_of_int8).groups()
    rows = [
        row for model in json.loads(result("int8.json"))["models"] for row in model["rows"] if row["dtype"] == "int8"
    ]
    for written, key in zip(quoted, ("curvature", "penalty"), strict=True):
        assert 0.9 * float(written) < 100 * max(row[key] for row in rows) <= float(written)


def test_memory_of_a_sharded_estimate_is_what_the_benchmark_wrote():
    quoted = re.search(
        r"takes (\S+) bytes per parameter .*? and (\S+) in such a block; on 2, (\S+) and (\S+) \(",
        prose(page("docs/how-to/fsdp2.md")),
    ).groups()
    rows = {(row[0], "whole" in row[1]): row[3] for row in tables(result("sharded_estimation.md"))[0][2:]}
    assert quoted == (rows["4", False], rows["4", True], rows["2", False], rows["2", True])
