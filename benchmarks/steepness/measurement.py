"""From the folders of finished runs to numbers: which runs may be compared, and what one run says of its tasks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.method import PENALTIES
from crl_diffusion.config.settings import RunConfig, check
from crl_diffusion.data.images import Images
from crl_diffusion.data.tasks import load
from crl_diffusion.diffusion import noising
from crl_diffusion.diffusion.network import build
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.methods.penalties import PenaltyState
from crl_diffusion.reporting.provenance import options
from crl_diffusion.reporting.runs import Finished, differing, find
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import digest_of_saved, require_measured
from crl_diffusion.run_folder.readers import read_run_config
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from torch import Tensor, nn

from .displacement import STEP, Batch, curvature, draw, first_and_second_order, loss

ESTIMATES = ("rank1", "rank10", "bands8", "diagonal")  # names in PENALTIES
STATISTICS = ("kappa", "rho", "signal_share", "trace")  # of the rank-1 estimate
FREE = {"seed", "lr_schedule", "device", "log_every", "checkpoint_every"}  # settings that may differ between runs


# Which runs


def comparable(folders: Sequence[Path]) -> list[Finished]:
    """The finished runs in these folders. OptionError unless they have no penalty and differ only in FREE."""
    runs: list[Finished] = []
    for folder in folders:
        finished, unfinished = find([folder])
        if unfinished:
            raise OptionError(f"the run in {str(unfinished[0])!r} is not finished; finish it first, or leave it out")
        if not finished:
            raise OptionError(f"{str(folder)!r} holds no run; give folders that `crl-diffusion train` has written")
        runs += finished
    for run in runs:
        if run.config["recipe"]["penalty"] is not None:
            raise OptionError(
                f"the run in {str(run.path)!r} was trained with a penalty ({run.method}), which changes the "
                "displacement that it predicts; give runs of distillation alone (--method gd)"
            )
        if run.config["recipe"]["curriculum"] != "continual" or run.settings["tasks"] < 2:
            raise OptionError(f"the run in {str(run.path)!r} has one stage; give runs that learn several tasks in turn")
    if changed := [name for name in differing(runs) if name not in FREE]:
        values = {str(run.settings.get(changed[0])): str(run.path) for run in runs}
        listed = ", ".join(f"{value} in {path!r}" for value, path in values.items())
        raise OptionError(
            f"these runs differ in their {', '.join(changed)} ({changed[0]} is {listed}); give runs that differ in "
            "seed and lr_schedule only"
        )
    first: dict[tuple[str, int], Path] = {}
    for run in runs:
        twin = first.setdefault((run.settings["lr_schedule"], run.seed), run.path)
        if twin != run.path:
            raise OptionError(f"{str(twin)!r} and {str(run.path)!r} have the same seed and lr_schedule; give one")
    return runs


def shared_options(runs: Sequence[Finished]) -> list[str]:
    """What all runs have in common, as options of `crl-diffusion train`."""
    config = {name: value for name, value in runs[0].settings.items() if name not in {*FREE, "data"}}
    return ["--data", runs[0].data, "--method", runs[0].method, *options(config)]


def state_after(run: Finished, stage: Stage) -> dict[str, Tensor]:
    """The model's state at the end of a stage."""
    path = checkpoint.end_of_stage(run.path / "checkpoints", stage.number)
    remedy = "repeat the run in another folder"
    if not path.exists():
        raise RecordError(path, "is missing", remedy)
    try:
        saved = checkpoint.load(path)
    except (ValueError, KeyError) as error:
        raise RecordError(path, f"is damaged ({error})", remedy) from error
    if saved.run != digest_of_saved(run.config):
        raise RecordError(path, "belongs to a run of another configuration", remedy)
    return saved.part("model")


# What they say


def estimated(
    model: nn.Module, config: RunConfig, stage: Stage, batches: Sequence[tuple[Tensor, ...]]
) -> tuple[dict[str, PenaltyState], dict[str, float]]:
    """The penalties that the trainer would have had from the end of this stage on, and the rank-1 one's statistics."""
    penalties, statistics = {}, {}
    for name in ESTIMATES:
        penalties[name] = PenaltyState(PENALTIES[name], model, config.fisher_estimate == "in-sample")
        generator = noising.stream(config.seed, "fisher", stage.number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rho and the signal share, which the page shows
            statistics[name] = penalties[name].learn(per_sample_loss, batches, generator, task_lr=0.0)
    rank1 = {name: statistics["rank1"][name] for name in STATISTICS}
    return penalties, {**rank1, "mean_gradient_sq": rank1["kappa"] * rank1["trace"]}


def measure(run: Finished, data_root: Path, samples: int, fisher_samples: int) -> dict[str, Any]:
    """One row for each task but the last, and one for each pair of a task and a later one, in the order of tasks."""
    # The trainer's own configuration, data and network.
    config = replace(read_run_config(run.path), fisher_samples=fisher_samples)
    check(replace(config, method="rank10"))  # the estimate that needs most samples
    data, plan, schedule = load(config, data_root), stages(config), noising.SCHEDULES[config.schedule]
    require_measured(run.path, {"data_name": data.name})
    precision = Precision(config.precision, torch.device("cpu"))
    model = precision.of(build(config.model, data.shape, data.classes, config.seed)).eval()
    model64 = copy.deepcopy(model).double()
    states = [state_after(run, stage) for stage in plan]
    weights = [{name: state[name].double() for name, _ in model.named_parameters()} for state in states]
    like, like64 = next(model.parameters()), next(model64.parameters())

    def drawn(images: Images, part: str, stage: Stage) -> list[Batch]:
        generator = noising.stream(config.seed, f"steepness, {part}", stage.number)
        return draw(images, samples, schedule, generator, like64)

    tasks, pairs = [], []
    for stage, task in zip(plan[:-1], data.tasks, strict=False):
        theta = weights[stage.number]
        seen, unseen = drawn(task.train, "train", stage), drawn(task.held_out, "held out", stage)
        base, unseen_base = loss(model64, theta, seen), loss(model64, theta, unseen)

        model.load_state_dict(states[stage.number])
        batches = fisher_batches(task.train, stage, config, schedule, like)
        penalties, statistics = estimated(model, config, stage, batches)
        tasks.append({"task": stage.learnt, "loss": base, "held_out_loss": unseen_base, **statistics})

        for later in plan[stage.learnt :]:
            after = weights[later.number]
            delta = {name: after[name] - theta[name] for name in theta}
            model.load_state_dict(states[later.number])
            with torch.no_grad():
                quadratics = {name: float(penalty.history.penalty(1.0)) for name, penalty in penalties.items()}
            row: dict[str, Any] = {
                "task": stage.learnt,
                "after_task": later.learnt,
                "displacement_sq": sum(float(part.square().sum()) for part in delta.values()),
                "rise": loss(model64, after, seen) - base,
                "held_out_rise": loss(model64, after, unseen) - unseen_base,
                **first_and_second_order(model64, theta, delta, seen),
                "curvature": curvature(model64, theta, delta, seen, base),
                "curvature_at_twice_the_step": curvature(model64, theta, delta, seen, base, 2 * STEP),
                **quadratics,
            }
            pairs.append({**row, "quadratic": row["first_order"] + row["curvature"]})
    place = f"{run.path.parent.name}/{run.path.name}"
    return {"run": place, "lr_schedule": config.lr_schedule, "seed": config.seed, "tasks": tasks, "pairs": pairs}
