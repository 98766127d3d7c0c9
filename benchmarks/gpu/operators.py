"""The penalty operators: on hostile lists of tensors, in races, and on more than 2^31 elements."""

from typing import Any

import torch
from torch import Tensor

from .checks import NeedsGpu, flat64, poison, require_backend, require_rounded, require_sum


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


def races(device: str, small: bool) -> dict[str, Any]:
    """Bitwise equality: from run to run, flat against list, and with two streams at once."""
    from ..common.problem import Problem

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
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(repeats if streams else 0):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.low_rank_projections(params, u, 2))
    if streams:
        torch.cuda.synchronize()
    if not all(torch.equal(x, first) for x in results):
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
        projection = torch.ops.crl_kernels.low_rank_projections(params, [u], 1)[0]
        if not float((projection - expected).abs()) <= 1e-6 * numel**0.5:
            raise AssertionError(f"projection is {float(projection)}, expected {float(expected)}")
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
