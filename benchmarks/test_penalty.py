"""``pytest benchmarks``: rank-1 against diagonal EWC, in one flat tensor and in 100."""

import pytest
import torch

from .contenders import CONTENDERS, Problem

NUMEL = 2_500_000


@pytest.mark.parametrize("tensors", [1, 100], ids=["flat", "100-tensors"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_value_and_gradient(benchmark, name, tensors):
    torch.set_num_threads(1)
    problem = Problem(NUMEL, tensors)
    call = CONTENDERS[name].make(problem)
    benchmark.group = f"penalty value + gradient, {NUMEL:,} parameters, {tensors} tensor(s), one thread"
    benchmark.extra_info["state bytes per parameter"] = CONTENDERS[name].state_bytes
    value = benchmark.pedantic(call, rounds=10, warmup_rounds=2, iterations=1)
    assert bool(torch.isfinite(value))


def test_contenders_compute_the_same_penalty():
    """A contender that does less is not faster."""
    values, gradients = {}, {}
    for name, contender in CONTENDERS.items():
        problem = Problem(10_000, 7)
        values[name] = contender.make(problem)().detach()
        gradients[name] = torch.cat([parameter.grad for parameter in problem.params])
    for reference, like in (("rank-1, the paper's way", "rank-1"), ("diagonal, Python loop", "diagonal")):
        for name in CONTENDERS:
            if name.startswith(like) and "10 terms" not in name:
                rtol = 0.02 if "bf16" in name else 1e-3
                torch.testing.assert_close(values[name], values[reference], rtol=rtol, atol=0)
                error = (gradients[name] - gradients[reference]).norm() / gradients[reference].norm()
                assert float(error) <= rtol
