"""The operators in races, and on more than 2^31 elements."""

import math
from typing import Any

import torch

from . import needs


def races(device: str, small: bool) -> dict[str, Any]:
    """Bitwise equality: from run to run, flat against list, int8 against float32, and with two streams at once."""
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
    # Blocks of whole octets, or, after an odd length, that end within octets.
    for lengths in ([p.numel() for p in params], [127, *(p.numel() for p in params[1:])]):
        theta = [p.flatten()[:n] for p, n in zip(params, lengths, strict=True)]
        q = [torch.randint(-127, 128, (n,), dtype=torch.int8, device=device) for n in lengths]
        scales = [torch.full((math.gcd(n, 1000),), 2.0**-9, device=device) for n in lengths]
        values = [piece * 2.0**-9 for piece in q]
        plain = ops.low_rank_projections(theta, values, 1)
        for _ in range(repeats):
            if not torch.equal(ops.low_rank_projections(theta, [*q, *scales], 1), plain):
                raise AssertionError("projections of int8 directions differ from run to run, or from those of float32")
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
    numel = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 7 * numel:
        raise needs.Needs(f"{7 * numel / 2**30:.0f} GiB of free memory")
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
