"""One run, top to bottom: stages, steps, evaluations, checkpoints. To resume a run, give the same command again.

Several processes share a run when torchrun starts them (`processes.py`); the first of them alone writes files.

A run folder holds config.json, metrics.jsonl (the same bits whether or not the run was interrupted), timings.jsonl
(wall-clock times, which are not), checkpoints/, samples/ (the images of each evaluation), tensorboard/, pictures, and,
once the run has finished, summary.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crl_diffusion import checkpoint, cost, diffusion, evaluation, origin, processes, replay
from crl_diffusion.checkpoint import MEMORY, Checkpoint, require_like
from crl_diffusion.data import Data, Images, join, load
from crl_diffusion.evaluation import Instruments
from crl_diffusion.extractors import Custom
from crl_diffusion.method import Device, ExtractorName, Method, OptionError, RunConfig, Stage, planned, stages
from crl_diffusion.model import build, frozen_copy, predict
from crl_diffusion.penalties import PenaltyState
from crl_diffusion.precision import Precision
from crl_diffusion.records import Log, Row, TensorBoard, read_json, write_json
from crl_diffusion.replay import Moment, NoisedBatch

Say = Callable[[str], None]
Advance = Callable[[int, int], None]  # told how many steps of the run are done, and of how many
FISHER_BATCH = 32
TIMED_STEPS = 5  # of each stage, after its first: what the forecast of a run's duration rests on
SMALLEST_SCALE = 2.0**-10  # below it the gradient scaler has halved 26 times: fp16 does not hold this network


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and why that is likely."""


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: a cosine up to `peak` over the first tenth, then a cosine down to (nearly) zero."""
    rise = max(1, steps // 10)
    if step < rise:
        return peak * 0.5 * (1 - math.cos(math.pi * (step + 1) / rise))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


LR_SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "one-cycle": one_cycle,
    "constant": lambda step, steps, lr: lr,
}


class Taken(NamedTuple):
    """What a step has found: the weighted losses of this process's samples, (B,), the norm of the gradient that was
    clipped, (), and whether the optimizer moved."""

    losses: Tensor
    norm: Tensor
    moved: bool


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: NoisedBatch,
    penalty: PenaltyState | None,
    lr: float,
    clip: float,
    precision: Precision,
) -> Taken:
    """Forward, weighted squared errors, backward, sum over processes, penalty, clip, step.

    The weights sum to the same whatever the number of processes, so gradients are summed over them and not averaged.
    """
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    with precision.autocast():
        prediction = predict(model, batch.noised, batch.t, batch.label)
    losses = batch.weight * diffusion.per_sample_loss(prediction, batch.target)
    precision.scaled(losses.sum()).backward()
    sum_gradients(model)
    precision.unscale_(optimizer)
    if penalty is not None:
        penalty.after_backward()
    if clip:
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    moved = precision.step(optimizer)
    if penalty is not None and moved:
        penalty.after_step(lr)
    return Taken(losses.detach(), norm.detach(), moved)


def sum_gradients(model: nn.Module) -> None:
    """Over processes, in one exchange. Not DistributedDataParallel: a penalty's gradient belongs to no process's share
    and comes after the sum, and every process must clip by the norm of the whole."""
    if processes.count() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    summed = processes.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam; the learning rate is set in every step."""
    return torch.optim.Adam(model.parameters(), lr=0.0, fused=True)


class Run:
    """The state of a run: everything that a checkpoint holds, and the folder that it is written to."""

    def __init__(self, config: RunConfig, out: Path, data: Data, tools: Instruments | None, say: Say) -> None:
        """`tools` measure images; only the first process needs them."""
        self.config, self.out, self.data, self.tools, self.say = config, out, data, tools, say
        self.method: Method = config.recipe
        self.stages: list[Stage] = stages(config)
        self.stage_steps = stage_steps(config, data)
        self.schedule = diffusion.SCHEDULES[config.schedule]
        self.device = torch.device(config.device)
        self.precision = Precision(config.precision, self.device)
        self.model = self.precision.of(build(config.model, data.shape, data.classes, config.seed)).to(self.device)
        self.like = next(self.model.parameters())
        self.average: dict[str, Tensor] | None = None  # of the weights, within a stage
        self.teacher: nn.Module | None = None
        self.optimizer = new_optimizer(self.model)
        self.sources = self.new_sources()
        self.penalty = self.new_penalty()
        self.stage, self.step = 0, 0
        names = ("metrics", "timings") if processes.is_first() else ()
        self.logs = {name: Log(out / f"{name}.jsonl") for name in names}

    def new_sources(self) -> dict[str, replay.Source]:
        names = dict.fromkeys(part.source for part in self.method.replays)
        return {name: replay.SOURCES[name](self.config, self.data.shape) for name in names}

    def new_penalty(self) -> PenaltyState | None:
        in_sample = self.config.fisher_estimate == "in-sample"
        return PenaltyState(self.method.penalty, self.model, in_sample) if self.method.penalty else None

    def lr(self, step: int, steps: int) -> float:
        return LR_SCHEDULES[self.config.lr_schedule](step, steps, self.config.lr)

    # One step

    def batch(self, images: Images, stage: Stage) -> NoisedBatch:
        """The step's real images and, once there are old classes, its replayed ones."""
        moment = Moment(self.config.seed, stage.number, self.step)
        real, weights = replay.shares(self.method, stage.number)
        batches = [replay.real_batch(images, self.config.batch, real, self.schedule, moment, self.like)]
        if self.teacher is not None:
            for position, (part, weight) in enumerate(zip(self.method.replays, weights, strict=True)):
                source, n = self.sources[part.source], self.config.replay_batch
                with self.precision.autocast():
                    replayed = replay.replay_batch(
                        part.target, position, weight, source, self.teacher, n, self.schedule, moment, self.like
                    )
                batches.append(replayed)
        return replay.concatenate(batches)

    def take_step(self, images: Images, stage: Stage) -> Tensor:
        """Returns this process's share of the mean loss of the real batch and of the sum over replays of their weighted
        mean losses, and the norm of the gradient, (3,)."""
        if self.config.ema and self.average is None:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        lr = self.lr(self.step, self.stage_steps[stage.number])
        batch = self.batch(images, stage)
        taken = training_step(self.model, self.optimizer, batch, self.penalty, lr, self.config.clip, self.precision)
        if self.average is not None and taken.moved:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    self.average[name].lerp_(p, 1 - decay)
        self.step += 1
        mine = processes.share(self.config.batch)
        real = taken.losses[: mine.stop - mine.start].sum()
        norm = taken.norm if taken.moved else torch.zeros_like(taken.norm)  # an overflow was dealt with
        return torch.stack([real, taken.losses.sum() - real, norm.to(real)])

    def adopt_average(self) -> None:
        """The average of the weights becomes the model."""
        if self.average is not None:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.average[name])
            self.average = None

    # The end of a stage

    def draw(self, latents: Tensor, label: Tensor) -> Tensor:
        """Images of the model for an evaluation."""
        with self.precision.autocast():
            return replay.draw_images(self.model, self.schedule, latents, label, self.config.eval_steps)

    def evaluate(self, stage: Stage) -> list[Row]:
        """One row of R, see evaluation.py. All processes draw, the first one measures; the others get no rows."""
        return evaluation.evaluate(self.draw, self.tools, self.data, self.config, stage.learnt, self.out)

    def remember(self, stage: Stage) -> None:
        """Freeze the teacher, refill the pools and measure the Fisher matrix: all that later tasks are held to."""
        learnt = [c for task in self.data.tasks[: stage.learnt] for c in task.classes]
        if self.method.replays:
            self.teacher = frozen_copy(self.model)
            with self.precision.autocast():
                for source in self.sources.values():
                    source.refill(self.teacher, learnt, stage.number)
        if self.penalty is not None:
            images = self.task_images(stage, self.config.fisher_images)
            batches = fisher_batches(images, stage, self.config, self.schedule, self.like)
            generator = diffusion.stream(self.config.seed, "fisher", stage.number)
            steps = self.stage_steps[stage.number]
            task_lr = sum(self.lr(step, steps) for step in range(steps))
            statistics = self.penalty.learn(per_sample_loss, batches, generator, task_lr)
            self.log({"kind": "fisher", "task": stage.learnt, **statistics, "state_bytes": self.penalty.nbytes})

    def task_images(self, stage: Stage, part: str) -> Images:
        """Training or validation images of the classes of a stage."""
        return join([getattr(task, part) for task in self.data.tasks if set(task.classes) <= set(stage.classes)])

    # Records

    def log(self, row: Row, name: str = "metrics") -> None:
        if processes.is_first():
            self.logs[name].append(row)

    def save(self) -> None:
        """A checkpoint of this moment."""
        self.require_same_weights()
        if not processes.is_first():
            return
        for log in self.logs.values():
            log.sync()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors.update({f"scaler/{name}": value for name, value in self.precision.state().items()})
        if self.step:
            for name, parameter in self.model.named_parameters():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        if self.average is not None:
            tensors.update({f"average/{name}": value for name, value in self.average.items()})

        # What does not change within a stage: there is none before the first task's end, and none is needed after the
        # last's.
        memory: dict[str, Tensor] = {}
        if self.teacher is not None:
            memory.update({f"teacher/{name}": value for name, value in self.teacher.state_dict().items()})
        for source_name, source in self.sources.items():
            memory.update({f"source/{source_name}/{name}": value for name, value in source.state().items()})
        if self.penalty is not None:
            memory.update({f"penalty/{name}": value for name, value in self.penalty.state().items()})
        if 0 < self.stage < len(self.stages):
            tensors.update({f"{MEMORY}{name}": value for name, value in memory.items()})
        rows = {name: log.count for name, log in self.logs.items()}
        saved = Checkpoint(self.stage, self.step, rows, tensors, digest_of(self.config))
        checkpoint.save(self.out / "checkpoints", saved)

    def require_same_weights(self) -> None:
        """All processes take the same steps; where one does not, every number from there on would be wrong."""
        if processes.count() == 1:
            return
        digest = hashlib.sha256()
        for value in self.model.state_dict().values():
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
        if len(set(processes.everyone(digest.hexdigest()))) > 1:
            raise TrainingError(
                f"the processes' models differ at step {self.step} of stage {self.stage + 1}: one of them computes "
                "otherwise, through a defect, or another version of a library or kind of device; take equal ones, and "
                "give the same command again to go on from the last checkpoint"
            )

    def resume(self) -> None:
        """Go back to the newest good checkpoint, or to the start if there is none."""
        saved: Checkpoint | None = None
        if processes.is_first():
            saved, complaints = checkpoint.latest(self.out / "checkpoints", self.require_fits)
            for line in complaints:
                self.say(line)
            for name, log in self.logs.items():
                log.keep(saved.rows[name] if saved is not None else 0)
        saved = processes.from_first(saved)
        if saved is not None:
            self.restore(saved)
            self.say(f"resuming after {self.stage} finished stage(s) and {self.step} steps of the next")

    def require_fits(self, saved: Checkpoint) -> None:
        """ValueError or KeyError unless this is a checkpoint of this run and has all that it must; changes nothing."""
        if saved.run != digest_of(self.config):
            raise ValueError("it belongs to a run of another configuration")
        if not (saved.stage < len(self.stages) and saved.step <= self.stage_steps[saved.stage]) and (
            (saved.stage, saved.step) != (len(self.stages), 0)
        ):
            raise ValueError(f"this run has no step {saved.step} after {saved.stage} stages")
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        require_like(saved.part("model"), weights, "model")
        parameters = {name: weights[name] for name, _ in self.model.named_parameters()}
        moments = {f"{key}/{name}": p for name, p in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
        moments.update({f"step/{name}": torch.zeros(()) for name in parameters})
        require_like(saved.part("optimizer"), moments if saved.step else {}, "optimizer")
        require_like(saved.part("average"), parameters if self.config.ema and saved.step else {}, "average")
        require_like(saved.part("scaler"), self.precision.state(), "scaler")
        for name in self.logs:
            saved.rows[name]

        # Memory is there once a task has been learnt, and not after the last.
        if 0 < saved.stage < len(self.stages):
            require_like(saved.part(f"{MEMORY}teacher"), weights if self.method.replays else {}, "teacher")
            for name, source in self.new_sources().items():
                source.load_state(saved.part(f"{MEMORY}source/{name}"))
            penalty = self.new_penalty()
            if penalty is not None:
                penalty.load_state(saved.part(f"{MEMORY}penalty"))
                if not len(penalty.history):
                    raise KeyError("penalty")

    def restore(self, saved: Checkpoint) -> None:
        """Everything as it was at a checkpoint of this run."""
        self.stage, self.step = saved.stage, saved.step
        self.model.load_state_dict(saved.part("model"))
        self.precision.load_state(saved.part("scaler"))
        moments = saved.part("optimizer")
        for name, parameter in self.model.named_parameters():
            if self.step:
                self.optimizer.state[parameter] = {
                    key: moments[f"{key}/{name}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
        if average := saved.part("average"):
            self.average = {name: value.to(self.device) for name, value in average.items()}
        if teacher := saved.part(f"{MEMORY}teacher"):
            self.teacher = frozen_copy(self.model)
            self.teacher.load_state_dict(teacher)
        if 0 < self.stage < len(self.stages):
            for name, source in self.sources.items():
                source.load_state(saved.part(f"{MEMORY}source/{name}"))
            if self.penalty is not None:
                self.penalty.load_state(saved.part(f"{MEMORY}penalty"))


def train(
    config: RunConfig,
    out: Path,
    data_root: Path = Path("data"),
    features: ExtractorName | Custom = "cnn",
    extractor_folder: Path | None = None,
    say: Say = print,
    advance: Advance = lambda done, total: None,
) -> Row:
    """Run `config` in the folder `out` from wherever it stands, and return its summary.

    FIDs are measured on `features`; extractors are kept and looked for in `extractor_folder`, by default `out`.
    """
    config = resolve(config)
    if (out / "summary.json").exists():
        check_folder(config, out)
        evaluation.check_finished(features, out)
        return dict(read_json(out / "summary.json"))
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    torch.use_deterministic_algorithms(True, warn_only=True)
    data = load(config, data_root)
    require_shares(config)

    with processes.together(torch.device(config.device)):
        # The folder belongs to this configuration, and the first process alone writes to it.
        check_folder(config, out)
        first = processes.is_first()
        if not first:
            say = _nothing
        try:
            if first:
                out.mkdir(parents=True, exist_ok=True)
            with locked(out) if first else nullcontext():
                tools = None
                if first:
                    tools = evaluation.instruments(features, data, extractor_folder or out, config.device)
                    for line in tools.about(config, data):
                        say(line)
                    claim(config, out, data.name, tools.names())
                run = Run(config, out, data, tools, say)

                # To resume: the newest good checkpoint.
                run.resume()
                run.log({"started": started, "processes": processes.count(), "git": origin.git_state()}, "timings")
                with TensorBoard(out / "tensorboard" if first else None, steps_done(run)) as board:
                    while run.stage < len(run.stages):
                        run_stage(run, run.stages[run.stage], board, advance)
                return finish(run)
        except (checkpoint.WriteError, OSError) as error:
            raise TrainingError(
                f"{error}; earlier checkpoints are as they were: make {str(out)!r} writable, with room on its disk, "
                "and give the same command again to go on"
            ) from error


def _nothing(line: str) -> None:
    """What the processes other than the first have to say."""


def require_shares(config: RunConfig) -> None:
    """Refuse more processes than there are images for."""
    for name in ("batch", "replay_batch"):
        if getattr(config, name) < processes.launched():
            raise OptionError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}, but torchrun has started "
                f"{processes.launched()} processes to share them; start fewer, or give larger batches"
            )


def run_stage(run: Run, stage: Stage, board: TensorBoard, advance: Advance) -> None:
    """Steps, evaluation, memory, checkpoint."""
    config, steps = run.config, run.stage_steps[stage.number]
    images = run.task_images(stage, "train")
    run.model.train()
    losses: list[Tensor] = []
    clock = StepClock(run, stage)
    since = time.perf_counter()
    while run.step < steps:
        losses.append(run.take_step(images, stage))
        clock.tick()

        # Losses, at fixed steps, so that an interrupted run writes the same rows.
        at_checkpoint = run.step % config.checkpoint_every == 0 or run.step == steps
        if run.step % config.log_every == 0 or at_checkpoint:
            log_losses(run, stage, losses, (time.perf_counter() - since) / len(losses), board)
            advance(steps_done(run), sum(run.stage_steps))
            losses, since = [], time.perf_counter()
        if at_checkpoint:
            run.save()
            since = time.perf_counter()

    run.model.eval()
    run.adopt_average()
    for row in run.evaluate(stage):
        run.log(row)
        board.scalars(row["after_task"], {f"fid/task {row['task']}": row["fid"]})
        run.say(
            f"after task {row['after_task']}: task {row['task']} has FID {row['fid']:.1f}, "
            f"conditional accuracy {row['accuracy']:.3f}"
        )
    if stage.number + 1 < len(run.stages):
        run.remember(stage)
    run.stage, run.step = run.stage + 1, 0
    run.optimizer = new_optimizer(run.model)
    run.save()


def log_losses(run: Run, stage: Stage, losses: list[Tensor], seconds: float, board: TensorBoard) -> None:
    """Mean losses since the last row; stops at the first that is not finite."""
    table = torch.stack(losses).double().cpu()
    table[:, :2] = processes.sum_(table[:, :2].contiguous())
    bad = torch.nonzero(~table.isfinite().all(1)).flatten()
    if len(bad):
        raise TrainingError(explain(run, stage, run.step - len(losses) + 1, table[: int(bad[0]) + 1]))
    scaler = run.precision.scaler
    if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
        raise TrainingError(
            f"fp16 gradients still overflow at step {run.step} of stage {stage.number + 1}, scaled by "
            f"{scaler.get_scale():g}; try --precision bf16, whose range is that of fp32, in a new folder"
        )
    real, replayed = table[:, :2].contiguous().mean(0).tolist()
    run.log({"kind": "step", "stage": stage.number + 1, "step": run.step, "loss": real, "replay_loss": replayed})
    penalty = run.penalty.seconds if run.penalty is not None else []
    timing: Row = {"stage": stage.number + 1, "step": run.step, "step_ms": 1e3 * seconds}
    if penalty:
        timing["penalty_ms"] = 1e3 * sorted(penalty)[len(penalty) // 2]
        penalty.clear()
    run.log(timing, "timings")
    board.scalars(steps_done(run), {"loss/real": real, "loss/replay": replayed})


def explain(run: Run, stage: Stage, first: int, table: Tensor) -> str:
    """What is not finite, when, and the likely cause. `table` has the real loss, the replayed loss and the gradient's
    norm of the steps from `first` on, (steps, 3), and ends with the first row that is not finite."""
    config, penalty = run.config, run.method.penalty
    real, replayed = table[-1, :2].isfinite().tolist()
    if real and replayed:
        what = "the gradient is not finite, though the loss is,"
    elif real:
        what = "the loss on replayed images is not finite"
    elif replayed and run.teacher is not None:
        what = "the loss on real images is not finite"
    else:
        what = "the loss is not finite"
    norms = [f"{value:.2g}" for value in table[:-1, 2].tolist()[-3:]]
    before = f" (norms of the gradient just before: {', '.join(norms)})" if norms else ""

    cause = f"the learning rate is likely too high: try --lr {config.lr / 3:.2g}"
    if config.precision == "fp16" and not (real and replayed):
        cause = "fp16 holds nothing above 65504, and the network's activations may be: try --precision bf16"
    elif penalty is not None and stage.number > 0 and penalty.mode == "gradient":
        cause = f"a stiff penalty in gradient mode is unstable: try lam={penalty.lam / 10:g} or the decoupled mode"
    elif real and not replayed:
        cause = "the teacher's images or predictions are likely broken: look at the evaluation after the last task"
    elif not config.clip:
        cause = f"the gradient is not clipped: try --clip 1, or --lr {config.lr / 3:.2g}"
    return f"{what} at step {first + len(table) - 1} of stage {stage.number + 1}{before}; {cause}, in a new folder"


class StepClock:
    """Times a few steps of a stage and says what that means for the rest of the run."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage, self.ticks, self.begun = run, stage, 0, 0.0

    def tick(self) -> None:
        """A step has been taken."""
        self.ticks += 1
        if self.ticks not in (1, 1 + TIMED_STEPS):
            return
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        if self.ticks == 1:  # the first step allocates and loads
            self.begun = time.perf_counter()
            return
        run, seconds = self.run, (time.perf_counter() - self.begun) / TIMED_STEPS
        left = cost.seconds_left(run.config, run.stages, run.stage_steps, self.stage, run.step, seconds)
        steps = sum(run.stage_steps) - steps_done(run)
        if not steps:
            return
        whole = "this run" if steps_done(run) == 1 + TIMED_STEPS else "the rest of this run"
        run.say(f"about {cost.in_words(left)} for {whole} ({steps} steps, now at {1e3 * seconds:.0f} ms, and images)")


def per_sample_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The loss whose gradients make the Fisher matrix: (noised, t, label, noise) -> (N,)."""
    noised, t, label, noise = batch
    return diffusion.per_sample_loss(predict(model, noised, t, label), noise)


def fisher_batches(
    images: Images, stage: Stage, config: RunConfig, schedule: diffusion.Schedule, like: Tensor
) -> list[tuple[Tensor, ...]]:
    """This process's share of `fisher_samples` images of the task, in shuffled epochs, each with its own timestep and
    noise."""
    batches: list[tuple[Tensor, ...]] = []
    samples = config.fisher_samples or len(images)
    for number, start in enumerate(range(0, samples, FISHER_BATCH)):
        moment = Moment(config.seed, stage.number, number)
        chosen = replay.epoch_batch(images, FISHER_BATCH, moment, "fisher epoch")
        n = min(FISHER_BATCH, samples - start)
        part = chosen.take(torch.arange(n))
        t, noise = diffusion.draw_noise(moment.stream("fisher noise"), tuple(part.pixels.shape))
        batches.append(replay.noise_up(part, t, noise, schedule, like))
    return batches if processes.count() == 1 else fisher_share(batches)


def fisher_share(batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Of each half of the samples, every count-th one: each process's first half is then its part of the first half of
    all, from which directions come."""
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    half, rank, count = len(whole[0]) // 2, processes.rank(), processes.count()
    mine = [torch.cat([part[:half][rank::count], part[half:][rank::count]]) for part in whole]
    return list(zip(*(part.split(FISHER_BATCH) for part in mine), strict=True))


def finish(run: Run) -> Row:
    """Pictures and the summary, which marks the run as finished."""
    summary: Row = {}
    if processes.is_first():
        from crl_diffusion import pictures, report  # matplotlib: not before it is needed

        pictures.of_run(run.out)
        summary = report.summarise(run.out)
        write_json(run.out / "summary.json", summary)
    return processes.from_first(summary)


def steps_done(run: Run) -> int:
    return sum(run.stage_steps[: run.stage]) + run.step


def stage_steps(config: RunConfig, data: Data) -> list[int]:
    """Steps of each stage: --steps for each of its tasks, or --epochs over its images."""
    plan = stages(config)
    if not config.epochs:
        return [stage.share * config.steps for stage in plan]
    images = [sum(len(t.train) for t in data.tasks if set(t.classes) <= set(s.classes)) for s in plan]
    return [config.epochs * math.ceil(n / config.batch) for n in images]


def digest_of(config: RunConfig) -> str:
    """Of everything that decides a run's numbers: what a checkpoint says of the run that it belongs to."""
    return hashlib.sha256(json.dumps(config.as_json(), sort_keys=True).encode()).hexdigest()


def claim(config: RunConfig, out: Path, data_name: str, measured_with: dict[str, str]) -> None:
    """Write config.json, or see that the run goes on with the data, and being measured with what it was begun with."""
    path, kept = out / "config.json", {"data_name": data_name, **measured_with}
    if not path.exists():
        made = {"environment": origin.environment(), "git": origin.git_state(), "command": origin.command()}
        write_json(path, {"run": config.as_json(), **kept, **made})
        return
    begun = read_json(path)
    for key, name in kept.items():
        if begun.get(key, name) != name:
            raise OptionError(
                f"the {key} is {name}, but the run in {str(out)!r} was begun with {begun[key]}; choose that one with "
                "--data-root, --extractor and --extractor-folder"
            )


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with what depends on the machine and the data set filled in."""
    return replace(planned(config), device=resolve_device(config.device))


def resolve_device(device: Device) -> Device:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device is cuda, but torch finds no CUDA device; use --device cpu")
    return device


def check_folder(config: RunConfig, out: Path) -> None:
    """Refuse a folder whose run is another one, naming the options that differ."""
    path = out / "config.json"
    if not path.exists():
        return
    saved, wanted = read_json(path)["run"], resolve(config).as_json()
    differ = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if differ:
        what = ", ".join(f"{key} {saved.get(key)!r} there, {wanted.get(key)!r} asked for" for key in differ)
        raise OptionError(f"--out {str(out)!r} holds another run ({what}); use another folder, or delete this one")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process at a time may write to a run folder; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"--out {str(out)!r} is being written by another process; wait for it, or use another"
            ) from None
        yield
