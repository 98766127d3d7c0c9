"""On a GPU: steps that do not wait for the device, CUDA graphs of a step, and compiled code in a graph."""

import pytest
import torch
from helpers import device, past_tasks
from torch import Tensor, nn

from crl_kernels import rank1_ewc_penalty

pytestmark = pytest.mark.skipif(device.type_() != "cuda", reason="needs a GPU")
KINDS = pytest.mark.parametrize("kind", past_tasks.HISTORIES)


def step_of(kind: str):
    """(parameters, a step of the penalty in both ways); gradients keep their memory."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(100)))
    history = past_tasks.history_of(model, kind)
    params = list(model.parameters())
    for p in params:
        p.grad = torch.zeros_like(p)

    def step() -> Tensor:
        value = history.add_penalty_grad_(0.5)
        history.decoupled_step_(0.5, 0.1)
        return value

    step()
    torch.cuda.synchronize()
    return params, step


@KINDS
def test_a_step_does_not_wait_for_the_device(kind):
    _, step = step_of(kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(1_000_000_000)  # keeps the device busy for half a second
    step()
    done = torch.cuda.Event()
    done.record()
    assert not done.query()


@KINDS
def test_replays_are_eager_steps(kind):
    params, step = step_of(kind)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        results = []
        for replay in (False, True):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in params:
                    p.copy_(torch.randn(p.shape, generator=generator))
                    p.grad.zero_()
            if replay:
                graph.replay()
            value = captured if replay else step()
            results.append([value.clone(), *(p.detach().clone() for p in params), *(p.grad.clone() for p in params)])
        assert all(map(torch.equal, *results))


def test_compiled_code_that_records_graphs():
    theta, u, anchor = torch.randn(3, 1000, dtype=torch.float64)
    theta.requires_grad_()

    def penalty(x: Tensor) -> Tensor:
        return rank1_ewc_penalty(x.sin(), direction=u, curvature=0.7, anchor=anchor, lam=3.0)

    compiled = torch.compile(penalty, fullgraph=True, mode="reduce-overhead")
    expected = torch.autograd.grad(penalty(theta), theta)
    for _ in range(3):
        torch.testing.assert_close(torch.autograd.grad(compiled(theta), theta), expected)
