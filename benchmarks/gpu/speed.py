"""Times: rows of ``benchmarks.penalty``, a training step, and the rows of ``benchmarks.trainers``."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def timed(call: Callable[[], object], device: str, rounds: int) -> float:
    """Median milliseconds, by events on a GPU."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def roofline(device: str, small: bool) -> dict[str, Any]:
    """Rows of benchmarks.penalty on this device, save those that ``left_out`` names: time, GB/s, share of the copy
    bandwidth."""
    from ..common.problem import Problem
    from ..penalty.contenders import CONTENDERS
    from ..penalty.operators import OPERATORS
    from ..penalty.rows import prepare

    sizes = [(20_000, 10)] if small else [(600_000, 100), (25_000_000, 100), (25_000_000, 1), (350_000_000, 700)]
    left_out = ("torch.compile", "Avalanche", "reference", "flattened")
    results: dict[str, Any] = {}
    for numel, tensors in sizes:
        chosen = {
            name: row
            for name, row in (CONTENDERS | OPERATORS).items()
            if not any(word in name for word in left_out) and (numel < 3e8 or row.tasks == 1)
        }
        calls, reasons = prepare(chosen, Problem(numel, tensors, device))
        rows = {name: timed(call, device, 3 if small else 20) for name, call in calls.items()}
        copy = rows["copy"] / chosen["copy"].bytes
        results[f"{numel}/{tensors}"] = {
            name: {
                "ms": ms,
                "gb_per_s": chosen[name].bytes * numel / ms / 1e6,
                "share_of_copy": chosen[name].bytes * copy / ms,
            }
            for name, ms in rows.items()
        } | {name: {"skipped": reason} for name, reason in reasons.items()}
    return results


def training_step(device: str, small: bool) -> dict[str, Any]:
    """Milliseconds of an AdamW step of a convolutional stack, without and with each penalty."""
    import crl_kernels as ck

    width, blocks, batch = (8, 2, 2) if small else (512, 10, 32)
    layers = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()) for _ in range(blocks)
    ]
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers, nn.Conv2d(width, 3, 3, padding=1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, 3, 16, 16, device=device)
    named = {name: p.detach() for name, p in model.named_parameters()}
    histories: dict[str, Any] = {"none": None}
    for name, dtype in (("rank-1", torch.float32), ("rank-1, bf16", torch.bfloat16)):
        histories[name] = ck.LowRankHistory(model)
        mu = {key: torch.randn_like(p) for key, p in named.items()}
        histories[name].append(ck.LowRankFisher.from_mean_gradient(mu, 1e-6, named, storage_dtype=dtype))
    histories["diagonal"] = ck.DiagonalHistory(model)
    histories["diagonal"].append(ck.DiagonalFisher({key: torch.rand_like(p) for key, p in named.items()}, named))

    results: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for decoupled in (False, True):
        for name, history in histories.items():

            def step() -> None:
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()

            if history is not None:
                history.attach(optimizer, 1e-3, decoupled=decoupled)
            results[f"{name}{', decoupled' if decoupled else ''}"] = timed(step, device, 3 if small else 30)
            if history is not None:
                history.detach()
    return results


def trainers(device: str, small: bool) -> dict[str, Any]:
    """What the penalty adds to a training step, for each API that adds it."""
    from ..common.problem import Unavailable
    from ..trainers import DEFAULT, measure

    rounds, passes = (2, 1) if small else (30, 10)
    results: dict[str, Any] = {}
    for name in ["transformer-tiny"] if small else DEFAULT:
        try:
            results[name] = measure(name, rounds, passes, device)
        except Unavailable as reason:
            results[name] = {"skipped": str(reason)}
    return results
