"""``python -m benchmarks.trainer_cost``: what each method of the trainer costs a step, as ratios to fine-tuning.

Steps of all methods take turns in one process, in the fifth task: pools are full, and penalties hold four past tasks
(random directions and curvatures, because a step's cost does not depend on their values). Memory is the peak of one
step beyond what the process held before it, each method in a process of its own. State is what a penalty keeps. The
estimate of a Fisher matrix, one per task, takes turns with plain steps. A second table is about rank-1 alone, on the
rank-1 paper's UNet: the penalty's calls against the plain step. One thread, process CPU time, medians with the 20th and
80th percentile. The machine may be busy, so read the ratios only.
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from crl_diffusion.config.networks import MODELS
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.config.spelling import parse_method
from crl_diffusion.data.images import Images
from crl_diffusion.data.tasks import load
from crl_diffusion.diffusion.network import frozen_copy
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.methods.optimizers import new_optimizer
from crl_diffusion.methods.penalties import PenaltyState
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from crl_diffusion.training.plan import resolve
from crl_diffusion.training.run import Run
from crl_diffusion.training.step import training_step
from torch import Tensor

import crl_kernels
from crl_kernels import DiagonalFisher, LowRankFisher

from .common import command, memory
from .common.measure import commit, interleaved, percentiles

PLAIN, TASKS = "fine-tune", 4
PENALISED = [f"gd+{p}" for p in ("diagonal", "rank1", "rank10", "rank50", "bands8")]
METHODS = [PLAIN, "replay", "gd", "replay+gd", "masip", *(m + mode for m in PENALISED for mode in ("", ":gradient"))]
SIZES = (8, 16)  # pixels: digits as they are, and as large as the trainer's MNIST
PLAIN_STEPS, FISHER_ROUNDS = 10, 3


def run_of(method: str, size: int, folder: Path) -> tuple[Run, Images]:
    """A run at the beginning of its fifth task, and that task's images."""
    config = resolve(RunConfig(method=method, device="cpu"))
    digits = load(config, Path("unused"))
    edge = (size - 8) // 2
    small = digits.tasks[TASKS].train
    images = Images(torch.nn.functional.pad(small.pixels, [edge] * 4), small.labels)
    run = Run(config, folder, replace(digits, train=images), None, lambda line: None)  # type: ignore[arg-type]
    run.stage, run.teacher = TASKS, frozen_copy(run.model)
    old = torch.arange(2 * TASKS).repeat_interleave(config.pool)
    for source in run.sources.values():
        pixels = torch.randint(256, (len(old), *run.data.shape), dtype=torch.uint8)
        source.load_state({"pixels": pixels, "labels": old, "classes": torch.arange(2 * TASKS)})
    if run.penalty is not None:
        for _ in range(TASKS):
            run.penalty.history.append(fisher_of(run))  # type: ignore[arg-type]
    return run, images


def fisher_of(run: Run) -> LowRankFisher | DiagonalFisher:
    """One task's Fisher matrix, at random."""
    spec = run.method.penalty
    assert spec is not None
    parameters = {name: p.detach() for name, p in run.model.named_parameters()}
    if spec.fisher == "diagonal":
        return DiagonalFisher({n: 1e-4 * torch.rand_like(p) for n, p in parameters.items()}, parameters)
    terms = spec.rank * spec.bands
    scale = sum(p.numel() for p in parameters.values()) ** -0.5
    directions: dict[str, Tensor] = {n: scale * torch.randn(terms, *p.shape) for n, p in parameters.items()}
    return LowRankFisher(directions, 1e-3 * torch.rand(terms, dtype=torch.float64), parameters)


def step_of(run: Run, images: Images) -> Callable[[], object]:
    def step() -> None:
        run.step %= run.config.steps // 2  # before the learning rate has come down to 0
        run.take_step(images, run.stages[TASKS])

    return step


def estimate_of(run: Run, images: Images, samples: int) -> Callable[[], object]:
    """The estimate of a Fisher matrix from so many samples; the result is discarded."""
    assert run.penalty is not None
    penalty = PenaltyState(run.penalty.spec, run.model)
    config = replace(run.config, fisher_samples=samples)
    batches = fisher_batches(images, run.stages[TASKS], config, run.schedule, run.like)

    def estimate() -> None:
        penalty.learn(per_sample_loss, batches, torch.Generator().manual_seed(0), 0.0)

    return estimate


def steps(size: int, rounds: int, methods: list[str], fisher_samples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these models are not trained, and nobody uses their Fisher matrices
        runs = {method: run_of(method, size, Path(folder)) for method in methods}
        seconds = interleaved({m: step_of(*run) for m, run in runs.items()}, rounds, time.process_time)
        estimates = {m: estimate_of(*run, fisher_samples) for m, run in runs.items() if run[0].penalty is not None}
        step = step_of(*runs[PLAIN])
        beside = {PLAIN: lambda: [step() for _ in range(PLAIN_STEPS)]}
        fishers = interleaved(beside | estimates, FISHER_ROUNDS, time.process_time)
    rows = []
    for method, (run, _) in runs.items():
        ratios = [a / b for a, b in zip(seconds[method], seconds[PLAIN], strict=True)]
        row = {"method": method, **percentiles(seconds[method])}
        row["times_plain"] = statistics.median(seconds[method]) / statistics.median(seconds[PLAIN])
        row |= {f"times_plain_{key[3:]}": 1e-3 * value for key, value in percentiles(ratios).items() if key != "ms"}
        row["steps_per_s_to_plain"] = 1 / row["times_plain"]
        row["state_bytes"] = run.penalty.nbytes if run.penalty is not None else 0
        row["peak_bytes"] = None
        row["fisher_steps"] = None
        if method in estimates:
            took = statistics.median(fishers[method]) / statistics.median(fishers[PLAIN])
            row["fisher_steps"] = PLAIN_STEPS * took * 1000 / fisher_samples
        rows.append(row)
    parameters = sum(p.numel() for p in runs[PLAIN][0].model.parameters())
    return {"size": size, "rounds": rounds, "parameters": parameters, "rows": rows}


def peak(method: str, size: int) -> int | None:
    if not memory.can_measure():
        return None
    with tempfile.TemporaryDirectory() as folder:
        step = step_of(*run_of(method, size, Path(folder)))
        step()
        return memory.peak_bytes(step)


def rank1_on(model_name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Rank-1's own calls beside the plain step of a UNet on 3 x 32 x 32 images, with 1 and 4 past tasks."""
    from crl_diffusion.diffusion.network import build
    from crl_diffusion.methods.regression import NoisedBatch

    model = build(model_name, (3, 32, 32), 10, 0)
    config = RunConfig(method="rank1")
    label = torch.arange(batch) % 10
    x, weight = torch.randn(batch, 3, 32, 32), torch.full((batch,), 1 / batch)
    noised = NoisedBatch(x, torch.arange(batch) * 90, label, torch.randn_like(x), weight)
    optimizer, precision = new_optimizer(model), Precision("fp32", torch.device("cpu"))
    calls: dict[str, Callable[[], object]] = {
        "plain step": lambda: training_step(model, optimizer, noised, None, 2e-4, 0.0, precision)
    }
    for mode in ("decoupled", "gradient"):
        for tasks in (1, TASKS):
            spec = replace(config.recipe.penalty, mode=mode)  # type: ignore[type-var]
            state = PenaltyState(spec, model)  # type: ignore[arg-type]
            for _ in range(tasks):
                parameters = {name: p.detach() for name, p in model.named_parameters()}
                scale = sum(p.numel() for p in parameters.values()) ** -0.5
                u = {n: scale * torch.randn(1, *p.shape) for n, p in parameters.items()}
                state.history.append(LowRankFisher(u, torch.full((1,), 0.1, dtype=torch.float64), parameters))  # type: ignore[arg-type]
            call = state.after_backward if mode == "gradient" else lambda s=state: s.after_step(2e-4, optimizer)
            calls[f"rank1, {mode}, {tasks} past task{'s' * (tasks > 1)}"] = call
    seconds = interleaved(calls, rounds, time.process_time)
    plain = statistics.median(seconds["plain step"])
    rows = [
        {"name": name, **percentiles(took), "percent_of_plain": 100 * statistics.median(took) / plain}
        for name, took in seconds.items()
    ]
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": model_name, "batch": batch, "rounds": rounds, "parameters": parameters, "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# What the trainer's methods cost a step",
        "",
        f"`{result['command']}`, {result['date']}, {result['machine']}, 1 thread, process CPU time, torch "
        f"{result['torch']}; medians [20th, 80th percentile] of rounds in which all take turns. Other processes ran on "
        "the machine: read the ratios only. Replays add as many images to a step as it has real ones, which is most of "
        "what replaying methods cost; penalties hold four past tasks. *A Fisher*: of 1,000 samples, in steps of "
        f"fine-tune with {RunConfig(method=PLAIN).batch} images each; one is estimated after each task.",
    ]
    for part in result["sizes"]:
        lines += [
            "",
            f"## {part['size']} x {part['size']} pixels, {part['parameters']:,} parameters, {part['rounds']} rounds",
            "",
            "| method | step, × fine-tune | steps/s, of fine-tune's | peak of a step, MB | penalty's state, MB "
            "| a Fisher, steps |",
            "|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            fisher_cell = "" if row["fisher_steps"] is None else f"{row['fisher_steps']:.0f}"
            peak_cell = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
            lines.append(
                f"| {row['method']} | {row['times_plain']:.2f} [{row['times_plain_p20']:.2f}, "
                f"{row['times_plain_p80']:.2f}] | {100 * row['steps_per_s_to_plain']:.0f} % | {peak_cell} | "
                f"{row['state_bytes'] / 1e6:.1f} | {fisher_cell} |"
            )
    if part := result.get("rank1"):
        lines += [
            "",
            f"## Rank-1 by itself: UNet `{part['model']}`, {part['parameters']:,} parameters, images of 3 x 32 x 32, "
            f"batch {part['batch']}, {part['rounds']} rounds",
            "",
            "| | of the plain step |",
            "|---|---|",
            *(f"| {row['name']} | {row['percent_of_plain']:.2f} % |" for row in part["rows"]),
        ]
    return "\n".join(lines) + "\n"


def method(name: str) -> str:
    """The value of an option that is a method."""
    parse_method(name)  # an OptionError is a ValueError
    return name


def main() -> None:
    parser = command.parser("trainer_cost", __doc__, "trainer_cost.json and .md")
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=[*SIZES], help="pixels (default: 8 16)")
    parser.add_argument("--methods", nargs="+", type=method, default=METHODS, help="(default: all of the table)")
    parser.add_argument("--rounds", type=command.count, default=20, help="rounds of the steps (default: 20)")
    parser.add_argument("--fisher-samples", type=command.count, default=512, help="of one Fisher matrix (default: 512)")
    parser.add_argument("--model", choices=MODELS, default="paper", help="UNet for rank-1 by itself (default: paper)")
    parser.add_argument("--model-rounds", type=command.count, default=3, help="rounds on it (default: 3)")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument(
        "--peak", type=method, metavar="METHOD", help="only this method's peak memory, of one size: bytes, as JSON"
    )
    arguments = parser.parse_args()
    command.require_kernels()
    torch.set_num_threads(1)
    if arguments.peak:
        print(json.dumps(peak(arguments.peak, arguments.sizes[0])))
        return
    methods = list(dict.fromkeys([PLAIN, *arguments.methods]))
    result: dict[str, Any] = {
        **command.record_head("trainer_cost"),
        "torch": torch.__version__,
        "crl_kernels": crl_kernels.__version__,
        "commit": commit(),
        "sizes": [],
    }
    result["rank1"] = rank1_on(arguments.model, 8, arguments.model_rounds)
    for size in arguments.sizes:  # written after each part, because a part takes minutes
        result["sizes"].append(steps(size, arguments.rounds, methods, arguments.fisher_samples))
        command.write(arguments.out, "trainer_cost", result, markdown(result))
    for part in [] if arguments.no_peaks else result["sizes"]:
        for row in part["rows"]:
            options = ["--peak", row["method"], "--sizes", str(part["size"])]
            row["peak_bytes"] = command.in_own_process("trainer_cost", options)
        command.write(arguments.out, "trainer_cost", result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
