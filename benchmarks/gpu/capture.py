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


def optimizer_graphs(device: str, small: bool) -> dict[str, Any]:
    """Replays of FusedAdamW's step equal eager steps, with another rate, strength and gradient in each."""
    if device != "cuda":
        raise NeedsGpu("CUDA graphs")
    import crl_kernels as ck

    from ..common.problem import Problem

    cases = [(kind, decoupled) for kind in ("rank1_history", "diagonal_history") for decoupled in (False, True)]
    for kind, decoupled in cases:
        problems = [Problem(1_000_000, 100, device) for _ in range(2)]
        lr, lam = (torch.full((), value, dtype=torch.float64, device=device) for value in (1e-3, 0.5))
        optimizers = [
            ck.FusedAdamW(
                problem.params, lr=rate, history=getattr(problem, kind), lam=strength, decoupled=decoupled,
                capturable=True,
            )
            for problem, rate, strength in zip(problems, (1e-3, lr), (0.5, lam), strict=True)
        ]  # fmt: skip
        eager, captured = optimizers
        graph = torch.cuda.CUDAGraph()
        for step in range(6):
            rate, strength = 1e-3 / (1 + step), 0.5 + step
            eager.param_groups[0]["lr"], eager.lam = rate, strength
            lr.fill_(rate)
            lam.fill_(strength)
            for problem in problems:
                generator = torch.Generator(device).manual_seed(step)
                for gradient in problem.grads:
                    gradient.normal_(generator=generator)
            eager.step()
            if step == 0:
                captured.step()
            else:
                if step == 1:
                    with torch.cuda.graph(graph):  # runs nothing
                        captured.step()
                graph.replay()
            pairs = zip(problems[0].params, problems[1].params, strict=True)
            same = all(torch.equal(first, second) for first, second in pairs)
            if not same or not torch.equal(eager.last_penalty, captured.last_penalty):
                raise AssertionError(f"step {step}: a replay differs from eager mode ({kind}, decoupled={decoupled})")
    return {"cases": len(cases)}


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
