"""Tables and a picture of what was counted, and the time that follows from it:

    seconds = bytes read and written / bandwidth of the memory + number of all_reduces * latency

This is a lower bound: it has no time for launching kernels, and each byte moves at full bandwidth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import PLACEMENTS

GIB = 2**30
STEP = ("FusedAdamW", "add_penalty_grad_")  # the placements that the table of times shows
# Bytes per parameter that estimate_fisher needs with whole parameters (rank 1, direction="mean", float32): the
# parameters, two sums in float64, two copies of the directions. help(estimate_fisher) has the formula.
WHOLE_ESTIMATE = 4 + 16 + 2 * 4


@dataclass(frozen=True)
class Speeds:
    """Of one rank: bytes/s of memory; seconds of a small all_reduce, fast and slow; tokens in a step; FLOP/s."""

    hbm: float
    latency: float
    slow_latency: float
    tokens: float
    flops: float


def mesh_name(costs: dict[str, Any]) -> str:
    *replicas, shards = costs["processes"]
    total = shards * (replicas[0] if replicas else 1)
    return f"{total:,} ranks, " + (f"HSDP {replicas[0]} x {shards}" if replicas else "FSDP2")


def added(costs: dict[str, Any], kind: str, placement: str) -> tuple[int, list[list[Any]]]:
    """(bytes that the penalty reads and writes in a step, its collective calls)."""
    step, update = costs["histories"][kind][placement], costs["updates"][PLACEMENTS[placement][1]]
    assert update["collectives"] == []
    return step["moved"] - update["moved"], step["collectives"]


def seconds(costs: dict[str, Any], kind: str, placement: str, hbm: float, latency: float) -> float:
    """The predicted time that the penalty adds to a step."""
    moved, collectives = added(costs, kind, placement)
    return moved / hbm + latency * sum(number for *_, number in collectives)


def adamw_seconds(costs: dict[str, Any], speeds: Speeds) -> float:
    return costs["updates"]["FusedAdamW"]["moved"] / speeds.hbm


def step_seconds(costs: dict[str, Any], speeds: Speeds) -> float:
    """Forward and backward, 6 FLOP per parameter and token, and AdamW; FSDP's exchanges are taken to be hidden."""
    return 6 * costs["parameters"] * speeds.tokens / speeds.flops + adamw_seconds(costs, speeds)


def markdown(record: dict[str, Any]) -> str:
    predicted, speeds = record["predicted"], Speeds(**record["speeds"])
    first = predicted[0]
    kinds = list(first["histories"])
    return (
        "\n\n".join(
            [
                "# What the library costs in a large decoder",
                f"`{record['command']}`, {record['date']}, {record['machine']}, torch {record['torch']}. "
                f"{first['parameters']:,} parameters, float32 with forward and backward in bfloat16. Counts of rank 0, "
                "which has the largest shards. Nothing was timed.",
                "## State, GiB per rank",
                _table(
                    ["", "parameters", "gradients", "AdamW", *kinds],
                    [
                        [mesh_name(costs), *map(_gib, costs["state"].values())]
                        + [_gib(costs["histories"][kind]["state"]) for kind in kinds]
                        for costs in predicted
                    ],
                ),
                f"## Collective calls, {mesh_name(first)}",
                "Forward and backward without a history, all of it FSDP's: "
                f"{_calls(first['forward and backward']['collectives'])}. The history adds, in a step:",
                _table(
                    ["", *kinds],
                    [[name, *(_calls(added(first, kind, name)[1]) for kind in kinds)] for name in PLACEMENTS]
                    + [["append", *(_calls(first["histories"][kind]["append"]["collectives"]) for kind in kinds)]],
                ),
                "Processes and bytes on the other meshes, of `FusedAdamW` with the first history: "
                + "; ".join(
                    f"{mesh_name(costs)}: {_calls(added(costs, kinds[0], STEP[0])[1])}" for costs in predicted[1:]
                )
                + ". `save` gathers the parameters' tensors one by one, "
                + f"{_calls_in_short(first['histories'][kinds[0]]['save']['collectives'])} for each vector.",
                "## Memory traffic that the penalty adds to a step, bytes per parameter of the rank's shard",
                _table(
                    ["", *kinds],
                    [
                        [name, *(_per_parameter(first, added(first, kind, name)[0]) for kind in kinds)]
                        for name in PLACEMENTS
                    ],
                ),
                f"AdamW itself moves {_per_parameter(first, first['updates']['FusedAdamW']['moved'])}. Numbers that the "
                f"host reads from tensors in a step: {_host_reads(predicted, PLACEMENTS)}; in `append`: "
                f"{_host_reads(predicted, ['append'])}.",
                "## Predicted time that the penalty adds to a step, ms",
                f"Bytes / {speeds.hbm / 1e12:g} TB/s + all_reduces x {speeds.latency * 1e6:g} to "
                f"{speeds.slow_latency * 1e6:g} us. The last column is a step of {speeds.tokens:,.0f} tokens per rank "
                f"at {speeds.flops / 1e12:g} TFLOP/s with AdamW, without a penalty.",
                _table(
                    ["", *(f"{kind}, {name}" for name in STEP for kind in kinds), "AdamW", "step"],
                    [
                        [mesh_name(costs)]
                        + [_milliseconds(costs, kind, name, speeds) for name in STEP for kind in kinds]
                        + [f"{1e3 * adamw_seconds(costs, speeds):.2f}", f"{1e3 * step_seconds(costs, speeds):.0f}"]
                        for costs in predicted
                    ],
                ),
                "## Estimating a Fisher",
                *_estimation(predicted),
                "## The same code in real processes",
                _table(
                    ["processes", "entries that must agree, in each rank", "different", "state of rank 0, bytes"],
                    [
                        [
                            f"{run['replicas'] * run['shards']}, "
                            + ("FSDP2" if run["replicas"] == 1 else f"HSDP {run['replicas']} x {run['shards']}"),
                            str(run["ranks"][0]["entries"]),
                            str(sum(len(rank["differences"]) for rank in run["ranks"])),
                            f"{sum(run['ranks'][0]['state'].values()):,}",
                        ]
                        for run in record["compared"]
                    ],
                ),
                "A small decoder of the same form, through gloo. Entries: every table above but the times.",
            ]
        )
        + "\n"
    )


def _estimation(predicted: Sequence[dict[str, Any]]) -> list[str]:
    whole = predicted[0]["whole_parameters"]
    total = predicted[0]["parameters"]
    return [
        f"With whole parameters: entering `whole_parameters` allocates {_gib(whole['peak'])} GiB in every rank, on "
        f'every mesh ({_calls_in_short(whole["collectives"])}). `estimate_fisher` (rank 1, direction="mean") then needs '
        f"{WHOLE_ESTIMATE} bytes per parameter, {_gib(WHOLE_ESTIMATE * total)} GiB in every rank, and the activations.",
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}"


def _bytes(size: int) -> str:
    return f"{size:,} B" if size < 1e6 else f"{size / 1e6:,.0f} MB"


def _calls(collectives: Sequence[Sequence[Any]]) -> str:
    """Collective calls in words."""
    words = [
        f"{f'{number} x ' if number > 1 else ''}{name} of {_bytes(size)} over {processes}"
        for name, processes, size, number in collectives
    ]
    return ", ".join(words) or "none"


def _calls_in_short(collectives: Sequence[Sequence[Any]]) -> str:
    gathers = [(size, number) for name, _, size, number in collectives if name == "all_gather"]
    return (
        f"{sum(number for _, number in gathers)} all_gathers of together "
        f"{_bytes(sum(size * number for size, number in gathers))}"
    )


def _per_parameter(costs: dict[str, Any], moved: int) -> str:
    return f"{moved / (costs['state']['parameters'] / 4):.0f}"


def _host_reads(predicted: Sequence[dict[str, Any]], names: Iterable[str]) -> str:
    names = list(names)
    reads = {
        history[name]["host_reads"] for costs in predicted for history in costs["histories"].values() for name in names
    }
    return " to ".join(map(str, sorted({min(reads), max(reads)})))


def _milliseconds(costs: dict[str, Any], kind: str, placement: str, speeds: Speeds) -> str:
    low, high = (1e3 * seconds(costs, kind, placement, speeds.hbm, x) for x in (speeds.latency, speeds.slow_latency))
    return f"{low:.2f} to {high:.2f}"


def picture(record: dict[str, Any], path: Path) -> None:
    """Left: bytes per rank. Right: the predicted time that FusedAdamW's penalty adds to a step, by ranks, FSDP2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speeds = Speeds(**record["speeds"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    fsdp = [costs for costs in record["predicted"] if len(costs["processes"]) == 1]
    ranks = [costs["processes"][0] for costs in fsdp]
    kinds = list(fsdp[0]["histories"])
    model = [sum(costs["state"].values()) / GIB for costs in fsdp]
    left.plot(ranks, model, color="0.3", marker="s", label="parameters, gradients, AdamW")
    right.plot(
        ranks, [1e3 * adamw_seconds(costs, speeds) for costs in fsdp], color="0.3", marker="s", label="AdamW itself"
    )
    for i, kind in enumerate(kinds):
        left.plot(
            ranks, [costs["histories"][kind]["state"] / GIB for costs in fsdp], color=f"C{i}", marker="o", label=kind
        )
        low, high = (
            [1e3 * seconds(costs, kind, STEP[0], speeds.hbm, latency) for costs in fsdp]
            for latency in (speeds.latency, speeds.slow_latency)
        )
        right.plot(ranks, low, color=f"C{i}", marker="o", label=kind)
        right.fill_between(ranks, low, high, color=f"C{i}", alpha=0.15)
    left.set_ylabel("GiB per rank")
    right.set_ylabel("ms per step, predicted")
    left.set_title("State", fontsize=10)
    right.set_title(
        f"FusedAdamW: added by the penalty, all_reduce of {speeds.latency * 1e6:g} to {speeds.slow_latency * 1e6:g} us",
        fontsize=10,
    )
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ranks, [f"{count:,}" for count in ranks])
        panel.set_xlabel("ranks, FSDP2")
        panel.grid(color="0.92")
        panel.legend(fontsize=7)
    figure.suptitle(f"{record['predicted'][0]['parameters'] / 1e9:.1f} B parameters", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
