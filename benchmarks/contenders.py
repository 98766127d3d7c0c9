"""Ways to put an EWC penalty's value and gradient on top of a model's gradients, each as its authors write it.

Every contender gets the same parameters, P elements in N tensors, whose ``.grad`` is there already, as after a backward
pass. One call computes the penalty's value and adds its gradient to ``.grad``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import crl_kernels as ck

LAM = 15_000.0


@dataclass(frozen=True)
class Contender:
    """``make`` returns the call to be timed; ``state_bytes`` counts bytes of state per parameter, for one past task."""

    make: Callable[["Problem"], Callable[[], Tensor]]
    state_bytes: int
    what: str


class Problem(nn.Module):
    """P parameters in N equal tensors, and one past task: direction, mean gradient, diagonal Fisher, anchor."""

    def __init__(self, numel: int, tensors: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.anchor, direction, noise = (torch.randn(numel, generator=generator) for _ in range(3))
        self.direction = direction / direction.norm()
        self.fisher = direction.square()
        self.lengths = [len(part) for part in self.anchor.tensor_split(tensors)]
        self.params = nn.ParameterList((self.anchor + 0.01 * noise).split(self.lengths))
        for parameter in self.params:
            parameter.grad = torch.zeros_like(parameter)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: part for (name, _), part in zip(self.named_parameters(), flat.split(self.lengths), strict=True)}

    def low_rank_history(self, storage_dtype: torch.dtype = torch.float32, terms: int = 1) -> ck.LowRankHistory:
        history = ck.LowRankHistory(self)
        direction = {name: part[None] for name, part in self.named(self.direction).items()}
        fisher = ck.LowRankFisher(direction, torch.ones(1), self.named(self.anchor), storage_dtype=storage_dtype)
        for _ in range(terms):
            history.append(fisher)
        return history

    def diagonal_history(self) -> ck.DiagonalHistory:
        history = ck.DiagonalHistory(self)
        history.append(ck.DiagonalFisher(self.named(self.fisher), self.named(self.anchor)))
        return history


def dot_and_axpy(problem: Problem) -> Callable[[], Tensor]:
    """The memory limit: one dot product and one axpy over flat buffers, which know nothing of lists or penalties."""
    theta, gradient = problem.anchor.clone(), torch.zeros_like(problem.anchor)

    def call() -> Tensor:
        value = torch.dot(theta, problem.direction)
        gradient.add_(problem.direction, alpha=0.5)
        return value

    return call


def rank1_in_place(storage_dtype: torch.dtype, terms: int = 1) -> Callable[[Problem], Callable[[], Tensor]]:
    def make(problem: Problem) -> Callable[[], Tensor]:
        history = problem.low_rank_history(storage_dtype, terms)
        return lambda: history.add_penalty_grad_(LAM)

    return make


def rank1_autograd(problem: Problem) -> Callable[[], Tensor]:
    history = problem.low_rank_history()

    def call() -> Tensor:
        value = ck.rank1_ewc_penalty(history, lam=LAM)
        value.backward()
        return value

    return call


def rank1_paper(problem: Problem) -> Callable[[], Tensor]:
    """The way of the paper's code: concatenate all parameters; subtract, multiply and sum; go back through autograd."""
    mean_gradient, coefficient = 3 * problem.direction, 1 / 9

    def call() -> Tensor:
        theta = torch.cat([parameter.reshape(-1) for parameter in problem.params])
        value = 0.5 * LAM * coefficient * ((theta - problem.anchor) * mean_gradient).sum() ** 2
        value.backward()
        return value

    return call


def diagonal_in_place(problem: Problem) -> Callable[[], Tensor]:
    history = problem.diagonal_history()
    return lambda: history.add_penalty_grad_(LAM)


def diagonal_autograd(problem: Problem) -> Callable[[], Tensor]:
    history = problem.diagonal_history()

    def call() -> Tensor:
        value = ck.diagonal_ewc_penalty(history, lam=LAM)
        value.backward()
        return value

    return call


def diagonal_python_loop(problem: Problem) -> Callable[[], Tensor]:
    """The way of most continual-learning libraries: a Python loop over the parameters, through autograd."""
    fisher, anchor = problem.fisher.split(problem.lengths), problem.anchor.split(problem.lengths)

    def call() -> Tensor:
        value = torch.zeros(())
        for parameter, f, m in zip(problem.params, fisher, anchor, strict=True):
            value = value + (f * (parameter - m) ** 2).sum()
        value = 0.5 * LAM * value
        value.backward()
        return value

    return call


CONTENDERS = {
    "dot + axpy, flat": Contender(dot_and_axpy, 4, "memory limit of value + gradient"),
    "rank-1, add_penalty_grad_": Contender(rank1_in_place(torch.float32), 4, "this library, float32 direction"),
    "rank-1, add_penalty_grad_, bf16": Contender(rank1_in_place(torch.bfloat16), 2, "this library, bfloat16 direction"),
    "rank-1, autograd": Contender(rank1_autograd, 4, "this library, rank1_ewc_penalty and backward"),
    "rank-1, 10 terms": Contender(rank1_in_place(torch.float32, 10), 40, "this library, ten past tasks"),
    "rank-1, the paper's way": Contender(rank1_paper, 8, "cat, sub, mul, sum, autograd"),
    "diagonal, add_penalty_grad_": Contender(diagonal_in_place, 8, "this library"),
    "diagonal, autograd": Contender(diagonal_autograd, 8, "this library, diagonal_ewc_penalty and backward"),
    "diagonal, Python loop": Contender(diagonal_python_loop, 8, "loop over parameters, autograd"),
}


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each call, one of each per round, so that the machine's moods meet all alike; the first is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, took in _one_round(calls, clock):
            if round_:
                seconds[name].append(took)
    return seconds


def _one_round(calls: dict[str, Callable[[], object]], clock: Callable[[], float]) -> Iterator[tuple[str, float]]:
    for name, call in calls.items():
        start = clock()
        call()
        yield name, clock() - start
