"""All rows of the table, with the bytes that each one moves and keeps.

``traffic`` names the bytes per parameter that a scheme's passes move. Every operand of every pass is counted once where
it is read and once where it is written, whatever caches save.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import crl_kernels as ck
from crl_kernels.backends import reference

from ..common.problem import LAM, TASKS, Problem
from . import peers

Make = Callable[[Problem], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    """``make(problem)`` returns the call to be timed. ``state`` is how many bytes per parameter the past tasks need;
    ``memory`` is how many ``make`` and the call need at most, beyond the problem's own."""

    penalty: str  # "rank-1" or "diagonal"; "" for yardsticks and operators
    make: Make
    traffic: dict[str, int]
    state: int
    memory: int
    description: str
    tasks: int = 1

    @property
    def bytes(self) -> int:
        return sum(self.traffic.values())

    @property
    def counted(self) -> str:
        return " + ".join(f"{name} {bytes_}" for name, bytes_ in self.traffic.items())


def copy(problem: Problem) -> Callable[[], Tensor]:
    return lambda: problem.scratch.copy_(problem.task.anchor)


def dot_and_axpy(problem: Problem) -> Callable[[], Tensor]:
    """The memory limit: one dot product and one axpy over flat buffers, without lists or penalties."""
    theta, direction, gradient = problem.task.anchor, problem.task.direction, problem.scratch

    def call() -> Tensor:
        value = torch.dot(theta, direction)
        gradient.add_(direction, alpha=0.5)
        return value

    return call


def foreach_add(problem: Problem) -> Callable[[], None]:
    """The overhead of one multi-tensor call over this list."""
    direction = problem.split(problem.task.direction)
    return lambda: torch._foreach_add_(problem.grads, direction, alpha=0.5)


def in_place(history: Callable[[Problem], ck.LowRankHistory | ck.DiagonalHistory]) -> Make:
    def make(problem: Problem) -> Callable[[], Tensor]:
        bound = history(problem)
        return lambda: bound.add_penalty_grad_(LAM)

    return make


def flattened(problem: Problem) -> Callable[[], Tensor]:
    """Changes the problem permanently: its parameters and gradients become views of two buffers."""
    ck.flatten_parameters(problem)
    problem.grads = [parameter.grad for parameter in problem.params]
    bound = problem.rank1_history
    return lambda: bound.add_penalty_grad_(LAM)


def through_autograd(
    penalty: Callable[..., Tensor], history: Callable[[Problem], ck.LowRankHistory | ck.DiagonalHistory]
) -> Make:
    def make(problem: Problem) -> Callable[[], Tensor]:
        bound = history(problem)

        def call() -> Tensor:
            value = penalty(bound, lam=LAM)
            value.backward()
            return value

        return call

    return make


def rank1_reference(problem: Problem) -> Callable[[], Tensor]:
    directions = [problem.task.direction]
    curvature, lam = problem.scalar(1.0)[None], problem.scalar(LAM)
    projection = reference.low_rank_projections([problem.task.anchor], directions, 1)
    penalty = torch.no_grad()(reference.low_rank_penalty_accumulate_)
    return lambda: penalty(problem.grads, problem.params, directions, curvature, projection, lam)


def diagonal_reference(problem: Problem) -> Callable[[], Tensor]:
    state, lam = ([problem.task.fisher], [problem.task.anchor]), problem.scalar(LAM)
    accumulate = torch.no_grad()(reference.diagonal_accumulate_)
    return lambda: 0.5 * LAM * accumulate(problem.grads, problem.params, *state, lam)


GRADIENT = {"gradient read and written": 8}
ACCUMULATED = {"autograd's accumulation": 12}
# One pass each: difference, square, product, sum; backward: product, power (three passes).
LOOP = {"theta - theta*": 12, "squared": 8, "times F": 12, "summed": 4, "backward": 36}


def ten_times(traffic: dict[str, int]) -> dict[str, int]:
    added = {"the tasks' gradients added up": 12 * (TASKS - 1)}
    return {f"{TASKS} x ({name})": TASKS * bytes_ for name, bytes_ in traffic.items()} | added


# Every row is compared with these, which are measured beside it.
YARDSTICKS = {
    "copy": Contender("", copy, {"x": 4, "y": 4}, 0, 4, "y.copy_(x), flat: the bandwidth of this machine"),
    "dot + axpy, flat": Contender(
        "", dot_and_axpy, {"theta": 4, "u twice": 8} | GRADIENT, 4, 4, "memory limit of value + gradient"
    ),
    "one torch._foreach_add_": Contender(
        "", foreach_add, {"u": 4} | GRADIENT, 0, 0, "overhead of one multi-tensor call over the list"
    ),
}

CONTENDERS = YARDSTICKS | {
    "rank-1, add_penalty_grad_": Contender(
        "rank-1",
        in_place(lambda problem: problem.rank1_history),
        {"theta": 4, "u twice": 8} | GRADIENT,
        4,
        10,
        "this library, float32 direction",
    ),
    "rank-1, add_penalty_grad_, bf16": Contender(
        "rank-1",
        in_place(lambda problem: problem.low_rank_history([problem.task], torch.bfloat16)),
        {"theta": 4, "u twice": 4} | GRADIENT,
        2,
        8,
        "this library, bfloat16 direction",
    ),
    "rank-1, add_penalty_grad_, flattened": Contender(
        "rank-1",
        flattened,
        {"theta": 4, "u twice": 8} | GRADIENT,
        4,
        18,
        "this library, after flatten_parameters",
    ),
    "rank-1, autograd": Contender(
        "rank-1",
        through_autograd(ck.rank1_ewc_penalty, lambda problem: problem.rank1_history),
        {"theta": 4, "u twice": 8, "its gradient": 4} | ACCUMULATED,
        4,
        12,
        "this library, rank1_ewc_penalty and backward",
    ),
    "rank-1, reference": Contender(
        "rank-1",
        rank1_reference,
        # to float64: theta, u twice, gradient; u theta, summed; c u, + 0, + gradient, back to float32
        {"to float64": 48, "u theta": 32, "c u": 32, "gradient": 36},
        4,
        64,
        "this library's definition in plain PyTorch, float64",
    ),
    "rank-1, foreach": Contender(
        "rank-1",
        peers.rank1_foreach,
        {"theta": 4, "u twice": 8} | GRADIENT,
        4,
        16,
        "plain PyTorch: a dot per tensor, torch._foreach_add_",
    ),
    "rank-1, torch.compile": Contender(
        "rank-1",
        peers.rank1_compiled,
        {"theta": 4, "u twice": 8} | GRADIENT,
        4,
        16,
        "plain PyTorch over the list, compiled",
    ),
    "rank-1, the paper's way": Contender(
        "rank-1",
        peers.rank1_paper,
        {"cat": 8, "theta - theta*": 12, "times mu": 12, "summed": 4, "backward": 8} | ACCUMULATED,
        8,
        16,
        "cat, sub, mul, sum, autograd",
    ),
    "rank-1, 10 terms": Contender(
        "rank-1",
        in_place(lambda problem: problem.low_rank_history(problem.tasks, torch.float32)),
        {"theta": 4, f"{TASKS} u twice": 8 * TASKS} | GRADIENT,
        4 * TASKS,
        4 * TASKS + 8,
        "this library, ten past tasks",
        TASKS,
    ),
    "rank-1, the paper's way, 10 tasks": Contender(
        "rank-1",
        partial(peers.rank1_paper, tasks=TASKS),
        {"cat": 8} | ten_times({"theta - theta*": 12, "times mu": 12, "summed": 4, "backward": 8}) | ACCUMULATED,
        8 * TASKS,
        16,
        "the same, ten past tasks",
        TASKS,
    ),
    "diagonal, add_penalty_grad_": Contender(
        "diagonal",
        in_place(lambda problem: problem.diagonal_history),
        {"theta": 4, "S": 4, "m": 4} | GRADIENT,
        8,
        16,
        "this library",
    ),
    "diagonal, autograd": Contender(
        "diagonal",
        through_autograd(ck.diagonal_ewc_penalty, lambda problem: problem.diagonal_history),
        {"theta twice": 8, "S twice": 8, "m twice": 8, "its gradient": 4} | ACCUMULATED,
        8,
        20,
        "this library, diagonal_ewc_penalty and backward",
    ),
    "diagonal, reference": Contender(
        "diagonal",
        diagonal_reference,
        # value: three to float64, three passes, sum. gradient: four to float64, difference, two products, sum, back
        {"value": 36 + 24 + 16 + 24 + 8, "gradient": 48 + 24 + 16 + 24 + 24 + 12},
        8,
        80,
        "this library's definition in plain PyTorch, float64",
    ),
    "diagonal, foreach": Contender(
        "diagonal",
        peers.diagonal_foreach,
        {"theta - theta*": 12, "times F": 12, "dot": 8, "axpy": 12},
        8,
        12,
        "plain PyTorch: torch._foreach_sub, mul, add_, a dot per tensor",
    ),
    "diagonal, torch.compile": Contender(
        "diagonal",
        peers.diagonal_compiled,
        {"theta": 4, "F": 4, "theta*": 4} | GRADIENT,
        8,
        16,
        "plain PyTorch over the list, compiled",
    ),
    "diagonal, Python loop": Contender(
        "diagonal", peers.diagonal_python_loop, LOOP | ACCUMULATED, 8, 16, "loop over parameters, autograd"
    ),
    "diagonal, Avalanche's EWCPlugin": Contender(
        "diagonal", peers.diagonal_avalanche, LOOP | ACCUMULATED, 8, 16, "avalanche-lib's own class, imported"
    ),
    "diagonal, 10 tasks": Contender(
        "diagonal",
        in_place(lambda problem: problem.appended_diagonal_history()),
        {"theta": 4, "S": 4, "m": 4} | GRADIENT,
        8,
        80,
        "this library, ten past tasks",
        TASKS,
    ),
    "diagonal, Python loop, 10 tasks": Contender(
        "diagonal",
        partial(peers.diagonal_python_loop, tasks=TASKS),
        ten_times(LOOP) | ACCUMULATED,
        8 * TASKS,
        80,
        "the same, ten past tasks",
        TASKS,
    ),
    "diagonal, Avalanche's EWCPlugin, 10 tasks": Contender(
        "diagonal",
        partial(peers.diagonal_avalanche, tasks=TASKS),
        ten_times(LOOP) | ACCUMULATED,
        8 * TASKS,
        80,
        "the same, ten past tasks (mode separate, its default)",
        TASKS,
    ),
}
