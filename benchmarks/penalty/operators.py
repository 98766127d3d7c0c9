"""The operators alone and the decoupled steps, called as the library calls them, with the bytes that they must move."""

from collections.abc import Callable

import torch

from ..common.problem import LAM, TASKS, Problem
from .contenders import Contender, Make

ops = torch.ops.crl_kernels


def low_rank(terms: int, dtype: torch.dtype, call: Callable[..., object]) -> Make:
    """``call(problem, params, directions, coefficients)``, with K directions of a dtype."""

    def make(problem: Problem) -> Callable[[], object]:
        directions = problem.directions(terms, dtype)
        coefficients = torch.full((terms,), 1e-6, dtype=torch.float64, device=problem.device)
        params = [parameter.detach() for parameter in problem.params]
        return lambda: call(problem, params, directions, coefficients)

    return make


def diagonal(call: Callable[..., object]) -> Make:
    """``call(problem, params, fisher, anchor, coefficient)``."""

    def make(problem: Problem) -> Callable[[], object]:
        params = [parameter.detach() for parameter in problem.params]
        state = [problem.task.fisher], [problem.task.anchor]
        return lambda: call(problem, params, *state, problem.scalar(1e-6))

    return make


def decoupled(history: Callable[[Problem], object]) -> Make:
    """The rate is so small that the parameters keep their values for the other rows; the traffic is the same."""

    def make(problem: Problem) -> Callable[[], object]:
        bound = history(problem)
        return lambda: bound.decoupled_step_(LAM, 1e-20)

    return make


def _rows() -> dict[str, Contender]:
    rows = {}

    def row(name: str, make: Make, traffic: dict[str, int], memory: int, tasks: int = 1) -> None:
        rows[name] = Contender("", make, traffic, 0, memory, "this library", tasks)

    labels = [(1, torch.float32, ""), (1, torch.bfloat16, ", bf16")]
    labels += [(TASKS, torch.float32, f", {TASKS} terms"), (TASKS, torch.bfloat16, f", bf16, {TASKS} terms")]
    for terms, dtype, label in labels:
        memory = dtype.itemsize * terms + 4
        u = {f"{terms} u" if terms > 1 else "u": dtype.itemsize * terms}
        twice = {f"{name} twice": 2 * bytes_ for name, bytes_ in u.items()}
        both = {"theta": 4} | twice | {"gradient read and written": 8}
        row(
            "low_rank_projections" + label,
            low_rank(terms, dtype, lambda problem, params, u, c: ops.low_rank_projections(params, u, len(c))),
            {"theta": 4} | u,
            memory,
            terms,
        )
        row(
            "low_rank_accumulate_" + label,
            low_rank(terms, dtype, lambda problem, params, u, c: ops.low_rank_accumulate_(problem.grads, u, c)),
            u | {"gradient read and written": 8},
            memory,
            terms,
        )
        row(
            "low_rank_combine" + label,
            low_rank(terms, dtype, lambda problem, params, u, c: ops.low_rank_combine(u, c, params)),
            u | {"result": 4},
            memory,
            terms,
        )
        row(
            "low_rank_penalty_accumulate_" + label,
            low_rank(
                terms,
                dtype,
                lambda problem, params, u, c: ops.low_rank_penalty_accumulate_(problem.grads, params, u, c, c, c[0]),
            ),
            both,
            memory,
            terms,
        )
    three = {"theta": 4, "S": 4, "m": 4}
    row(
        "diagonal_quadratic",
        diagonal(lambda problem, params, s, m, c: ops.diagonal_quadratic(params, s, m)),
        three,
        0,
    )
    row(
        "diagonal_gradient",
        diagonal(lambda problem, params, s, m, c: ops.diagonal_gradient(params, s, m, c)),
        three | {"result": 4},
        4,
    )
    row(
        "diagonal_accumulate_",
        diagonal(lambda problem, params, s, m, c: ops.diagonal_accumulate_(problem.grads, params, s, m, c)),
        three | {"gradient read and written": 8},
        0,
    )
    row(
        "diagonal_shrink_",
        diagonal(lambda problem, params, s, m, c: ops.diagonal_shrink_(params, s, m, c)),
        {"theta read and written": 8, "S": 4, "m": 4},
        0,
    )
    row(
        "LowRankHistory.decoupled_step_",
        decoupled(lambda problem: problem.rank1_history),
        {"theta read twice and written": 12, "u twice": 8},
        10,
    )
    row(
        "DiagonalHistory.decoupled_step_",
        decoupled(lambda problem: problem.diagonal_history),
        {"theta read and written": 8, "S": 4, "m": 4},
        16,
    )
    return rows


OPERATORS = _rows()
