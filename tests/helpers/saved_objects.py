"""Fishers and histories of a small network, their files, and all numbers that they hold."""

import json
import math
import struct
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import crl_kernels as ck

KINDS = (
    "low-rank Fisher",
    "low-rank int8 Fisher",
    "diagonal Fisher",
    "low-rank history",
    "low-rank int8 history",
    "low-rank and diagonal history",
    "diagonal history",
)
HISTORIES = tuple(kind for kind in KINDS if kind.endswith("history"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))


def named(model: nn.Module, seed: int, *leading: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*leading, *p.shape, generator=generator).to(p) for n, p in model.named_parameters()}


def statistics() -> ck.FisherStatistics:
    """Of two strata; the standard errors of curvatures made from all samples are not known."""
    parts = [
        ck.FisherStatistics(8, 3.0, -0.1, 0.05, 0.9, (0.1,), 0.2, math.nan, 0.5, math.inf, stratum=stratum, share=0.5)
        for stratum in (0, 7)
    ]
    return ck.FisherStatistics(16, 6.0, rho=0.9, curvature_se=(0.1, math.nan), strata=tuple(parts))


def low_rank_fisher(model: nn.Module, seed: int = 1, storage_dtype: torch.dtype = torch.bfloat16) -> ck.LowRankFisher:
    return ck.LowRankFisher(
        named(model, seed, 2),
        torch.tensor([0.5, 0.0]),
        named(model, seed + 100),
        slopes=torch.tensor([-0.25, 0.0]),
        storage_dtype=storage_dtype,
        statistics=statistics(),
    )


def diagonal_fisher(model: nn.Module, seed: int = 1) -> ck.DiagonalFisher:
    squares = {name: g.square() for name, g in named(model, seed).items()}
    return ck.DiagonalFisher(squares, named(model, seed + 100), statistics=ck.FisherStatistics(9, 2.5))


def saved_object(kind: str):
    """A Fisher or a history, and the model that it belongs to."""
    model = network()
    storage_dtype = torch.int8 if "int8" in kind else torch.bfloat16
    if kind in ("low-rank Fisher", "low-rank int8 Fisher"):
        return low_rank_fisher(model, storage_dtype=storage_dtype), model
    if kind == "diagonal Fisher":
        return diagonal_fisher(model), model
    if kind in ("low-rank history", "low-rank int8 history"):
        history = ck.LowRankHistory(model, include=["0", "2.weight"], first_order=True, decay=0.75, max_terms=8)
        for seed in (1, 2):
            history.append(low_rank_fisher(model, seed, storage_dtype))
        return history, model
    if kind == "low-rank and diagonal history":
        history = ck.LowRankHistory(model, max_terms=1, tail="diagonal")
        for seed in (1, 2, 3, 4):
            history.append(low_rank_fisher(model, seed))
        return history, model
    history = ck.DiagonalHistory(model, decay=0.75)
    for seed in (1, 2):
        history.append(diagonal_fisher(model, seed))
    return history, model


def load(kind: str, path: Path, model: nn.Module):
    if kind.endswith("Fisher"):
        return ck.load_fisher(path)
    return (ck.LowRankHistory if kind.startswith("low") else ck.DiagonalHistory).load(path, model)


def numbers(saved) -> list:
    """All that a Fisher or history holds, comparable."""
    if isinstance(saved, (ck.LowRankFisher, ck.DiagonalFisher)):
        tensors = {name: value for name, value in vars(saved).items() if isinstance(value, Tensor)}
        if isinstance(stored := getattr(saved, "_stored", None), tuple):
            tensors |= {"q": stored[0], "scales": stored[1]}
        facts = [saved.layout.names, saved.layout.shapes, str(saved.statistics), getattr(saved, "slopes", 0) is None]
    else:
        tensors, facts = saved.state_dict(), sorted(saved._options().items())
    return [str(facts), *((name, str(t.dtype), t.shape, t.double().tolist()) for name, t in sorted(tensors.items()))]


def save_in_old_format(saved, path: Path) -> tuple[dict[str, Tensor], dict]:
    """Saves as version 1 of the format did: no digest, scalars among the tensors; (tensors, metadata) of the file."""
    saved.save(path)
    entry, tensors = entry_of(path), load_file(path)
    facts = entry["facts"]
    for name, dtype in (("num_tasks", torch.int64), ("residual", torch.float64)):
        if name in facts:
            tensors[name] = torch.tensor(facts.pop(name), dtype=dtype)
    old = {"version": 1, "kind": entry["kind"], "facts": facts}
    rewrite(path, tensors, old)
    return load_file(path), old


def rewrite(path: Path, tensors: dict[str, Tensor], entry: object) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"crl_kernels": json.dumps(entry)})


def entry_of(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["crl_kernels"])


def split(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body
