"""Tables and a picture of what was counted, and the time that follows from it:

    seconds = bytes read and written / bandwidth of the memory + number of all_reduces * latency

This is a lower bound: it has no time for launching kernels, and each byte moves at full bandwidth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .decoder import TOKENS
from .measure import PLACEMENTS

GIB = 2**30
STEP = ("FusedAdamW", "add_penalty_grad_")  # the placements that the table of times shows
# Bytes that estimate_fisher(rank=1) has at its peak for each float32 parameter in a process, beside the model: two sums
# and a mean in float64, the mean in float32, the direction. help(estimate_fisher) has the formula.
ESTIMATE = 2 * 8 + 8 + 4 + 4


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
    parts = [
        "# What the library costs in a large decoder",
        f"`{record['command']}`, {record['date']}, {record['machine']}, torch {record['torch']}. "
        f"{first['parameters']:,} parameters, in float32, with forward and backward in bfloat16. Counts are those of "
        "rank 0, which has the largest shards. Nothing was timed.",
        "## State, GiB per rank",
        _table(
            ["", "parameters", "gradients", "AdamW", *kinds],
            [
                [mesh_name(costs), *map(_gib, costs["state"].values())]
                + [_gib(costs["histories"][kind]["state"]) for kind in kinds]
                for costs in predicted
            ],
        ),
        "## Collective calls of a step",
        f"What a history adds, in bytes, over the {first['processes'][-1]} processes that share one copy of the "
        f"parameters ({mesh_name(first)}):",
        _collectives(first),
        _other_meshes(predicted),
        f"Forward and backward, which are FSDP's own: {_calls(first['forward and backward']['collectives'])}.",
        "## Memory traffic that the penalty adds to a step, bytes per parameter of the rank's shard",
        _table(
            ["", *kinds],
            [[name, *(_per_parameter(first, added(first, kind, name)[0]) for kind in kinds)] for name in PLACEMENTS],
        ),
        f"AdamW itself: {_per_parameter(first, first['updates']['FusedAdamW']['moved'])}. Numbers that the host reads "
        f"from tensors in a step: {_host_reads(predicted, PLACEMENTS)}; in `append`: "
        f"{_host_reads(predicted, ['append'])}, without the digest of the Fisher that real processes compare.",
        "## Predicted time that the penalty adds to a step, ms",
        f"Bytes / ({speeds.hbm / 1e12:g} TB/s) + all_reduces x {speeds.latency * 1e6:g} to "
        f"{speeds.slow_latency * 1e6:g} us. For comparison AdamW itself, by its bytes, and a step without a penalty: "
        f"{speeds.tokens:,.0f} tokens per rank at {speeds.flops / 1e12:g} TFLOP/s, and AdamW.",
    ]
    for name in STEP:
        parts += [f"### {name}", _times(predicted, name, speeds)]
    parts += ["## Estimating a Fisher, GiB per rank", *_estimation(predicted)]
    parts += ["## The same code in real processes", *_agreement(record["compared"])]
    return "\n\n".join(parts) + "\n"


def _collectives(costs: dict[str, Any]) -> str:
    """Rows: where the penalty goes, and ``append``. Histories with equal columns share one."""
    histories = costs["histories"]
    columns: dict[tuple[str, ...], list[str]] = {}
    for kind in histories:
        calls = [added(costs, kind, name)[1] for name in PLACEMENTS] + [histories[kind]["append"]["collectives"]]
        columns.setdefault(tuple(_calls(part) for part in calls), []).append(kind)
    rows = zip([*PLACEMENTS, "append"], *columns, strict=True)
    return _table(["", *("; ".join(names) for names in columns.values())], rows)


def _other_meshes(predicted: Sequence[dict[str, Any]]) -> str:
    """Whether the other meshes make the same calls, over how many processes; and what ``save`` does."""

    def sizes_of(costs: dict[str, Any]) -> Any:
        """Calls of steps and of append: name, bytes, number."""
        return [
            [(name, size, number) for name, _, size, number in history[place]["collectives"]]
            for history in costs["histories"].values()
            for place in (*PLACEMENTS, "append")
        ]

    first = predicted[0]
    assert all(sizes_of(costs) == sizes_of(first) for costs in predicted)
    over = {
        mesh_name(costs): {
            call[1]
            for history in costs["histories"].values()
            for place in (*PLACEMENTS, "append")
            for call in history[place]["collectives"]
        }
        for costs in predicted
    }
    listed = ", ".join(f"{name}: {' or '.join(map(str, sorted(counts)))}" for name, counts in over.items())
    saved = next(iter(first["histories"].values()))["save"]["collectives"]
    return (
        f"The other meshes make the same calls with the same bytes. The number of processes in them: {listed}. `save` "
        f"gathers each vector, parameter by parameter: {_gathers(saved)}."
    )


def _times(predicted: Sequence[dict[str, Any]], placement: str, speeds: Speeds) -> str:
    kinds = list(predicted[0]["histories"])
    return _table(
        ["", *kinds, "AdamW itself", "a step"],
        [
            [mesh_name(costs)]
            + [_milliseconds(costs, kind, placement, speeds) for kind in kinds]
            + [f"{1e3 * adamw_seconds(costs, speeds):.2f}", f"{1e3 * step_seconds(costs, speeds):.0f}"]
            for costs in predicted
        ],
    )


def _estimation(predicted: Sequence[dict[str, Any]]) -> list[str]:
    whole, total = predicted[0]["whole_parameters"], predicted[0]["parameters"]
    rows = []
    for costs in predicted:
        shards, own = costs["state"]["parameters"], costs["forward and backward"]["peak"]
        estimate = ESTIMATE * shards // 4
        rows.append([mesh_name(costs), *map(_gib, (shards, estimate, own, shards + estimate + own))])
    return [
        f"What `estimate_fisher` (rank 1) keeps is derived: {ESTIMATE} bytes for each parameter that a process holds. "
        f"In a block of `whole_parameters`, on every mesh: {_gib(whole['peak'])} for the parameters, counted "
        f"({_gathers(whole['collectives'])}), and {_gib(whole_estimate(total))} with the estimate; and activations.",
        "On the shards, as it estimates without such a block, with the counted peak of forward and backward of "
        f"{TOKENS} tokens, in which FSDP gathers and reduces layer by layer:",
        _table(["mesh", "shards", "estimate", "forward and backward", "together"], rows),
    ]


def whole_estimate(parameters: int) -> int:
    """Bytes in every process of a block of whole_parameters: float32 parameters, and what an estimate keeps."""
    return (4 + ESTIMATE) * parameters


def _agreement(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "A small decoder of the same form, through gloo, and its predictions on fake tensors: bytes of state, "
        "collective calls, memory traffic and host reads of everything above, in the first rank and in the last. Not "
        "compared: peaks, and the traffic of torch's own operators in the layers and in gathers of whole tensors.",
        _table(
            ["processes", "entries of a rank", "entries that differ"],
            [
                [
                    f"{run['replicas'] * run['shards']}, "
                    + ("FSDP2" if run["replicas"] == 1 else f"HSDP {run['replicas']} x {run['shards']}"),
                    str(run["compared"][0]["entries"]),
                    str(sum(len(rank["differences"]) for rank in run["compared"])),
                ]
                for run in runs
            ],
        ),
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
    words = [f"{f'{number} x ' if number > 1 else ''}{name} of {_bytes(size)}" for name, _, size, number in collectives]
    return ", ".join(words) or "none"


def _gathers(collectives: Sequence[Sequence[Any]]) -> str:
    gathers = [(size, number) for name, _, size, number in collectives if name == "all_gather"]
    total = sum(size * number for size, number in gathers)
    return f"{sum(number for _, number in gathers)} all_gathers of {_bytes(total)} together"


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
        panel.set_ylim(panel.get_ylim()[0] / 12)  # room for the legend below the lines
        panel.legend(fontsize=7, loc="lower left", ncols=2)
    figure.suptitle(f"{record['predicted'][0]['parameters'] / 1e9:.1f} B parameters", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
