"""``pytest benchmarks``: rank-1 against diagonal EWC, in one flat tensor and in 100, and that all compute the same."""

import pytest
import torch

from ..common import command
from ..common.problem import LAM, Problem, Unavailable
from .contenders import CONTENDERS
from .operators import OPERATORS

NUMEL = 2_500_000
command.require_kernels()


def call_of(contender, problem):
    try:
        return contender.make(problem)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("tensors", [1, 100], ids=["flat", "100-tensors"])
@pytest.mark.parametrize("name", CONTENDERS | OPERATORS)
def test_value_and_gradient(benchmark, name, tensors):
    if "torch.compile" in name and tensors > 1:
        pytest.skip("to compile a graph of 100 tensors takes 45 s: python -m benchmarks.penalty does it")
    torch.set_num_threads(1)
    problem = Problem(NUMEL, tensors)
    call = call_of((CONTENDERS | OPERATORS)[name], problem)
    benchmark.group = f"penalty value + gradient, {NUMEL:,} parameters, {tensors} tensor(s), one thread"
    benchmark.extra_info["state bytes per parameter"] = (CONTENDERS | OPERATORS)[name].state
    benchmark.pedantic(call, rounds=10, warmup_rounds=2, iterations=1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [*problem.params, *problem.grads])


@pytest.mark.parametrize("name", [name for name, contender in CONTENDERS.items() if contender.penalty])
def test_contenders_compute_the_same_penalty(name):
    """Value and gradient against float64, because a contender that computes less is not faster."""
    problem, contender = Problem(10_000, 7), CONTENDERS[name]
    call = call_of(contender, problem)
    value = call().detach().double()
    theta = torch.cat([parameter.detach() for parameter in problem.params]).double()
    expected, expected_gradient = 0.0, torch.zeros_like(theta)
    for task in problem.first_tasks(contender.tasks):
        distance = theta - task.anchor
        u, fisher = task.direction.double(), task.fisher.double()
        weighted = u * (u @ distance) if contender.penalty == "rank-1" else fisher * distance
        expected = expected + 0.5 * LAM * (weighted @ distance)
        expected_gradient += LAM * weighted
    rtol = 0.02 if "bf16" in name else 1e-4
    gradient = torch.cat([grad.flatten() for grad in problem.grads]).double()
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) <= rtol
