"""The costs of one rank of many that do not exist, and of all ranks of a few that do."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from .decoder import Shape, mesh_of
from .ledger import fake_tensors
from .measure import KINDS, Kind, costs


def predicted(shape: Shape, replicas: int, shards: int, rank: int = 0, kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """The costs of ``rank``, on fake tensors in a fake process group. Rank 0 has the largest shards."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=replicas * shards)
    try:
        mesh = mesh_of(replicas, shards)
        with fake_tensors():
            return costs(shape, mesh, kinds)
    finally:
        distributed.destroy_process_group()


def in_fresh_processes(calls: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """``predicted`` of each tuple of arguments, two at a time, each in a process of its own: DTensor caches the groups
    of a mesh, which another rank of an equal mesh must not find."""
    with get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        return pool.starmap(predicted, calls, chunksize=1)


def real(shape: Shape, replicas: int, shards: int, kinds: Sequence[Kind] = KINDS) -> list[dict[str, Any]]:
    """The costs of every rank, in real processes that talk through gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_in_process, (shape, replicas, shards, kinds, folder), nprocs=replicas * shards)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(replicas * shards)]


def _in_process(rank: int, shape: Shape, replicas: int, shards: int, kinds: Sequence[Kind], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=replicas * shards)
    Path(folder, f"{rank}.json").write_text(json.dumps(costs(shape, mesh_of(replicas, shards), kinds)))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that outlive their group may abort the interpreter's own end


# Allocations depend on what is freed when, and torch composes its own operators (layers, gathers of whole tensors)
# otherwise on fakes. No file is written.
_NOT_COMPARED = re.compile(r"/(peak|left)$|^(forward and backward|whole_parameters)/moved$|/save/(moved|host_reads)$")


def entries(costs: Any, place: str = "") -> dict[str, Any]:
    """What a prediction and a measurement must agree in: the entries of a record by their place in it."""
    if isinstance(costs, dict):
        return {k: v for key, value in costs.items() for k, v in entries(value, f"{place}/{key}".strip("/")).items()}
    return {} if _NOT_COMPARED.search(place) else {place: costs}


def compare(shape: Shape, replicas: int, shards: int, kinds: Sequence[Kind] = KINDS) -> dict[str, Any]:
    """Real processes, compared with predictions: the first, with the largest shards, and the last."""
    measured, compared = real(shape, replicas, shards, kinds), []
    ranks = (0, len(measured) - 1)
    predictions = in_fresh_processes([(shape, replicas, shards, rank, kinds) for rank in ranks])
    for rank, prediction in zip(ranks, predictions, strict=True):
        expected, found = entries(prediction), entries(measured[rank])
        names = expected.keys() | found.keys()
        differences = [name for name in sorted(names) if expected.get(name) != found.get(name)]
        compared.append({"rank": rank, "entries": len(names), "differences": differences})
    return {"replicas": replicas, "shards": shards, "compared": compared}
