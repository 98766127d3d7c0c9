"""``python -m benchmarks.trainers``: what the penalty costs in a user's training step, for each API that adds it.

Models: the paper's UNet on images of 3 x 32 x 32, and a transformer of 25 M parameters, both predicting noise. A step
has two parts. The forward and backward pass is the same for all rows and timed separately. The update that follows is
AdamW(fused=True), alone or with the penalty. Each row's update takes turns with plain AdamW's, so a difference of a
thousandth of a step shows, although steps vary by more. accelerate and Hugging Face's Trainer use ``attach``.

State is what a history keeps. Optimizers keep AdamW's two moments in every row.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import crl_kernels as ck

from .common import allocator, command
from .common.measure import Call, clock, commit, interleaved, require_memory
from .common.problem import Task
from .optimizer import diagonal_history, low_rank_history
from .penalty import peers
from .sample_gradients.models import CLASSES, SIZE, TIMESTEPS, TINY, Diffusers, Transformer

LAM, LR = 1.0, 1e-4
BYTES = 120  # per parameter, of the row that needs most: two models, their moments, a loop's temporaries
History = ck.LowRankHistory | ck.DiagonalHistory


@dataclass(frozen=True)
class Subject:
    """A model, and the images of one of its steps, (N, C, S, S)."""

    make: Callable[[], nn.Module]
    images: tuple[int, int, int, int]


SUBJECTS = {
    "paper's UNet": Subject(lambda: Diffusers("paper", (3, 32, 32)), (8, 3, 32, 32)),
    "transformer": Subject(lambda: Transformer(512, 8, 8), (32, 1, SIZE, SIZE)),
    **{name: Subject(make, (2, 1, SIZE, SIZE)) for name, make in TINY.items()},
}
DEFAULT = ["paper's UNet", "transformer"]


# Where a penalty goes in a training step: (model, history) -> the update that follows the backward pass.

Placement = Callable[[nn.Module, History], Call]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def in_the_loss(model: nn.Module, history: History) -> Call:
    optimizer = adamw(model)
    penalty = ck.rank1_ewc_penalty if isinstance(history, ck.LowRankHistory) else ck.diagonal_ewc_penalty

    def update() -> None:
        penalty(history, lam=LAM).backward()  # adds to the gradients, as in one backward pass
        optimizer.step()

    return update


def in_the_gradient(model: nn.Module, history: History) -> Call:
    optimizer = adamw(model)

    def update() -> None:
        history.add_penalty_grad_(LAM)
        optimizer.step()

    return update


def after_the_step(model: nn.Module, history: History) -> Call:
    optimizer = adamw(model)

    def update() -> None:
        optimizer.step()
        history.decoupled_step_(LAM, optimizer.param_groups)

    return update


def attached(model: nn.Module, history: History, decoupled: bool = False) -> Call:
    optimizer = adamw(model)
    history.attach(optimizer, LAM, decoupled=decoupled)
    return optimizer.step


def inside(model: nn.Module, history: History, decoupled: bool = False) -> Call:
    return ck.FusedAdamW(model.parameters(), lr=LR, history=history, lam=LAM, decoupled=decoupled).step


def python_loop(model: nn.Module) -> Call:
    """Diagonal EWC as most libraries write it."""
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    lengths = [p.numel() for p in params]

    def split(values: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(values.split(lengths), params, strict=True)]

    task = Task(flat, flat.square(), flat.clone())
    problem = SimpleNamespace(device=flat.device, params=params, first_tasks=lambda count: [task], split=split)
    penalize = peers.diagonal_python_loop(problem)
    optimizer = adamw(model)

    def update() -> None:
        penalize()
        optimizer.step()

    return update


PLACEMENTS: dict[str, Placement] = {
    "rank1_ewc_penalty in the loss": in_the_loss,
    "add_penalty_grad_": in_the_gradient,
    "attach": attached,
    "FusedAdamW": inside,
    "decoupled_step_": after_the_step,
    "attach, decoupled": lambda model, history: attached(model, history, decoupled=True),
    "FusedAdamW, decoupled": lambda model, history: inside(model, history, decoupled=True),
}
DIAGONAL_PLACEMENTS: dict[str, Placement] = {
    "diagonal_ewc_penalty in the loss": in_the_loss,
    "add_penalty_grad_, diagonal": in_the_gradient,
    "FusedAdamW, diagonal": inside,
}
LOOP = "diagonal, a Python loop in the loss"
HISTORIES: dict[str, Callable[[nn.Module], History]] = {
    "1, fp32": lambda model: low_rank_history(model, 1, torch.float32),
    "1, bf16": lambda model: low_rank_history(model, 1, torch.bfloat16),
    "4, fp32": lambda model: low_rank_history(model, 4, torch.float32),
}


def rows_of(make: Callable[[], nn.Module]) -> Iterator[tuple[str, str, Call, int]]:
    """(placement, past tasks and dtype, update, bytes of state), made one after the other."""
    for tasks, history_of in HISTORIES.items():
        for name, placement in PLACEMENTS.items():
            history = history_of(model := make())
            yield name, tasks, placement(model, history), bytes_of(history)
    for name, placement in DIAGONAL_PLACEMENTS.items():
        history = diagonal_history(model := make())
        yield name, "any, fp32", placement(model, history), bytes_of(history)
    model = make()
    yield LOOP, "1, fp32", python_loop(model), 8 * sum(p.numel() for p in model.parameters())


def bytes_of(history: History) -> int:
    return sum(tensor.nbytes for tensor in history.state_dict().values())


def clock_of(device: str) -> Callable[[], float]:
    if device == "cpu":
        return clock()

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def measure(subject_name: str, rounds: int, passes: int, device: str = "cpu") -> dict[str, Any]:
    """Rows of one model; the forward and backward pass is taken ``passes`` times."""
    subject, timer = SUBJECTS[subject_name], clock_of(device)

    def with_gradients() -> nn.Module:
        model = subject.make().to(device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        return model

    model = with_gradients()
    numel = sum(p.numel() for p in model.parameters())
    require_memory(numel * BYTES, torch.device(device))
    x = torch.randn(subject.images, device=device)
    t, label = (torch.arange(len(x), device=device) % n for n in (TIMESTEPS, CLASSES))

    def forward_and_backward() -> None:
        (model(x, t, label) - x).square().mean().backward()

    seconds = interleaved({"": forward_and_backward}, passes, timer)
    common = statistics.median(seconds[""])
    plain = adamw(model).step
    rows, plain_seconds = [], []
    for name, tasks, update, state in rows_of(with_gradients):
        seconds = interleaved({"plain": plain, name: update}, rounds, timer)
        extra = statistics.median(a - b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        plain_seconds += seconds["plain"]
        rows.append({"way": name, "past_tasks": tasks, "extra_ms": 1e3 * extra, "state_bytes": state})
    step = common + statistics.median(plain_seconds)
    for row in rows:
        row["percent_of_step"] = 0.1 * row["extra_ms"] / step
        row["state_bytes_per_parameter"] = row["state_bytes"] / numel
    return {
        "model": subject_name,
        "parameters": numel,
        "tensors": len(list(model.parameters())),
        "images": subject.images,
        "rounds": rounds,
        "passes": passes,
        "forward_backward_ms": 1e3 * common,
        "adamw_ms": 1e3 * statistics.median(plain_seconds),
        "rows": rows,
    }


def table(part: dict[str, Any]) -> list[str]:
    """Lines of Markdown about one model."""
    lines = [
        f"{part['parameters']:,} parameters in {part['tensors']} tensors, images of "
        f"{' x '.join(map(str, part['images']))}. A step takes {part['forward_backward_ms']:.1f} ms forward and "
        f"backward (median of {part['passes']}) and {part['adamw_ms']:.2f} ms in AdamW (medians of {part['rounds']} "
        "rounds).",
        "",
        "| way | past tasks, directions | added, ms | added, of the step | state, bytes / parameter |",
        "|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        lines.append(
            f"| {row['way']} | {row['past_tasks']} | {row['extra_ms']:.2f} | {row['percent_of_step']:.2f} % | "
            f"{row['state_bytes_per_parameter']:.2f} |"
        )
    return lines


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# What the penalty costs in a training step\n",
        f"`{result['command']}`, {result['date']}, commit {result['commit']}, {result['machine']}, torch "
        f"{result['torch']}, {result['threads']} thread(s), {result['clock']} time. *Added* is the median difference "
        "to AdamW(fused=True) in the same rounds, and what that is of a whole step without a penalty; state is the "
        "history's. Rank 1, unless the row says diagonal, whose history is one term whatever the number of tasks.",
    ]
    for part in result["models"]:
        lines += ["", f"## {part['model']}", "", *table(part)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command.parser("trainers", __doc__, "trainers_cpu_Nthread.json and .md")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=DEFAULT, metavar="MODEL", help=str(DEFAULT))
    parser.add_argument(
        "--rounds", type=command.count, default=9, help="of what comes after the backward pass (default: 9)"
    )
    parser.add_argument("--passes", type=command.count, default=5, help="forward and backward (default: 5)")
    parser.add_argument("--threads", type=command.count, default=1)
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(arguments.threads)
    allocator.keep_freed_memory()
    result = {
        **command.record_head("trainers"),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "clock": "process CPU" if arguments.threads == 1 else "wall",
        "models": [measure(name, arguments.rounds, arguments.passes) for name in arguments.models],
    }
    print(markdown(result))
    command.write(arguments.out, f"trainers_cpu_{arguments.threads}thread", result, markdown(result))


if __name__ == "__main__":
    main()
