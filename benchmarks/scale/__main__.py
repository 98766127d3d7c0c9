"""``python -m benchmarks.scale``: what the library costs in a decoder of 8 B parameters on 64, 256 and 1,024 ranks,
under FSDP2 and HSDP, without the hardware.

One rank of each mesh runs the library's own code on fake tensors in a fake process group; the counts are exact: bytes
of state, collective calls with their sizes, bytes that operators read and write, numbers that the host reads. The same
code on a small decoder of the same form, in 2, 4 and 8 real processes that talk through gloo, must give what the
predictions for them give. Times are a formula from the counts and from the speeds that the options give;
nothing is timed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..common import command
from .decoder import LLAMA_8B, SMALL
from .measure import KINDS
from .processes import compare, in_fresh_processes
from .report import Speeds, markdown, picture


@dataclass(frozen=True)
class Mesh:
    replicas: int
    shards: int


MESHES = [Mesh(1, 64), Mesh(8, 8), Mesh(1, 256), Mesh(1, 1024), Mesh(16, 64)]
REAL = [Mesh(1, 2), Mesh(2, 2), Mesh(1, 8)]
COMPARED = [KINDS[0], *KINDS[-2:]]  # one term, many terms in the smallest dtype, a diagonal


def main(arguments: Sequence[str] | None = None) -> None:
    options = command.parser("scale", __doc__, "scale.json, scale.md and scale.png")
    options.add_argument("--small", action="store_true", help="a small decoder, and 2 real processes only")
    for name, default, help in (
        ("hbm", 3.35e12, "bytes/s of a rank's memory"),
        ("latency", 20e-6, "seconds of a small all_reduce on a fast network"),
        ("slow_latency", 60e-6, "the same on a slow one"),
        ("tokens", 8192, "tokens of a rank in one step"),
        ("flops", 4e14, "FLOP/s of a rank in forward and backward"),
    ):
        flag = f"--{name.replace('_', '-')}"
        options.add_argument(flag, type=float, default=default, help=f"{help} (default: {default:g})")
    parsed = options.parse_args(arguments)
    speeds = Speeds(**{name: getattr(parsed, name) for name in Speeds.__dataclass_fields__})
    shape, meshes, real = (SMALL, MESHES[:2], REAL[:1]) if parsed.small else (LLAMA_8B, MESHES, REAL)
    comparisons = [compare(SMALL, mesh.replicas, mesh.shards, COMPARED) for mesh in real]
    record: dict[str, Any] = {
        **command.record_head("scale"),
        "torch": torch.__version__,
        "speeds": asdict(speeds),
        "predicted": in_fresh_processes([(shape, mesh.replicas, mesh.shards) for mesh in meshes]),
        "compared": comparisons,
    }
    text = markdown(record)
    print(text)
    command.write(parsed.out, "scale", record, text)
    if parsed.out is not None:
        picture(record, parsed.out / "scale.png")
    if differences := [rank["differences"] for run in comparisons for rank in run["compared"] if rank["differences"]]:
        raise SystemExit(f"predictions and measurements differ: {differences}")


if __name__ == "__main__":
    main()
