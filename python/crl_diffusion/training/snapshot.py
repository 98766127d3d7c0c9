"""Saving a run and resuming it: from the state of a `Run` to a checkpoint, and from the newest good one back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from crl_diffusion import processes
from crl_diffusion.config.curriculum import Stage, reached
from crl_diffusion.diffusion.network import frozen_copy
from crl_diffusion.errors import RecordError, TrainingError
from crl_diffusion.files import read_file
from crl_diffusion.methods import optimizers
from crl_diffusion.run_folder import checkpoint, origin
from crl_diffusion.run_folder.checkpoint import MEMORY, Checkpoint, StaleRecords, require_like
from crl_diffusion.run_folder.layout import digest_of
from crl_diffusion.run_folder.readers import (
    CONFIG_REMEDY,
    TIMINGS_REMEDY,
    read_config,
    read_metrics,
    read_samples,
    read_timings,
    samples_path,
    sha256_of,
)
from crl_diffusion.training.run import Run, loss_table


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is now. All processes must call it; the first one writes."""
    require_same_weights(run)
    losses = loss_table(run.losses) if run.losses else None
    if not processes.is_first():
        return
    for log in run.logs.values():
        log.sync()
    tensors = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    tensors.update({f"scaler/{name}": value for name, value in run.precision.state().items()})
    if run.step:
        for name, parameter in run.model.named_parameters():
            for key, value in run.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
    if run.average is not None:
        tensors.update({f"average/{name}": value for name, value in run.average.items()})
    if losses is not None:
        tensors["losses/table"] = losses

    # Memory does not change within a stage. There is none before the end of the first task, and none is needed after
    # the end of the last.
    memory: dict[str, Tensor] = {}
    if run.teacher is not None:
        memory.update({f"teacher/{name}": value for name, value in run.teacher.state_dict().items()})
    for source_name, source in run.sources.items():
        memory.update({f"source/{source_name}/{name}": value for name, value in source.state().items()})
    if run.penalty is not None:
        memory.update({f"penalty/{name}": value for name, value in run.penalty.state().items()})
    if 0 < run.stage < len(run.stages):
        tensors.update({f"{MEMORY}{name}": value for name, value in memory.items()})
    rows = {name: log.count for name, log in run.logs.items()}
    digests = {log.path.name: log.digest for log in run.logs.values()} | run.samples
    saved = Checkpoint(run.stage, run.step, rows, tensors, digest_of(run.config), digests, run.config_text)
    checkpoint.save(run.out / "checkpoints", saved)


def require_same_weights(run: Run) -> None:
    """TrainingError if the processes' models differ: then every later number would be wrong."""
    if processes.count() == 1:
        return
    digest = hashlib.sha256()
    for value in run.model.state_dict().values():
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    if len(set(processes.everyone(digest.hexdigest()))) > 1:
        raise TrainingError(
            f"the processes' models differ at step {run.step} of stage {run.stage + 1}: one of them computes "
            "differently, because of a defect, another version of a library or another kind of device; use equal ones "
            "and give the same command again to continue from the last checkpoint"
        )


def resume(run: Run) -> None:
    """Restore the newest good checkpoint, or begin at the start if there is none."""
    saved: Checkpoint | None = None
    if processes.is_first():
        saved, complaints = checkpoint.latest(run.out / "checkpoints", partial(require_fits_and_rows, run))
        require_records(run, saved, complaints)
        for line in complaints:
            run.say(line)
        for name, log in run.logs.items():
            rows = saved.rows[name] if saved is not None else 0
            log.keep(min(rows, log.count) if name == "timings" else rows)  # without times, if their file is missing
    saved = processes.from_first(saved)
    if saved is not None:
        restore(run, saved)
        run.say(f"resuming after {run.stage} finished stage(s) and {run.step} steps of the next")
        environment = read_config(run.out).get("environment") if processes.is_first() else None
        if changes := origin.differences(environment or {}):
            run.say(f"the run began in another environment ({changes}): the last bits of its numbers may differ")
        mend_samples(run, saved)


def require_records(run: Run, saved: Checkpoint | None, complaints: Sequence[str]) -> None:
    """RecordError if records are lost that only a repetition of the whole run can replace. Changes nothing.

    `complaints`: a line for each checkpoint that is not good."""
    folder, metrics, timings = (run.out / name for name in ("checkpoints", "metrics.jsonl", "timings.jsonl"))
    if saved is None:
        if checkpoint.latest(folder, partial(require_fits, run))[0] is not None:
            raise RecordError(
                metrics,
                "is missing, or does not begin with the rows of any checkpoint",
                f"put it back from a copy, or delete {str(folder)!r}, and the run is repeated from its start",
            )
        if complaints:
            raise RecordError(
                folder,
                f"holds no good checkpoint: {'; '.join(complaints)}",
                "put one back from a copy, or delete this folder, and the run is repeated from its start",
            )
        if (run.out / "summary.json").exists():
            raise RecordError(
                run.out,
                "is a finished run with damaged records and without a good checkpoint",
                "put them back from a copy, or delete summary.json, and the run is repeated from its start",
            )
        return
    if saved.config and read_file(run.out / "config.json", CONFIG_REMEDY) != saved.config.encode():
        wrong = "is not what it was when the checkpoint was taken"
        raise RecordError(run.out / "config.json", wrong, CONFIG_REMEDY)
    rows, digest = saved.rows["timings"], saved.digests.get(timings.name, "")
    if not timings.exists():
        if rows:
            run.say(f"{str(timings)!r} is missing: the run continues without the times in it")
    elif not run.logs["timings"].begins_with(rows, digest):
        wrong = f"does not begin with the {rows} rows that the checkpoint was taken after"
        raise RecordError(timings, wrong, TIMINGS_REMEDY)
    else:
        read_timings(run.out, rows)


def mend_samples(run: Run, saved: Checkpoint) -> None:
    """Draw missing or damaged images of finished stages' evaluations again."""
    for stage in run.stages[: run.stage]:
        path = samples_path(run.out, stage.learnt)
        wanted = saved.digests.get(path.relative_to(run.out).as_posix(), "")
        if not processes.from_first(processes.is_first() and lacks_samples(run, stage, wanted)):
            run.note_samples(stage)
        elif draw_again(run, stage, wanted):
            run.say(f"{str(path)!r} was missing or damaged: its images are drawn again")
        else:
            if processes.is_first():
                path.unlink(missing_ok=True)
            run.samples.pop(path.relative_to(run.out).as_posix(), None)
            run.say(
                f"{str(path)!r} was missing or damaged, and no checkpoint has the model that drew its images: the "
                "run continues without them"
            )
            save(run)  # without their digest: the next resume does not look for them


def lacks_samples(run: Run, stage: Stage, wanted: str) -> bool:
    """Whether the images of the stage's evaluation are missing or do not have the digest `wanted`; "" accepts any
    images that can be read."""
    if wanted:
        return sha256_of(samples_path(run.out, stage.learnt)) != wanted
    try:
        return read_samples(run.out, stage.learnt) is None
    except RecordError:
        return True


def draw_again(run: Run, stage: Stage, wanted: str) -> bool:
    """Repeat the evaluation of a finished stage with the model of its last checkpoint. Returns whether its images have
    the digest `wanted` or, if that is "", whether its numbers are those in metrics.jsonl."""
    weights: dict[str, Tensor] = {}
    if processes.is_first():
        end_of_stage = checkpoint.end_of_stage(run.out / "checkpoints", stage.number)
        try:
            if end_of_stage.exists():
                end = checkpoint.load(end_of_stage)
                require_fits(run, end)
                # The teacher was copied before the penalty's own steps (mode once), the model after them.
                weights = end.part(f"{MEMORY}teacher") or end.part("model")
        except (ValueError, KeyError):  # damaged
            pass
    weights = processes.from_first(weights)
    if not weights:
        return False
    model = run.new_model(stage.learnt)
    model.load_state_dict(weights)
    model.to(run.device).eval()
    rows = run.evaluate(stage, model)
    same = True
    if processes.is_first():
        path = samples_path(run.out, stage.learnt)
        evaluations = [row for row in read_metrics(run.out) if row["kind"] == "evaluation"]
        known = [row for row in evaluations if row["after_task"] == stage.learnt]
        same = sha256_of(path) == wanted if wanted else rows == known
    return processes.from_first(same)


def require_fits_and_rows(run: Run, saved: Checkpoint) -> None:
    """As `require_fits`; also ValueError unless metrics.jsonl begins with the rows that the checkpoint counts."""
    require_fits(run, saved)
    rows, digest = saved.rows["metrics"], saved.digests.get("metrics.jsonl", "")
    stale = StaleRecords(f"metrics.jsonl does not begin with the {rows} rows")
    if not run.logs["metrics"].begins_with(rows, digest):
        raise stale
    try:
        read_metrics(run.out, rows)
    except RecordError as error:
        raise stale from error


def require_fits(run: Run, saved: Checkpoint) -> None:
    """ValueError or KeyError unless this is a complete checkpoint of this run. Changes nothing."""
    if saved.run != digest_of(run.config):
        raise ValueError("it belongs to a run of another configuration")
    if not (saved.stage < len(run.stages) and saved.step <= run.stage_steps[saved.stage]) and (
        (saved.stage, saved.step) != (len(run.stages), 0)
    ):
        raise ValueError(f"this run has no step {saved.step} after {saved.stage} stages")
    with torch.device("meta"):
        model = run.new_model(reached(run.stages, saved.stage, saved.step).learnt)
    weights, parameters = model.state_dict(), dict(model.named_parameters())
    require_like(saved.part("model"), weights, "model")
    kept = {
        f"{key}/{name}": torch.zeros(()) if key == "step" else p
        for name, p in parameters.items()
        if p.requires_grad
        for key in optimizers.STATE[run.config.optimizer]
    }
    require_like(saved.part("optimizer"), kept if saved.step else {}, "optimizer")
    require_like(saved.part("average"), parameters if run.config.ema and saved.step else {}, "average")
    require_like(saved.part("scaler"), run.precision.state(), "scaler")
    since = min(saved.step % run.config.log_every, saved.step % run.config.checkpoint_every)
    at_end = saved.step and saved.step == run.stage_steps[saved.stage]
    table = torch.zeros(0 if at_end else since, 3, dtype=torch.float64)
    require_like(saved.part("losses"), {"table": table} if len(table) else {}, "losses")
    for name in run.logs:
        saved.rows[name]

    # Memory exists once a task has been learnt, and not after the last.
    if 0 < saved.stage < len(run.stages):
        teacher = saved.part(f"{MEMORY}teacher")  # an earlier version had none without replays
        needed = teacher or run.method.replays or run.method.interpolation
        require_like(teacher, weights if needed else {}, "teacher")
        for name, source in run.new_sources().items():
            source.load_state(saved.part(f"{MEMORY}source/{name}"))
        penalty = run.new_penalty()
        if penalty is not None:
            penalty.load_state(saved.part(f"{MEMORY}penalty"))
            if not len(penalty.history):
                raise KeyError("penalty")


def restore(run: Run, saved: Checkpoint) -> None:
    """Set the state of the run to that of a checkpoint."""
    run.stage, run.step = saved.stage, saved.step
    run.begin(reached(run.stages, run.stage, run.step))
    run.model.load_state_dict(saved.part("model"))
    run.precision.load_state(saved.part("scaler"))
    moments = saved.part("optimizer")
    for name, parameter in run.model.named_parameters():
        if run.step and parameter.requires_grad:
            run.optimizer.state[parameter] = {
                key: moments[f"{key}/{name}"].to(run.device) for key in optimizers.STATE[run.config.optimizer]
            }
    if losses := saved.part("losses"):
        table = losses["table"].to(run.device)
        if not processes.is_first():  # it holds sums over processes; they count once
            table[:, :2] = 0
        run.losses = list(table)
    if average := saved.part("average"):
        run.average = {name: value.to(run.device) for name, value in average.items()}
    if teacher := saved.part(f"{MEMORY}teacher"):
        run.teacher = frozen_copy(run.model)
        run.teacher.load_state_dict(teacher)
    if 0 < run.stage < len(run.stages):
        for name, source in run.sources.items():
            source.load_state(saved.part(f"{MEMORY}source/{name}"))
        if run.penalty is not None:
            run.penalty.load_state(saved.part(f"{MEMORY}penalty"))
