"""``python -m benchmarks.gpu``: everything that needs a GPU, in one command of a few minutes.

Needs torch, triton and numpy. Uses the crl_kernels that is installed, or this source tree, whose CUDA library it builds
where it is missing. Each stage runs in a process of its own, once for the CUDA C++ kernels and once for Triton's, so
that a crash or a hang is recorded and the next stage runs all the same. A table is printed last, and written with all
figures to ``--out``. ``--dry-run`` walks the same code on a CPU, with small sizes; what cannot run there says so.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
BACKENDS = ("cuda", "triton")
SECONDS_PER_STAGE = 180  # of which, the first time, a second or so for each Triton kernel that is compiled


class NeedsGpu(Exception):
    """What a stage cannot do on this machine."""


# Correctness


def hostile(numel: int, dtype: torch.dtype, layout: str, generator: torch.Generator, device: str) -> Tensor:
    """A tensor of ``numel`` elements, offset by one, strided or transposed."""
    values = torch.randn(2 * numel + 1, generator=generator, dtype=torch.float64).to(dtype).to(device)
    if layout == "offset":
        return values[1 : numel + 1]
    if layout == "strided":
        return values[: 2 * numel : 2]
    if layout == "transposed" and numel % 3 == 0:
        return values[:numel].view(3, numel // 3).t()
    return values[:numel].clone()


def flat64(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def require_sum(name: str, actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """A float64 sum may be off by a few roundings of the sum of magnitudes."""
    if not bool(((actual.cpu() - expected).abs() <= 1e-13 * magnitude).all()):
        raise AssertionError(f"{name}: {actual.tolist()}, expected {expected.tolist()}")


def require_rounded(
    name: str, actual: list[Tensor], expected: Tensor, magnitude: Tensor, slack: Tensor | None = None
) -> None:
    """Each element is the float64 result, rounded to its dtype; that result itself may be off by ``slack``."""
    lengths = [t.numel() for t in actual]
    slack = torch.zeros_like(magnitude) if slack is None else slack
    parts = [x.split(lengths) for x in (expected, magnitude, slack)]
    for t, e, m, s in zip(actual, *parts, strict=True):
        bound = (torch.finfo(t.dtype).eps + 2**-50) * m + s + torch.finfo(t.dtype).smallest_normal
        wrong = (t.cpu().double().flatten() - e).abs() > bound
        if bool(wrong.any()) or bool(t.isnan().any()):
            raise AssertionError(f"{name}: {int(wrong.sum())} of {t.numel()} {t.dtype} elements are wrong")


def poison(device: str) -> None:
    """Freed memory that is full of NaN shows a kernel which reads what it did not write."""
    for size in (64, 4096, 65536, 1 << 20):
        torch.full((size,), float("nan"), device=device)


def require_backend(device: str) -> dict[str, str]:
    """What runs each operator, which has to be the backend that this process was asked for."""
    from crl_kernels import _ops
    from crl_kernels.backends import registry

    runs = {name: registry.implementation(device, name) for name in _ops.NAMES}
    wanted = {"cuda": "CUDA", "triton": "Triton"}.get(registry.CHOICE)
    expected = {name: "Triton" if name in registry.TRITON_ON_GPUS else wanted for name in runs}
    if others := {name: found for name, found in runs.items() if wanted and found != expected[name]}:
        raise AssertionError(f"expected {wanted}, and Triton for what CUDA leaves out; found {others}")
    return runs


def correctness(device: str, small: bool) -> dict[str, Any]:
    """Every operator on hostile lists, against float64."""
    runs = require_backend(device)
    ops = torch.ops.crl_kernels
    generator = torch.Generator().manual_seed(0)
    lengths = [0, 1, 15, 16, 17, 2047, 2048, 2049, 4095, 4096, 4097, 100_003 if small else 1_000_003]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    cases = 0
    for layout in ("contiguous", "offset", "strided", "transposed"):
        for mixed in (False, True):
            for terms, dtype in ((1, torch.float32), (3, torch.bfloat16), (10, torch.float32), (2, torch.float64)):
                kinds = [dtypes[i % 4] if mixed else torch.float32 for i in range(len(lengths))]

                def tensors(layout: str = layout, kinds: list[torch.dtype] = kinds) -> list[Tensor]:
                    pairs = zip(lengths, kinds, strict=True)
                    return [hostile(n, kind, layout, generator, device) for n, kind in pairs]

                params = tensors()
                flat = torch.randn(terms, sum(lengths), generator=generator).to(dtype)
                u = list(flat.to(device))
                if mixed:  # pieces, with the shapes of the parameters
                    u = [x.reshape(p.shape) for row in u for x, p in zip(row.split(lengths), params, strict=True)]
                matrix, theta = flat.double(), flat64(params)
                size = matrix.abs() @ theta.abs()
                a, b = (torch.randn(terms, generator=generator, dtype=torch.float64) for _ in range(2))
                c = torch.tensor(1.7, dtype=torch.float64)
                where = f"{layout}, {'mixed' if mixed else 'float32'}, {terms} x {dtype}"
                poison(device)
                projections = ops.low_rank_projections(params, u, terms)
                require_sum(f"projections, {where}", projections, matrix @ theta, size)
                combined = ops.low_rank_combine(u, a.to(device), params)
                require_rounded(f"combine, {where}", combined, a @ matrix, a.abs() @ matrix.abs())
                targets = tensors()
                before = flat64(targets)
                ops.low_rank_accumulate_(targets, u, a.to(device))
                require_rounded(
                    f"accumulate, {where}", targets, before + a @ matrix, before.abs() + a.abs() @ matrix.abs()
                )
                targets = tensors()
                before = flat64(targets)
                force = c * a * (matrix @ theta - b)
                value = ops.low_rank_penalty_accumulate_(targets, params, u, a.to(device), b.to(device), c.to(device))
                require_sum(
                    f"penalty, {where}",
                    value,
                    (force * (matrix @ theta - b)).sum() / 2,
                    c / 2 * (a.abs() * (size + b.abs()) ** 2).sum(),
                )
                require_rounded(
                    f"penalty gradient, {where}",
                    targets,
                    before + force @ matrix,
                    before.abs() + force.abs() @ matrix.abs(),
                    1e-13 * (c * a.abs() * size) @ matrix.abs(),
                )
                state = torch.float64 if dtype == torch.float64 else torch.float32
                fisher, anchor = (torch.randn(sum(lengths), generator=generator).to(state) for _ in range(2))
                fisher = fisher.abs()
                s, m = [fisher.to(device)], [anchor.to(device)]
                distance = theta - anchor.double()
                expected = (fisher.double() * distance.square()).sum()
                require_sum(f"quadratic, {where}", ops.diagonal_quadratic(params, s, m), expected, expected)
                slope = c * fisher.double() * distance
                gradients = ops.diagonal_gradient(params, s, m, c.to(device))
                require_rounded(f"diagonal gradient, {where}", gradients, slope, slope.abs())
                targets = tensors()
                before = flat64(targets)
                value = ops.diagonal_accumulate_(targets, params, s, m, c.to(device))
                require_sum(f"diagonal value, {where}", value, expected, expected)
                require_rounded(f"diagonal accumulate, {where}", targets, before + slope, before.abs() + slope.abs())
                moved = tensors()
                before = flat64(moved)
                ops.diagonal_shrink_(moved, s, m, c.to(device))
                x = c * fisher.double()
                expected_step = before - x / (1 + x) * (before - anchor.double())
                require_rounded(f"shrink, {where}", moved, expected_step, before.abs() + anchor.double().abs())
                cases += 1
    return {"lists": cases, "operators": runs}


# Races, size, graphs, compilation


def races(device: str, small: bool) -> dict[str, Any]:
    """Bitwise equality: from run to run, flat against list, and with two streams at once."""
    from .problem import Problem

    problem = Problem(100_000 if small else 25_000_000, 100, device)
    repeats = 5 if small else 50
    ops, u = torch.ops.crl_kernels, [problem.task.direction, problem.task.fisher]
    flat = torch.cat([p.detach() for p in problem.params])
    params = [p.detach() for p in problem.params]
    first = ops.low_rank_projections(params, u, 2)
    streams = [torch.cuda.Stream() for _ in range(2)] if device == "cuda" else []
    for _ in range(repeats):
        for theta in (params, [flat]):
            if not torch.equal(ops.low_rank_projections(theta, u, 2), first):
                raise AssertionError("projections differ from run to run, or between a list and a flat tensor")
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(repeats if streams else 0):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.low_rank_projections(params, u, 2))
    if streams:
        torch.cuda.synchronize()
    if not all(torch.equal(x, first) for x in found):
        raise AssertionError("projections on two streams at once differ")
    return {"repeats": repeats, "streams": len(streams)}


def large(device: str, small: bool) -> dict[str, Any]:
    """More than 2^31 elements in one tensor and in a list."""
    if device != "cuda":
        raise NeedsGpu("more than 2^31 elements")
    numel = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 7 * numel:
        raise NeedsGpu(f"{7 * numel / 2**30:.0f} GiB of free memory")
    theta, u = (torch.empty(numel, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    expected = sum(x.double() @ y.double() for x, y in zip(theta.split(1 << 27), u.split(1 << 27), strict=True))
    for params in ([theta], list(theta.split([7, 2**31 - 9, numel - 2**31 + 2]))):
        found = torch.ops.crl_kernels.low_rank_projections(params, [u], 1)[0]
        if not float((found - expected).abs()) <= 1e-6 * numel**0.5:
            raise AssertionError(f"projection is {float(found)}, expected {float(expected)}")
        tail = theta[-5:].double()
        torch.ops.crl_kernels.low_rank_accumulate_(params, [u], torch.ones(1, dtype=torch.float64, device=device))
        if not torch.allclose(theta[-5:].double(), tail + u[-5:].double(), rtol=1e-2, atol=1e-2):
            raise AssertionError("the last elements were not updated")
        expected = sum(x.double() @ y.double() for x, y in zip(theta.split(1 << 27), u.split(1 << 27), strict=True))
    del theta, u, params
    images = torch.empty(5, 32, 4096, 4096, dtype=torch.bfloat16, device=device).normal_()
    outputs = torch.randn(5, 16, 64, 64, dtype=torch.bfloat16, device=device)
    geometry = [[1, 1], [64, 64], [0, 0], [1, 1], 1, None, False, False]
    results = [
        torch.ops.crl_kernels.sample_weight_gradients(x, outputs, *geometry)
        for x in (images, images[:, :, ::64, ::64].contiguous())
    ]
    size = float(results[1][0].abs().max())
    if not float((results[0][0] - results[1][0]).abs().max()) <= 1e-5 * size:
        raise AssertionError(
            "weight gradients of an input of more than 2^31 elements differ from those of what it reads"
        )
    return {"elements": numel}


def graphs(device: str, small: bool) -> dict[str, Any]:
    """No synchronisation in a step; capture, and replay with other parameter values."""
    if device != "cuda":
        raise NeedsGpu("CUDA graphs")
    from .problem import Problem

    problem = Problem(1_000_000, 100, device)
    for history in (problem.rank1_history, problem.diagonal_history):

        def step(history: Any = history) -> Tensor:
            value = history.add_penalty_grad_(0.5)
            history.decoupled_step_(0.5, 0.1)
            return value

        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda._sleep(200_000_000)  # keeps the device busy for 0.1 s
        step()
        done = torch.cuda.Event()
        done.record()
        if done.query():
            raise AssertionError(f"a step waits for the device ({type(history).__name__})")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for seed in range(3):
            results = []
            for replay in (False, True):
                torch.manual_seed(seed)
                with torch.no_grad():
                    for p in problem.params:
                        p.copy_(torch.randn_like(p))
                        p.grad.zero_()
                if replay:
                    graph.replay()
                value = captured if replay else step()
                results.append(
                    [value.clone(), *(p.detach().clone() for p in problem.params), *(g.clone() for g in problem.grads)]
                )
            if not all(torch.equal(x, y) for x, y in zip(*results, strict=True)):
                raise AssertionError(f"a replay differs from eager mode ({type(history).__name__})")
    return {"histories": 2}


def compilation(device: str, small: bool) -> dict[str, Any]:
    """torch.compile(fullgraph=True) and gradcheck."""
    from crl_kernels import rank1_ewc_penalty

    theta, u, anchor = (torch.randn(12, dtype=torch.float64, device=device) for _ in range(3))
    theta.requires_grad_()

    def penalty(x: Tensor) -> Tensor:
        return rank1_ewc_penalty(x, direction=u, curvature=0.7, anchor=anchor, lam=3.0)

    torch.autograd.gradcheck(penalty, theta, check_forward_ad=True)
    torch.autograd.gradgradcheck(penalty, theta)
    modes = ["aot_eager"] if small else ["inductor", "reduce-overhead"]
    for mode in modes:
        options = {"mode": mode} if mode == "reduce-overhead" else {"backend": mode}
        compiled = torch.compile(penalty, fullgraph=True, **options)
        for _ in range(3):
            (gradient,) = torch.autograd.grad(compiled(theta), theta)
        torch.testing.assert_close(gradient, torch.autograd.grad(penalty(theta), theta)[0])
    return {"modes": modes}


# Speed


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
    """Every row of benchmarks.penalty on this device: time, GB/s, share of the copy bandwidth."""
    from .contenders import CONTENDERS
    from .measure import prepare
    from .operators import OPERATORS
    from .problem import Problem

    sizes = [(20_000, 10)] if small else [(600_000, 100), (25_000_000, 100), (25_000_000, 1), (350_000_000, 700)]
    left_out = ("torch.compile", "Avalanche", "reference", "flattened") if small or device == "cuda" else ()
    found: dict[str, Any] = {}
    for numel, tensors in sizes:
        chosen = {
            name: row
            for name, row in (CONTENDERS | OPERATORS).items()
            if not any(word in name for word in left_out) and (numel < 3e8 or row.tasks == 1)
        }
        calls, reasons = prepare(chosen, Problem(numel, tensors, device))
        rows = {name: timed(call, device, 3 if small else 20) for name, call in calls.items()}
        copy = rows["copy"] / chosen["copy"].bytes
        found[f"{numel}/{tensors}"] = {
            name: {
                "ms": ms,
                "gb_per_s": chosen[name].bytes * numel / ms / 1e6,
                "share_of_copy": chosen[name].bytes * copy / ms,
            }
            for name, ms in rows.items()
        } | {name: {"skipped": reason} for name, reason in reasons.items()}
    return found


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

    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    for decoupled in (False, True):
        for name, history in histories.items():

            def step() -> None:
                optimizer.zero_grad()
                (model(x) - x).square().mean().backward()
                optimizer.step()

            if history is not None:
                history.attach(optimizer, 1e-3, decoupled=decoupled)
            found[f"{name}{', decoupled' if decoupled else ''}"] = timed(step, device, 3 if small else 30)
            if history is not None:
                history.detach()
    return found


# AdamW with the penalty inside


class Parameters(nn.Module):
    """Parameters of given sizes; equal seeds give equal values on every device."""

    def __init__(self, lengths: list[int], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(n, generator=generator) for n in lengths]
        self.held = nn.ParameterList(nn.Parameter(x.to(device, dtype)) for x in drawn)

    def history(self, kind: str) -> Any:
        """``kind`` is diagonal, or a number of terms and their dtype, such as "3 bfloat16"."""
        import crl_kernels as ck

        generator = torch.Generator().manual_seed(2)
        named = {name: p.detach() for name, p in self.named_parameters()}

        def drawn(*leading: int) -> dict[str, Tensor]:
            return {n: torch.randn(*leading, *p.shape, generator=generator).to(p) for n, p in named.items()}

        anchor = {name: p + 0.01 * d for (name, p), d in zip(named.items(), drawn().values(), strict=True)}
        if kind == "diagonal":
            history: Any = ck.DiagonalHistory(self)
            history.append(ck.DiagonalFisher({name: d.square() for name, d in drawn().items()}, anchor))
            return history
        terms, dtype = kind.split()
        scale = sum(p.numel() for p in named.values()) ** -0.5
        u = {name: (scale * d).bfloat16().to(d) for name, d in drawn(int(terms)).items()}  # exact in all dtypes
        history = ck.LowRankHistory(self)
        ones = torch.ones(int(terms), dtype=torch.float64)
        stored = torch.bfloat16 if dtype == "bfloat16" else None
        history.append(ck.LowRankFisher(u, ones, anchor, storage_dtype=stored))
        return history


def optimizer(device: str, small: bool) -> dict[str, Any]:
    """FusedAdamW: after 20 steps at most twice as far from float64 as torch's AdamW with add_penalty_grad_ or
    decoupled_step_; a step without waiting for the device, and its time beside AdamW(fused=True)'s."""
    import crl_kernels as ck

    lengths, lam, lr = [1, 15, 16, 17, 4095, 4097, 100_003], 0.5, 1e-3
    kinds = ("1 float32", "3 bfloat16", "10 float32", "diagonal")

    def train(kind: str, decoupled: bool, inside: bool, exact: bool = False) -> Tensor:
        model = Parameters(lengths, "cpu", torch.float64) if exact else Parameters(lengths, device, torch.float32)
        history = model.history(kind)
        steps = (
            ck.FusedAdamW(model.parameters(), lr=lr, history=history, lam=lam, decoupled=decoupled)
            if inside
            else torch.optim.AdamW(model.parameters(), lr=lr)
        )
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            value = float(history.penalty(lam).detach())
            if decoupled and not inside:
                history.decoupled_step_(lam, lr)
            elif not inside:
                history.add_penalty_grad_(lam)
            steps.step()
            if inside and not abs(float(steps.last_penalty) - value) <= 1e-5 * abs(value):
                raise AssertionError(f"FusedAdamW, {kind}: last_penalty is {float(steps.last_penalty)}, not {value}")
        return flat64([p.detach() for p in model.parameters()])

    errors = {}
    for kind in kinds:
        for decoupled in (False, True):
            poison(device)
            expected = train(kind, decoupled, inside=False, exact=True)
            ours, plain = (train(kind, decoupled, inside) - expected for inside in (True, False))
            name = f"{kind}{', decoupled' if decoupled else ''}"
            errors[name] = float(ours.norm() / plain.norm())
            if not errors[name] <= 2:
                raise AssertionError(f"FusedAdamW, {name}: {errors[name]:.2g} times as far from float64 as torch's")

    numel, tensors = (10_000, 10) if small else (25_000_000, 100)
    model = Parameters([numel // tensors] * tensors, device, torch.float32)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    rounds = 3 if small else 50
    adamw = timed(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True).step, device, rounds)
    times = {"AdamW(fused=True)": {"ms": adamw, "times_adamw": 1.0}}
    for kind in ("none", "1 bfloat16", *kinds):
        history = None if kind == "none" else model.history(kind)
        step = ck.FusedAdamW(model.parameters(), lr=1e-6, history=history, lam=1e-6).step
        step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            step()
            torch.cuda.set_sync_debug_mode("default")
        ms = timed(step, device, rounds)
        times[f"FusedAdamW, {kind}"] = {"ms": ms, "times_adamw": ms / adamw}
    return {"errors_over_torch": errors, "parameters": numel, "times": times}


# Per-sample gradients


def require_close(name: str, actual: Tensor, expected: Tensor, size: Tensor, bound: float) -> float:
    """The largest error in units of ``size``, the magnitudes that were added; all on one device, in float64."""
    found = float(((actual.double() - expected).abs() / size.clamp(min=1e-300)).max()) if actual.numel() else 0.0
    if not found <= bound:  # NaN is no error that passes
        raise AssertionError(f"{name}: an error of {found:.1e} of the magnitudes, allowed are {bound:.1e}")
    return found


def weight_gradient_statistics(rows: Tensor, directions: Tensor | None) -> list[Tensor]:
    """Sum, square norms, projections and sum of squares of (N, *weight), as plain PyTorch has them."""
    flat, total = rows.flatten(1), rows.sum(0)
    u = total.flatten()[None] if directions is None else directions.to(rows.dtype).flatten(1)
    return [total, flat.square().sum(1), flat @ u.T, rows.square().sum(0)]


# input channels, output channels, image, kernel, stride, padding, dilation, groups
CONVOLUTIONS: tuple[tuple[int, int, tuple[int, int], tuple[int, int], int, int, int, int], ...] = (
    (128, 256, (16, 16), (3, 3), 1, 1, 1, 1),
    (3, 128, (17, 16), (3, 3), 1, 1, 1, 1),
    (200, 3, (9, 8), (3, 3), 1, 1, 1, 1),
    (96, 80, (14, 14), (3, 3), 2, 1, 1, 1),
    (64, 70, (12, 11), (3, 2), 1, 2, 2, 2),
    (48, 48, (9, 9), (3, 3), 1, 1, 1, 48),
    (320, 640, (1, 77), (1, 1), 1, 0, 1, 1),
    (65, 33, (7, 5), (1, 1), 2, 0, 1, 1),
)


def sample_operators(device: str, small: bool) -> dict[str, Any]:
    """Statistics of per-sample weight gradients and of a matrix of gradients, against float64, twice: bitwise the same.

    Bounds are in units of the magnitudes that are added. A float32 product of three TF32 ones is within 2^-20; each of
    n numbers that float32 adds may be truncated, 2^-24; plain PyTorch's own error, doubled, is allowed too.
    """
    require_backend(device)
    torch.backends.cudnn.allow_tf32 = False  # of plain PyTorch
    ops, generator = torch.ops.crl_kernels, torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    samples = 3 if small else 70

    def image(channels: int, height: int, width: int, dtype: torch.dtype, layout: str) -> Tensor:
        values = torch.randn(samples, channels, height, width, generator=generator) + 0.3
        if layout == "tokens":
            return values.to(dtype).to(device).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if layout == "sliced":
            return nn.functional.pad(values, (1, 2, 1, 0)).to(dtype).to(device)[:, :, 1:, 1:-2]
        return values.to(dtype).to(device)

    def plain(a: Tensor, b: Tensor, kernel: tuple[int, int], geometry: tuple[int, ...]) -> Tensor:
        weight = (b.shape[1], a.shape[1] // geometry[3], *kernel)
        return torch.stack(
            [torch.nn.grad.conv2d_weight(x, weight, y, *geometry) for x, y in zip(a.split(1), b.split(1), strict=True)]
        )

    # Each kernel takes a second to compile, so layouts and directions take turns.
    layouts = ("contiguous", "tokens", "sliced")
    for i, (c, o, (height, width), kernel, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        out = [
            (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
            for n, k in zip((height, width), kernel, strict=True)
        ]
        geometry = (stride, padding, dilation, groups)
        for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            layout, terms = layouts[(i + j) % 3], 3 if (i + j // 2) % 2 else None
            a, b = image(c, height, width, dtype, layout), image(o, out[0], out[1], dtype, layout)
            shape = (o, c // groups, *kernel)
            u = None if terms is None else torch.randn(terms, *shape, generator=generator).to(device)
            where = f"weight gradients, {c} to {o}, {dtype}, {layout}, {terms} directions"
            results = []
            for _ in range(2):
                poison(device)
                pairs = [[n, n] for n in geometry[:3]]
                results.append(ops.sample_weight_gradients(a, b, list(kernel), *pairs, groups, u, False, True))
            if not all(torch.equal(x, y) for x, y in zip(*results, strict=True)):
                raise AssertionError(f"{where}: differ from run to run")
            exact = weight_gradient_statistics(plain(a.double(), b.double(), kernel, geometry), u)
            theirs = weight_gradient_statistics(plain(a.float(), b.float(), kernel, geometry), u)
            size = weight_gradient_statistics(
                plain(a.double().abs(), b.double().abs(), kernel, geometry), None if u is None else u.abs()
            )
            ours = [results[0][i] for i in (0, 1, 2, 4)]
            added = samples * out[0] * out[1]
            for x, y, e, m in zip(ours, theirs, exact, size, strict=True):
                allowed = 2 * float(((y.double() - e).abs() / m.clamp(min=1e-300)).max())
                error = require_close(where, x, e, m, max(allowed, 2.0**-20 + added * 2.0**-24))
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)

    for rows, columns in (
        ((1, 4097), (5, 1000), (64, 2051)) if small else ((1, 100_003), (64, 1_000_003), (300, 70_001))
    ):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            grads = (torch.randn(rows, columns, generator=generator) + 0.3).to(dtype).to(device)
            x, size = grads.double(), grads.double().abs()
            poison(device)
            mean, norms, projections, diagonal = ops.sample_gradient_stats(grads, None, True)
            gram = ops.sample_gram(grads)
            where, tight = f"matrix of {rows} x {columns}, {dtype}", 1e-13 if dtype == torch.float64 else 1e-6
            require_close(f"{where}: mean", mean, x.mean(0), size.mean(0), tight)
            require_close(f"{where}: norms", norms, x.square().sum(1), size.square().sum(1), tight)
            require_close(f"{where}: projections", projections, x @ x.mean(0), size @ size.mean(0), tight)
            require_close(f"{where}: diagonal", diagonal, x.square().mean(0), size.square().mean(0), tight)
            bound = 1e-13 if dtype == torch.float64 else 2.0**-20 + 256 * 2.0**-24  # float32 adds runs of 256
            worst[f"gram, {dtype}"] = max(
                worst.get(f"gram, {dtype}", 0.0), require_close(f"{where}: Gram", gram, x @ x.T, size @ size.T, bound)
            )
    return {"largest_errors": worst}


def batch_of(size: int, samples: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images, timesteps and classes for benchmarks.sample_gradient_models."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, size, size, generator=generator, dtype=torch.float64)
    t, label = (torch.randint(n, (samples,), generator=generator) for n in (1000, 10))
    return x.to(dtype).to(device), t.to(device), label.to(device)


def losses_of(model: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return (model(x, t, label) - x.flip(0)).float().square().flatten(1).mean(1)


def sample_gradients(device: str, small: bool) -> dict[str, Any]:
    """SampleGradients of a small UNet end to end, against a backward pass per sample in float64; TF32 is off."""
    from crl_kernels import SampleGradients

    from .sample_gradient_models import SIZE, TINY

    torch.backends.cudnn.allow_tf32 = False
    samples, worst = 4, {}
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        torch.manual_seed(0)
        model = TINY["unet-tiny"]().double().to(device)
        batch = batch_of(SIZE, samples, device, torch.float64)
        losses = (model(*batch) - batch[0].flip(0)).square().flatten(1).mean(1)
        params = dict(model.named_parameters())
        rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
        g = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        generator = torch.Generator().manual_seed(2)
        u = {name: torch.randn(p.shape, generator=generator).to(dtype).to(device) for name, p in params.items()}
        along = torch.cat([u[name].double().flatten() for name in params])
        model.to(dtype)
        for direction in (None, u):
            with SampleGradients(model, direction, gram=direction is not None, diagonal=direction is None) as sg:
                x, t, label = batch_of(SIZE, samples, device, dtype)
                (model(x, t, label) - x.flip(0)).square().flatten(1).mean(1).sum().backward()
            mean = torch.cat([sg.mean[name].flatten() for name in params])
            found = {"sq_norms": (sg.sq_norms, g.square().sum(1)), "mean": (mean, g.mean(0))}
            if direction is None:
                diagonal = torch.cat([sg.diagonal[name].flatten() for name in params])
                found |= {"projections": (sg.projections, g @ g.mean(0)), "diagonal": (diagonal, g.square().mean(0))}
            else:
                found |= {"directions": (sg.projections, g @ along), "gram": (sg.gram, g @ g.T)}
            for name, (actual, expected) in found.items():
                scale = expected.abs().max() if name != "directions" else g.norm(dim=1).max() * along.norm()
                key = f"{name}, {dtype}"
                worst[key] = require_close(f"SampleGradients: {key}", actual, expected, scale, bound)
    return {"largest_errors": worst}


def calls_on(model: nn.Module, samples: int, size: int) -> dict[str, Callable[[], object]]:
    """A backward pass, and the same in SampleGradients: on the batch's own mean, and on one direction."""
    from crl_kernels import SampleGradients

    parameter = next(model.parameters())
    batch = batch_of(size, samples, str(parameter.device), parameter.dtype)
    u = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}

    def step() -> None:
        model.zero_grad()
        losses_of(model, *batch).sum().backward()

    def statistics_of(**options: Any) -> None:
        model.zero_grad()
        with SampleGradients(model, **options):
            step()

    return {
        "forward + backward": step,
        "SampleGradients": statistics_of,
        "SampleGradients, a direction": lambda: statistics_of(direction=u),
    }


def sample_gradients_speed(device: str, small: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of SampleGradients beside plain forward + backward, on a UNet."""
    from .sample_gradient_models import SIZE, UNet

    found: dict[str, Any] = {}
    widths, samples, rounds = ((8, 8, 16), 2, 1) if small else ((128, 256, 512), 64, 10)
    for dtype in (torch.float32, torch.bfloat16):
        model = UNet(widths).to(dtype).to(device)
        rows: dict[str, Any] = {}
        for name, call in calls_on(model, samples, SIZE).items():
            rows[name] = {"ms": timed(call, device, rounds), "peak_mib": None}
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call()
                rows[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            rows[name]["times_plain"] = rows[name]["ms"] / rows["forward + backward"]["ms"]
        parameters = sum(p.numel() for p in model.parameters())
        found[f"{parameters:,} parameters, {samples} samples, {dtype}"] = rows
    return found


def trainers(device: str, small: bool) -> dict[str, Any]:
    """What the penalty adds to a training step, by each way to put it there."""
    from .problem import Unavailable
    from .trainers import DEFAULT, measure

    rounds, passes = (2, 1) if small else (30, 10)
    found: dict[str, Any] = {}
    for name in ["transformer-tiny"] if small else DEFAULT:
        try:
            found[name] = measure(name, rounds, passes, device)
        except Unavailable as reason:
            found[name] = {"skipped": str(reason)}
    return found


STAGES = {
    "correctness": correctness,
    "races": races,
    "large": large,
    "graphs": graphs,
    "compilation": compilation,
    "roofline": roofline,
    "training_step": training_step,
    "optimizer": optimizer,
    "trainers": trainers,
    "sample_operators": sample_operators,
    "sample_gradients": sample_gradients,
    "sample_gradients_speed": sample_gradients_speed,
}


# One process for each stage and backend


def run_stage(name: str, device: str, small: bool) -> None:
    """Prints what happened as one line of JSON."""
    import crl_kernels  # noqa: F401  (defines the operators; raises where the backend cannot run)

    try:
        result = {"status": "ok", "result": STAGES[name](device, small)}
    except NeedsGpu as reason:
        result = {"status": "not run", "reason": f"needs {reason}"}
    print(json.dumps(result))


def in_its_own_process(name: str, backend: str, small: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, *(["--dry-run"] if small else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"CRL_KERNELS_BACKEND": backend},
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_STAGE,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {SECONDS_PER_STAGE} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not last.startswith("{"):
        told = done.stderr.strip().splitlines()
        return {
            "status": "failed",
            "reason": told[-1] if told else f"exit status {done.returncode}",
            "stderr": told[-40:],
        }
    result: dict[str, Any] = json.loads(last)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def machine(small: bool) -> dict[str, Any]:
    facts = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    if small:
        return facts | {"device": "dry run on a CPU"}
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": asked.stdout.strip(),
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
    }


def build_where_missing() -> None:
    """The CUDA library of this source tree, for the GPU that is here."""
    if list((ROOT / "crl_kernels").glob("_C_cuda*.so")):
        return
    major, minor = torch.cuda.get_device_capability()
    options = {"CRL_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=os.environ | options, check=True
    )


def markdown(record: dict[str, Any]) -> str:
    from .trainers import table

    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [
        f"# GPU: correctness and speed\n\n`python -m benchmarks.gpu`, {facts}.\n",
        "| backend | stage | status | |",
        "|---|---|---|---|",
    ]
    for key, stage in record["stages"].items():
        backend, _, name = key.partition(": ")
        lines.append(f"| {backend} | {name} | {stage['status']} | {stage.get('reason', '')} |")
    for key, stage in record["stages"].items():
        if stage["status"] != "ok" or not key.endswith("sample_gradients_speed"):
            continue
        for size, rows in stage["result"].items():
            lines += ["", f"## {key}, {size}", "", "| | ms | × plain | peak MiB |", "|---|---|---|---|"]
            for name, row in rows.items():
                memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
                lines.append(f"| {name} | {row['ms']:.2f} | {row['times_plain']:.2f} | {memory} |")
    for key, stage in record["stages"].items():
        if stage["status"] == "ok" and key.endswith("optimizer"):
            numel = stage["result"]["parameters"]
            lines += ["", f"## {key}, {numel:,} parameters", "", "| | ms | × AdamW(fused=True) |", "|---|---|---|"]
            for name, row in stage["result"]["times"].items():
                lines.append(f"| {name} | {row['ms']:.3f} | {row['times_adamw']:.2f} |")
    for key, stage in record["stages"].items():
        if stage["status"] == "ok" and key.endswith("trainers"):
            for name, part in stage["result"].items():
                lines += ["", f"## {key}, {name}", "", *([part["skipped"]] if "skipped" in part else table(part))]
    for key, stage in record["stages"].items():
        if stage["status"] != "ok" or not key.endswith("roofline"):
            continue
        for size, rows in stage["result"].items():
            lines += ["", f"## {key}, {size}", "", "| | ms | GB/s | of copy |", "|---|---|---|---|"]
            for name, row in rows.items():
                cells = (
                    f"{row['ms']:.3f} | {row['gb_per_s']:.0f} | {100 * row['share_of_copy']:.0f} %"
                    if "ms" in row
                    else f"{row['skipped']} | |"
                )
                lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the same code on a CPU, with small sizes")
    parser.add_argument("--stage", choices=STAGES, help="run one stage in this process")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md (default: print only)")
    arguments = parser.parse_args()
    small = arguments.dry_run
    if arguments.stage:
        run_stage(arguments.stage, "cpu" if small else "cuda", small)
        return 0
    if not small and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --dry-run walks the code on a CPU.")
    if not small:
        build_where_missing()
    record: dict[str, Any] = {"machine": machine(small), "stages": {}}
    for backend in ("auto",) if small else BACKENDS:
        for name in STAGES:
            record["stages"][f"{backend}: {name}"] = found = in_its_own_process(name, backend, small)
            print(f"{backend}: {name}: {found['status']} {found.get('reason', '')}", flush=True)
    print(markdown(record))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.out / "gpu.md").write_text(markdown(record))
    return 1 if any(stage["status"] == "failed" for stage in record["stages"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
