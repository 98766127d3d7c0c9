"""The numbers of docs/large-models.md are those of the results, whose tables the page includes."""

import json
import re

from helpers.page_text import page, prose, result

from benchmarks.scale import report

PAGE = page("docs/large-models.md")
RECORD = json.loads(result("scale.json"))
SPEEDS = report.Speeds(**RECORD["speeds"])
COSTS = {tuple(costs["processes"]): costs for costs in RECORD["predicted"]}


def quoted(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, prose(PAGE))
    assert found, pattern
    return found.groups()


def milliseconds(ranks: int, placement: str) -> tuple[str, str]:
    latencies = (SPEEDS.latency, SPEEDS.slow_latency)
    times = (report.seconds(COSTS[ranks,], "K = 1, bf16", placement, SPEEDS.hbm, latency) for latency in latencies)
    return tuple(f"{1e3 * time:.2f}" for time in times)


def step(ranks: int) -> str:
    return f"{1e3 * report.step_seconds(COSTS[ranks,], SPEEDS):.0f}"


def test_the_page_includes_the_tables_that_the_command_wrote():
    (first_line,) = re.findall(r'^--8<-- "benchmarks/results/scale\.md:(\d+):"$', PAGE, re.MULTILINE)
    written = result("scale.md")
    assert written == report.markdown(RECORD)
    assert written.splitlines()[int(first_line) - 1].startswith(f"`{RECORD['command']}`, {RECORD['date']}")


def test_state_on_the_page_is_what_was_counted():
    costs = COSTS[64,]
    assert quoted(r"a decoder of ([\d.]+) B parameters") == (f"{costs['parameters'] / 1e9:.2f}",)
    pattern = (
        r"On 64 ranks, .*? take (\S+) GiB per rank\. One term in bfloat16 adds (\S+) GiB, a diagonal history (\S+)"
    )
    sizes = [sum(costs["state"].values()), *(costs["histories"][k]["state"] for k in ("K = 1, bf16", "diagonal"))]
    assert quoted(pattern) == tuple(f"{size / report.GIB:.3g}" for size in sizes)


def test_times_on_the_page_are_those_of_the_formula():
    pattern = (
        r"one term in bfloat16 adds (\S+) to (\S+) ms on 64 ranks and (\S+) to (\S+) ms on 1,024, "
        r"of a step of (\d+) ms and (\d+) ms"
    )
    expected = *milliseconds(64, "FusedAdamW"), *milliseconds(1024, "FusedAdamW"), step(64), step(1024)
    assert quoted(pattern) == expected
    assert quoted(r"once more, and adds (\S+) to (\S+) ms on 64 ranks") == milliseconds(64, "add_penalty_grad_")


def test_every_mesh_exchanges_k_numbers_and_the_host_reads_nothing_in_a_step():
    for costs in COSTS.values():
        for kind, history in costs["histories"].items():
            terms = 1 if kind == "diagonal" else int(re.search(r"K = (\d+)", kind)[1])
            for placement in report.PLACEMENTS:
                record = history[placement]
                assert record["collectives"] in ([], [["all_reduce", costs["processes"][-1], 8 * terms, 1]])
                assert record["host_reads"] == 0


def test_memory_of_an_estimate_on_the_page_is_that_of_its_formula():
    whole = report.whole_estimate(COSTS[64,]["parameters"]) / report.GIB
    assert quoted(r"it takes (\d+) GiB in every rank") == (f"{whole:.3g}",)
    own = {ranks: COSTS[ranks,]["forward and backward"]["peak"] / report.GIB for ranks in (64, 1024)}
    together = [
        f"{(report.ESTIMATE / 4 + 1) * COSTS[ranks,]['state']['parameters'] / report.GIB + own[ranks]:.3g}"
        for ranks in own
    ]
    pattern = r"makes by itself, takes (\S+) GiB on 64 ranks and (\S+) on 1,024, of which (\S+) are FSDP's own"
    assert quoted(pattern) == (*together, f"{own[64]:.1f}") == (*together, f"{own[1024]:.1f}")


def test_real_processes_counted_what_was_predicted():
    runs = RECORD["compared"]
    assert {run["replicas"] * run["shards"] for run in runs} == {2, 4, 8}
    assert all(rank["differences"] == [] for run in runs for rank in run["compared"])
