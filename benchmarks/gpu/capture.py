"""CUDA graphs, torch.compile and gradcheck."""

from typing import Any

import torch
from torch import Tensor

from .checks import NeedsGpu


def graphs(device: str, small: bool) -> dict[str, Any]:
    """No synchronisation in a step; capture, and replay with other parameter values."""
    if device != "cuda":
        raise NeedsGpu("CUDA graphs")
    from ..common.problem import Problem

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
