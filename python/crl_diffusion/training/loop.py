"""One run, top to bottom: stages, steps, evaluations, checkpoints. To resume a run, give the same command again.

Several processes share a run when torchrun starts them (`processes.py`); the first of them alone writes files.

A run folder holds config.json, metrics.jsonl (the same bits whether or not the run was interrupted), timings.jsonl
(wall-clock and CPU times, which are not), checkpoints/, samples/ (the images of each evaluation), tensorboard/,
pictures, and, once the run has finished, summary.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from crl_diffusion import errors, processes, signals
from crl_diffusion.config.curriculum import Stage
from crl_diffusion.config.settings import ExtractorName, RunConfig
from crl_diffusion.data.tasks import Data, load
from crl_diffusion.errors import OptionError, RecordError, TrainingError
from crl_diffusion.evaluation import evaluate, extractors, summaries
from crl_diffusion.evaluation.extractors import Custom
from crl_diffusion.evaluation.features import PART, digest
from crl_diffusion.files import Row, TensorBoard, read_if_there, write_json, write_text
from crl_diffusion.reporting import runs
from crl_diffusion.run_folder import origin
from crl_diffusion.run_folder.layout import (
    check_folder,
    claim,
    make_writable,
    require_layout,
    restore_config,
    writing,
)
from crl_diffusion.training import snapshot, stage_records, trouble
from crl_diffusion.training.forecast import StepClock
from crl_diffusion.training.plan import about_data, data_record, require_apart, require_fisher_images, resolve
from crl_diffusion.training.run import Run, Say, loss_table

Advance = Callable[[int, int], None]  # called with the number of finished steps and of all steps


def train(
    config: RunConfig,
    out: Path,
    data_root: Path = Path("data"),
    features: ExtractorName | Custom = "cnn",
    extractor_folder: Path | None = None,
    say: Say = print,
    advance: Advance = lambda done, total: None,
) -> Row:
    """Run `config` in the folder `out`, from the start or from its newest checkpoint, and return its summary.

    `features` names the network for FIDs. `extractor_folder`, by default `out`, holds trained extractors.
    """
    asked, config = config, resolve(config, data_root)
    first = processes.launched_rank() == 0
    if not first:
        say = _nothing
    if (summary := finished(config, out, features, say)) is not None:
        with processes.together(torch.device(config.device)):
            processes.require_same({"the run": "finished"})
        say(f"{out} is finished already")
        return summary
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    torch.use_deterministic_algorithms(True, warn_only=True)
    require_apart(config, out, data_root)
    data = load(config, data_root)
    require_shares(config)
    require_fisher_images(config, data)
    extractors.require_folder(features, extractor_folder or out)

    # Several processes must stop together: they agree on the step after which they do.
    several = processes.launched() > 1
    with signals.deferred() if several else nullcontext(), processes.together(torch.device(config.device)):
        if several:
            processes.require_same(start_of(config, data, features))
        if first:
            make_writable(out)
        try:
            with writing(out, say) if first else nullcontext():
                tools = None
                if first:
                    # The folder must belong to this configuration. Only the first process writes to it.
                    restore_config(out, say)
                    check_folder(config, out)
                    tools = evaluate.instruments(features, data, extractor_folder or out, config.device)
                    for line in [*about_data(asked, config, data), *tools.about(config, data)]:
                        say(line)
                    claim(config, out, data.name, tools.names(), data_record(data, data_root))
                run = Run(config, out, data, tools, say)

                # To resume: the newest good checkpoint.
                snapshot.resume(run)
                run.log({"started": started, "processes": processes.count(), "git": origin.git_state()}, "timings")
                with TensorBoard(out / "tensorboard" if first else None, run.steps_done) as board:
                    while run.stage < len(run.stages):
                        run_stage(run, run.stages[run.stage], board, advance)
                return finish(run)
        except (errors.WriteError, OSError) as error:
            raise TrainingError(
                f"{error}; earlier checkpoints are unchanged: make {str(out)!r} writable, with room on its disk, and "
                "give the same command again to continue"
            ) from error


def finished(
    config: RunConfig, out: Path, features: ExtractorName | Custom, say: Say = lambda line: None
) -> Row | None:
    """The summary of a finished run with undamaged records; None if there is something left to do."""
    require_layout(out)
    if not (out / "summary.json").exists():
        return None
    try:
        summary = runs.read_finished(out)
    except RecordError as error:
        say(f"{error.damage}; trying to make it again")
        return None
    check_folder(config, out)
    evaluate.check_finished(features, out)
    return summary


def start_of(config: RunConfig, data: Data, features: ExtractorName | Custom) -> dict[str, str]:
    """What all processes of a run are started with, by option, and what decides their bits."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in vars(config).items()}
    images = (part for images in (data.train, data.test) for part in images.batches(PART))
    return {
        "the run": "unfinished",
        **options,
        "--extractor": features if isinstance(features, str) else features.name,
        "the digest of the images": digest(*(tensor for part in images for tensor in (part.pixels, part.labels)))[:8],
        "torch": torch.__version__,
        "the number of threads": str(torch.get_num_threads()),
    }


def _nothing(line: str) -> None:
    """The `say` of all processes but the first: they print nothing."""


def require_shares(config: RunConfig) -> None:
    """OptionError if there are more processes than images in a batch."""
    for name in ("batch", "replay_batch"):
        if getattr(config, name) < processes.launched():
            raise OptionError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}, but torchrun has started "
                f"{processes.launched()} processes to share them; start fewer, or give larger batches"
            )


def run_stage(run: Run, stage: Stage, board: TensorBoard, advance: Advance) -> None:
    """One stage: its steps, its evaluation, what later stages need of it, and a checkpoint."""
    config, steps = run.config, run.stage_steps[stage.number]
    images = run.task_images(stage, "train")
    if not run.step:
        run.begin(stage)
    run.model.train()
    clock = StepClock(run, stage)
    before, since = run.step, clocks()
    smaller_batch = f"lower --batch ({config.batch}) or --replay-batch ({config.replay_batch})"
    with signals.deferred(), trouble.memory_for(f"in the steps of stage {stage.number + 1}", smaller_batch):
        while run.step < steps:
            run.losses.append(run.take_step(images, stage))
            clock.tick()

            # Losses are written at fixed steps, so an interrupted run writes the same rows.
            at_checkpoint = run.step % config.checkpoint_every == 0 or run.step == steps
            if run.step % config.log_every == 0 or at_checkpoint:
                seconds, cpu = (spent / (run.step - before) for spent in elapsed(since))
                log_losses(run, stage, run.losses, seconds, cpu, board)
                advance(run.steps_done, sum(run.stage_steps))
                run.losses = []
                before, since = run.step, clocks()
            if at_checkpoint:
                snapshot.save(run)
                since = clocks()

            # A signal to any of the processes stops all of them.
            if signum := processes.largest(signals.pending()):
                if not at_checkpoint:
                    snapshot.save(run)
                processes.everyone(None)  # until the first has written
                raise signals.Stopped(signum, f" after step {run.step} of stage {stage.number + 1}, with a checkpoint")

    run.model.eval()
    run.adopt_average()
    run.interpolate()
    with trouble.memory_for(
        f"in the evaluation of stage {stage.number + 1}", f"lower --eval-samples ({config.eval_samples})"
    ):
        records = [*stage_records.movement(run, stage), *stage_records.held_out_losses(run, stage)]
        trouble.require_finite_records(run, stage, records)
        rows = run.evaluate(stage)
    for row in rows:
        run.log(row)
        board.scalars(row["after_task"], {f"fid/task {row['task']}": row["fid"]})
        run.say(
            f"after task {row['after_task']}: task {row['task']} has FID {row['fid']:.1f}, "
            f"conditional accuracy {row['accuracy']:.3f}"
        )
    for row in [*records, *stage_records.adapters(run, stage)]:
        run.log(row)
    if stage.number + 1 < len(run.stages):
        remember(run, stage)
    run.stage, run.step = run.stage + 1, 0
    snapshot.save(run)


def clocks() -> tuple[float, float]:
    """Seconds on the wall clock, and of CPU time that this process has used, of all threads."""
    return time.perf_counter(), time.process_time()


def elapsed(since: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = clocks()
    return wall - since[0], cpu - since[1]


def remember(run: Run, stage: Stage) -> None:
    """Keep what later stages need of this one, and log the time that it has taken."""
    since = clocks()
    lower = f"lower --fisher-samples ({run.config.fisher_samples}) or --pool ({run.config.pool}), or take a lower rank"
    with trouble.memory_for(f"at the end of stage {stage.number + 1}, for the Fisher matrix and the pool", lower):
        run.remember(stage)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    seconds, cpu = elapsed(since)
    run.log({"stage": stage.number + 1, "task_end_seconds": seconds, "task_end_cpu_seconds": cpu}, "timings")
    for row in stage_records.memory(run, stage):
        run.log(row)


def log_losses(
    run: Run, stage: Stage, losses: Sequence[Tensor], seconds: float, cpu_seconds: float, board: TensorBoard
) -> None:
    """Mean losses since the last row, and the time of a step. TrainingError if one of the losses is not finite."""
    table = loss_table(losses)
    trouble.require_finite(run, stage, table)
    real, replayed = table[:, :2].contiguous().mean(0).tolist()
    run.log({"kind": "step", "stage": stage.number + 1, "step": run.step, "loss": real, "replay_loss": replayed})
    penalty = run.penalty.seconds if run.penalty is not None else []
    timing: Row = {"stage": stage.number + 1, "step": run.step, "step_ms": 1e3 * seconds}
    timing["step_cpu_ms"] = 1e3 * cpu_seconds
    if penalty:
        timing["penalty_ms"] = 1e3 * sorted(penalty)[len(penalty) // 2]
        penalty.clear()
    run.log(timing, "timings")
    board.scalars(run.steps_done, {"loss/real": real, "loss/replay": replayed})


def finish(run: Run) -> Row:
    """Write the pictures and summary.json, which marks the run as finished."""
    summary: Row = {}
    if processes.is_first():
        from crl_diffusion.reporting import run_pictures  # matplotlib: not before it is needed

        for log in run.logs.values():
            log.sync()
        config = run.out / "config.json"
        if read_if_there(config) != run.config_text.encode():
            run.say(f"{str(config)!r} was deleted or changed by something else, and is written again")
            write_text(config, run.config_text)
        run_pictures.of_run(run.out)
        summary = summaries.summarise(run.out)
        write_json(run.out / "summary.json", summary)
    return processes.from_first(summary)
