"""``python -m benchmarks.optimizer``: a step of FusedAdamW with a penalty inside, beside torch's AdamW(fused=True)
without one, with ``add_penalty_grad_`` before it, and with a Python loop for diagonal EWC.

The steps take turns; times are medians, and ratios are taken within the same rounds. With one thread the clock is
process CPU time; with more it is wall time. All optimizers share their gradients. ``limit`` is the ratio of the bytes
that a step has to move. A core that waits for its reads rather than for the memory's bandwidth, as one core alone often
does, pays more for reading than for writing, and AdamW's 28 bytes are 16 read and 12 written. So one row reads one more
float32 vector after the step, to compare a float32 term with.

``--channels-last`` measures something else: steps on convolution weights (..., 64, 3, 3) in channels_last, beside
the same steps on the same weights in row-major order; each round places all tensors anew. A list costs time
for each tensor, so more tensors of the same size in all are measured too.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import crl_kernels as ck
from crl_kernels.backends import registry
from crl_kernels.backends.int8 import LONGEST_BLOCK, quantised, scales_shape

from .common import allocator, command
from .common.measure import clock, commit, interleaved, percentiles, require_memory
from .common.problem import Problem
from .penalty import peers
from .penalty.contenders import CONTENDERS

ADAMW, LOOP = "AdamW(fused=True)", "AdamW(fused=True) + diagonal, Python loop"
READ = "AdamW(fused=True), then one vector read"
ADAMW_BYTES = 28  # theta, m and v are read and written, the gradient is read
INT8_BYTES = 1 + 4 / LONGEST_BLOCK  # of an element, with its share of a scale
LAM = 1.0
KERNEL = (64, 3, 3)  # of the convolutions that --channels-last measures
TARGETS = {"one term": 1.20, "Python loop": 4.0}
BYTES = 514  # per parameter, all rows together


class Model(nn.Module):
    """Parameters of one optimizer, because FusedAdamW notices writes by others; the gradients are the problem's, or
    copies of them in a memory format."""

    def __init__(self, problem: Problem, memory_format: torch.memory_format | None = None) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameter.detach().clone() for parameter in problem.params)
        for parameter, gradient in zip(self.held, problem.grads, strict=True):
            if memory_format is not None:
                weight, gradient = (
                    tensor.view(-1, *KERNEL).clone(memory_format=memory_format) for tensor in (parameter.data, gradient)
                )
                parameter.data = weight
            parameter.grad = gradient


def low_rank_history(model: nn.Module, terms: int, dtype: torch.dtype) -> ck.LowRankHistory:
    """Directions like noise, set from a state: appending tasks would take three times as much memory. For int8,
    parameters become matrices first, with rows of one block: in a vector every element would be a block."""
    for parameter in model.parameters() if dtype == torch.int8 else ():
        blocks = scales_shape((1, parameter.numel()))[1]
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.view(blocks, -1)
        parameter.grad = None if gradient is None else gradient.view(blocks, -1)
    history = ck.LowRankHistory(model)
    state = {"curvatures": torch.ones(terms).double(), "anchor_projections": torch.zeros(terms).double()}
    for k in range(terms):
        for name, parameter in model.named_parameters():
            direction = parameter.detach().flatten().roll(k).view(parameter.shape) / 1000
            if dtype == torch.int8:
                state[f"directions.{k}.{name}"], state[f"scales.{k}.{name}"] = quantised(direction)
            else:
                state[f"directions.{k}.{name}"] = direction.to(dtype)
    history.load_state_dict(state | {"num_tasks": torch.tensor(terms)})
    return history


def diagonal_history(model: nn.Module) -> ck.DiagonalHistory:
    history = ck.DiagonalHistory(model)
    state = {"residual": torch.zeros((), dtype=torch.float64), "num_tasks": torch.tensor(1)}
    for name, parameter in model.named_parameters():
        state |= {f"fisher_diagonal.{name}": torch.rand_like(parameter), f"anchor.{name}": parameter.detach() + 0.01}
    history.load_state_dict(state)
    return history


# (name, bytes per parameter beyond AdamW's: inside, and before it; how to make the history)
HISTORIES = (
    ("one term, fp32", 4, 20, lambda model: low_rank_history(model, 1, torch.float32)),
    ("one term, bf16", 2, 16, lambda model: low_rank_history(model, 1, torch.bfloat16)),
    ("one term, int8", INT8_BYTES, 12 + 2 * INT8_BYTES, lambda model: low_rank_history(model, 1, torch.int8)),
    ("3 terms, fp32", 12, 36, lambda model: low_rank_history(model, 3, torch.float32)),
    ("10 terms, fp32", 40, 92, lambda model: low_rank_history(model, 10, torch.float32)),
    ("diagonal", 8, 20, diagonal_history),
)


def added_before(model: Model, history: ck.LowRankHistory | ck.DiagonalHistory) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        history.add_penalty_grad_(LAM)
        optimizer.step()

    return step


def steps_on(problem: Problem) -> dict[str, tuple[int, Callable[[], object]]]:
    """(bytes per parameter, step) by name."""
    for gradient in problem.grads:
        gradient.normal_(std=1e-3)
    adamw = torch.optim.AdamW(Model(problem).parameters(), fused=True)
    before_loop = torch.optim.AdamW(problem.params, fused=True)
    penalize = peers.diagonal_python_loop(problem)

    def loop() -> None:
        penalize()
        before_loop.step()

    vector = torch.ones(problem.numel)

    def read() -> None:
        adamw.step()
        torch.dot(vector, vector)

    steps: dict[str, tuple[int, Callable[[], object]]] = {
        ADAMW: (ADAMW_BYTES, adamw.step),
        READ: (ADAMW_BYTES + 4, read),
        "FusedAdamW, no penalty": (ADAMW_BYTES, ck.FusedAdamW(Model(problem).parameters()).step),
    }
    for name, inside, before, make in HISTORIES:
        for mode in ("gradient", "decoupled"):
            model = Model(problem)
            optimizer = ck.FusedAdamW(model.parameters(), history=make(model), lam=LAM, decoupled=mode == "decoupled")
            steps[f"FusedAdamW, {name}, {mode}"] = (ADAMW_BYTES + inside, optimizer.step)
        model = Model(problem)
        steps[f"{ADAMW}, add_penalty_grad_, {name}"] = (ADAMW_BYTES + before, added_before(model, make(model)))
    steps[LOOP] = (ADAMW_BYTES + CONTENDERS["diagonal, Python loop"].bytes, loop)
    return steps


def steps_in(problem: Problem, memory_format: torch.memory_format) -> dict[str, Callable[[], object]]:
    """Steps with one task on convolution weights in this memory format, by name."""
    steps: dict[str, Callable[[], object]] = {}
    for kind in ("one term, fp32", "10 terms, fp32", "diagonal"):
        (make,) = (history[3] for history in HISTORIES if history[0] == kind)
        model = Model(problem, memory_format)
        history = make(model)
        steps[f"add_penalty_grad_, {kind}"] = partial(history.add_penalty_grad_, 1e-3)
        steps[f"decoupled_step_, {kind}"] = partial(history.decoupled_step_, 1e-3, 1e-3)
        moved = Model(problem, memory_format)
        steps[f"FusedAdamW, {kind}"] = ck.FusedAdamW(moved.parameters(), history=make(moved), lam=LAM).step
    return steps


MORE_TENSORS = 7  # times as many, and a seventh as large
REPEATS = 3  # of each step in a round of --channels-last


def seconds_in_both_orders(problem: Problem, rounds: int) -> dict[tuple[str, bool], list[float]]:
    """By step, and whether in channels_last. Where tensors happen to lie changes a step's time by more than their order
    does, so each round places all of them anew, every other one row-major tensors first."""
    seconds: dict[tuple[str, bool], list[float]] = {}
    formats = [torch.contiguous_format, torch.channels_last]
    for round_ in range(rounds):
        _shift = torch.empty(round_ * 100_003)  # held, so that the tensors below lie elsewhere
        steps = {f: steps_in(problem, f) for f in (formats if round_ % 2 else reversed(formats))}
        calls = {(name, f is torch.channels_last): step for f in formats for name, step in steps[f].items()}
        for key, times in interleaved(calls, REPEATS, clock()).items():
            seconds.setdefault(key, []).extend(times)
    return seconds


def measure_channels_last(numel: int, tensors: int, rounds: int) -> dict[str, Any]:
    """Of at most so many parameters, in so many tensors and in more: each tensor has whole kernels."""
    rows = []
    for number in (tensors, MORE_TENSORS * tensors):
        each = max(1, numel // (number * math.prod(KERNEL))) * math.prod(KERNEL)
        require_memory(number * each * BYTES, torch.device("cpu"))
        problem = Problem(number * each, number)
        for gradient in problem.grads:
            gradient.normal_(std=1e-3)
        seconds = seconds_in_both_orders(problem, rounds)
        for name in dict.fromkeys(name for name, _ in seconds):
            times = seconds[name, False], seconds[name, True]
            ratios = [b / a for a, b in zip(*times, strict=True)]
            ratio = {key.replace("ms", "ratio"): value / 1e3 for key, value in percentiles(ratios).items()}
            parameters = {"tensors": number, "parameters": problem.numel}
            rows.append(
                {"name": name, **parameters, "row_major": percentiles(times[0]), **percentiles(times[1]), **ratio}
            )
    return head(numel, tensors, rounds) | {"tensors": f"{tensors} and {MORE_TENSORS * tensors}", "rows": rows}


def measure(numel: int, tensors: int, rounds: int) -> dict[str, Any]:
    require_memory(numel * BYTES, torch.device("cpu"))
    problem = Problem(numel, tensors)
    steps = steps_on(problem)
    seconds = interleaved({name: call for name, (_, call) in steps.items()}, rounds, clock())

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))

    rows = [
        {
            "name": name,
            "bytes_per_parameter": bytes_,
            "limit": bytes_ / ADAMW_BYTES,
            "times_adamw": ratio(name, ADAMW),
            "loop_over_this": ratio(LOOP, name),
            **percentiles(seconds[name]),
        }
        for name, (bytes_, _) in steps.items()
    ]
    return head(numel, tensors, rounds) | {"rows": rows}


def head(numel: int, tensors: int, rounds: int) -> dict[str, Any]:
    return {
        **command.record_head("optimizer"),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "clock": "process CPU" if clock() is time.process_time else "wall",
        "torch": torch.__version__,
        "kernels": registry.implementation("cpu", "low_rank_adamw_"),
        "parameters": numel,
        "tensors": tensors,
        "rounds": rounds,
    }


def conditions(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}`, {result['date']}, commit {result['commit']}, {result['machine']}, "
        f"{result['threads']} thread(s), {result['clock']} time, torch {result['torch']}, {result['kernels']} kernels; "
        f"{result['parameters']:,} float32 parameters in {result['tensors']} tensors; median [20th, 80th percentile] "
        f"of {result['rounds']} rounds.\n"
    )


def channels_last_markdown(result: dict[str, Any]) -> str:
    lines = ["# Steps in channels_last\n", conditions(result)]
    lines += [f"Each round places all tensors anew and has {REPEATS} steps of each kind.\n"]
    lines += ["| tensors | step | row-major, ms | channels_last, ms | channels_last / row-major |"]
    lines += ["|--:|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['tensors']} | {row['name']} | {row['row_major']['ms']:.1f} | {row['ms']:.1f} "
            f"[{row['ms_p20']:.1f}, {row['ms_p80']:.1f}] | {row['ratio']:.2f} "
            f"[{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}] |"
        )
    return "\n".join(lines) + "\n"


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# A step of AdamW with an EWC penalty inside\n",
        conditions(result),
        f"Limit: bytes that the step has to move, over AdamW's {ADAMW_BYTES}. Targets: one rank-1 term at most "
        f"{TARGETS['one term']:.2f} times AdamW(fused=True), and {TARGETS['Python loop']:.0f} times faster than the "
        "Python loop.\n",
        "| step | ms | bytes / parameter | limit | × AdamW(fused=True) | Python loop / this |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['name']} | {row['ms']:.1f} [{row['ms_p20']:.1f}, {row['ms_p80']:.1f}] "
            f"| {row['bytes_per_parameter']} | {row['limit']:.2f} | {row['times_adamw']:.2f} "
            f"| {row['loop_over_this']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command.parser("optimizer", __doc__, "optimizer_cpu_Nthread.json and .md")
    parser.add_argument("--parameters", type=command.count, default=25_000_000)
    parser.add_argument("--tensors", type=command.count, default=100)
    parser.add_argument("--rounds", type=command.count, default=15)
    parser.add_argument("--threads", type=command.count, default=1)
    parser.add_argument("--channels-last", action="store_true", help="only steps in channels_last and in row-major")
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(arguments.threads)
    allocator.keep_freed_memory()
    sizes = arguments.parameters, arguments.tensors, arguments.rounds
    stem = f"cpu_{arguments.threads}thread"
    if arguments.channels_last:
        result, stem = measure_channels_last(*sizes), f"optimizer_channels_last_{stem}"
        table = channels_last_markdown(result)
    else:
        result, stem = measure(*sizes), f"optimizer_{stem}"
        table = markdown(result)
    print(table)
    command.write(arguments.out, stem, result, table)


if __name__ == "__main__":
    main()
