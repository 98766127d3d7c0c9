"""``python -m benchmarks.sharded_estimation``: the peak memory of a process that takes part in ``estimate_fisher``.

A residual network of equal layers is sharded by ``fully_shard``, layer by layer, over processes of a gloo group on this
machine, and never exists as a whole. Its Fisher along the mean gradient is estimated twice, each time by new processes:
as it is sharded, and in a block of ``whole_parameters``. Peaks are resident memory beyond what a process held before it
had the model (common/memory.py), so they contain its shards. The largest of all processes counts. Both ways must give
the same curvature.
"""

import argparse
import json
import os
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from crl_kernels import LowRankFisher, estimate_fisher, whole_parameters

from .common import command
from .common.measure import commit
from .common.memory import can_measure, peak_bytes

WAYS = {"sharded": "`estimate_fisher(model, ...)`", "whole": "the same in `with whole_parameters(model)`"}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.linear(x))


def sharded_model(layers: int, width: int) -> nn.Module:
    """With the same values in every run with as many processes, made shard by shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(*(Residual(width) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(distributed.get_rank())
    for parameter in model.parameters():
        local = parameter.detach().to_local()  # type: ignore[attr-defined]
        local.normal_(std=0.1 / width**0.5, generator=generator)
    return model


def per_sample_loss(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (model(x) - x.roll(1, dims=1)).square().mean(1)
    return loss


def estimate(way: str, layers: int, width: int, samples: int) -> LowRankFisher:
    model = sharded_model(layers, width)
    generator = torch.Generator().manual_seed(distributed.get_rank())
    batches = list(torch.randn(samples, width, generator=generator).split(samples // 2))
    with whole_parameters(model) if way == "whole" else nullcontext():
        fisher = estimate_fisher(model, per_sample_loss, batches)
    assert isinstance(fisher, LowRankFisher)
    return fisher


def measure_process(rank: int, count: int, folder: str, way: str, layers: int, width: int, samples: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the model is not trained
    if not can_measure():
        raise SystemExit("this system does not report the peak of resident memory.")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=count)
    estimate(way, 2, 64, 4)  # imports and caches
    curvature = 0.0

    def measured() -> LowRankFisher:
        nonlocal curvature
        fisher = estimate(way, layers, width, samples)
        curvature = float(fisher.curvatures)
        return fisher

    record = {"peak_bytes": peak_bytes(measured), "curvature": curvature}
    Path(folder, f"{rank}.json").write_text(json.dumps(record))
    distributed.barrier()
    os._exit(0)  # threads of gloo outlive the interpreter now and then


def measure(way: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, folder, way, args.layers, args.width, args.samples)
        torch.multiprocessing.spawn(measure_process, arguments, nprocs=count)
        records = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]
    return {
        "way": way,
        "processes": count,
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "curvature": records[0]["curvature"],
    }


def markdown(result: dict[str, Any]) -> str:
    o, parameters = result["options"], result["parameters"]
    lines = [
        "# Peak memory of a process while a sharded model's Fisher is estimated",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, torch {result['torch']}; {parameters:,} "
        f"parameters in float32, {o['layers']} layers of width {o['width']}, {o['samples']} samples for each process.",
        "",
        "| processes | | MiB | bytes per parameter of the model | × whole |",
        "|---|---|---|---|---|",
    ]
    whole = {row["processes"]: row["peak_bytes"] for row in result["rows"] if row["way"] == "whole"}
    for row in result["rows"]:
        lines.append(
            f"| {row['processes']} | {WAYS[row['way']]} | {row['peak_bytes'] / 2**20:.0f} "
            f"| {row['peak_bytes'] / parameters:.1f} | {row['peak_bytes'] / whole[row['processes']]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    results = command.ROOT / "benchmarks" / "results"
    parser = command.parser("sharded_estimation", __doc__, "sharded_estimation.json and .md", results)
    parser.add_argument("--processes", type=command.count, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=command.count, default=48)
    parser.add_argument("--width", type=command.count, default=1024)
    parser.add_argument("--samples", type=command.count, default=4, help="of each process, half in each pass")
    args = parser.parse_args()
    command.require_kernels()
    rows = [measure(way, count, args) for count in args.processes for way in WAYS]
    for sharded, whole in zip(rows[::2], rows[1::2], strict=True):
        torch.testing.assert_close(sharded["curvature"], whole["curvature"], rtol=1e-4, atol=0)
    result = {
        **command.record_head("sharded_estimation"),
        "options": {key: value for key, value in vars(args).items() if key != "out"},
        "commit": commit(),
        "torch": torch.__version__,
        "parameters": args.layers * (args.width**2 + args.width),
        "rows": rows,
    }
    command.write(args.out, "sharded_estimation", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
