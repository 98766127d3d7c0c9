"""The state of a run: what a step needs, what is remembered of a task, what a checkpoint holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.method import Method
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images, join
from crl_diffusion.data.tasks import Data
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.diffusion.network import build, frozen_copy
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import RecordError, TrainingError
from crl_diffusion.evaluation import evaluate
from crl_diffusion.evaluation.evaluate import Instruments
from crl_diffusion.files import Log, Row, read_file
from crl_diffusion.methods import regression, replay
from crl_diffusion.methods.penalties import PenaltyState
from crl_diffusion.methods.regression import Moment, NoisedBatch
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.checkpoint import MEMORY, Checkpoint, StaleRecords, require_like
from crl_diffusion.run_folder.layout import digest_of
from crl_diffusion.run_folder.readers import (
    CONFIG_REMEDY,
    TIMINGS_REMEDY,
    read_metrics,
    read_samples,
    read_timings,
    samples_path,
    sha256_of,
)
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from crl_diffusion.training.plan import stage_steps
from crl_diffusion.training.step import LR_SCHEDULES, new_optimizer, training_step

Say = Callable[[str], None]


class Run:
    """The state of a run: everything that a checkpoint holds, and the folder that it is written to."""

    def __init__(self, config: RunConfig, out: Path, data: Data, tools: Instruments | None, say: Say) -> None:
        """`tools` measure images; only the first process needs them."""
        self.config, self.out, self.data, self.tools, self.say = config, out, data, tools, say
        self.method: Method = config.recipe
        self.stages: list[Stage] = stages(config)
        self.stage_steps = stage_steps(config, data)
        self.schedule = noising.SCHEDULES[config.schedule]
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
        self.losses: list[Tensor] = []  # of the steps since the last row of losses, as `take_step` returns them
        names = ("metrics", "timings") if processes.is_first() else ()
        self.logs = {name: Log(out / f"{name}.jsonl") for name in names}
        self.samples: dict[str, str] = {}  # digests of the images that evaluations have kept, by file

    def new_sources(self) -> dict[str, replay.Source]:
        names = dict.fromkeys(part.source for part in self.method.replays)
        return {name: replay.SOURCES[name](self.config, self.data.shape) for name in names}

    def new_penalty(self) -> PenaltyState | None:
        in_sample = self.config.fisher_estimate == "in-sample"
        return PenaltyState(self.method.penalty, self.model, in_sample) if self.method.penalty else None

    @property
    def steps_done(self) -> int:
        return sum(self.stage_steps[: self.stage]) + self.step

    def lr(self, step: int, steps: int) -> float:
        return LR_SCHEDULES[self.config.lr_schedule](step, steps, self.config.lr)

    # One step

    def batch(self, images: Images, stage: Stage) -> NoisedBatch:
        """The step's real images and, once there are old classes, its replayed ones."""
        moment = Moment(self.config.seed, stage.number, self.step)
        real, weights = regression.shares(self.method, stage.number)
        batches = [regression.real_batch(images, self.config.batch, real, self.schedule, moment, self.like)]
        if self.teacher is not None:
            for position, (part, weight) in enumerate(zip(self.method.replays, weights, strict=True)):
                source, n = self.sources[part.source], self.config.replay_batch
                with self.precision.autocast():
                    replayed = replay.replay_batch(
                        part.target, position, weight, source, self.teacher, n, self.schedule, moment, self.like
                    )
                batches.append(replayed)
        return regression.concatenate(batches)

    def take_step(self, images: Images, stage: Stage) -> Tensor:
        """Returns this process's share of the mean loss of the real batch, unweighted, and of the sum over replays of
        their weighted mean losses, and the norm of the gradient, (3,)."""
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
        weight, _ = regression.shares(self.method, stage.number)
        return torch.stack([real / weight, taken.losses.sum() - real, norm.to(real)])

    def adopt_average(self) -> None:
        """The average of the weights becomes the model."""
        if self.average is not None:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.average[name])
            self.average = None

    # The end of a stage

    def draw(self, latents: Tensor, label: Tensor, model: nn.Module | None = None) -> Tensor:
        """Images of the model, or of another one like it, for an evaluation."""
        with self.precision.autocast():
            return sampling.draw_images(model or self.model, self.schedule, latents, label, self.config.eval_steps)

    def evaluate(self, stage: Stage, model: nn.Module | None = None) -> list[Row]:
        """One row of R, see evaluation.py. All processes draw, the first one measures; the others get no rows."""
        draw = partial(self.draw, model=model)
        rows = evaluate.evaluate(draw, self.tools, self.data, self.config, stage.learnt, self.out)
        self.note_samples(stage)
        return rows

    def note_samples(self, stage: Stage) -> None:
        """What the stage's evaluation has kept is from now on what checkpoints hold it to."""
        path = samples_path(self.out, stage.learnt)
        if processes.is_first() and path.exists():
            self.samples[path.relative_to(self.out).as_posix()] = sha256_of(path)

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
            generator = noising.stream(self.config.seed, "fisher", stage.number)
            steps = self.stage_steps[stage.number]
            task_lr = sum(self.lr(step, steps) for step in range(steps))
            try:
                statistics = self.penalty.learn(per_sample_loss, batches, generator, task_lr)
            except ValueError as error:
                raise TrainingError(f"no Fisher matrix of task {stage.learnt} of {self.out}: {error}") from error
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
        losses = loss_table(self.losses) if self.losses else None
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
        if losses is not None:
            tensors["losses/table"] = losses

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
        digests = {log.path.name: log.digest for log in self.logs.values()} | self.samples
        config = self.out / "config.json"
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        saved = Checkpoint(self.stage, self.step, rows, tensors, digest_of(self.config), digests, text)
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
            saved, complaints = checkpoint.latest(self.out / "checkpoints", self.require_fits_and_rows)
            for line in complaints:
                self.say(line)
            self.require_records(saved)
            for name, log in self.logs.items():
                log.keep(saved.rows[name] if saved is not None else 0)
        saved = processes.from_first(saved)
        if saved is not None:
            self.restore(saved)
            self.say(f"resuming after {self.stage} finished stage(s) and {self.step} steps of the next")
            self.mend_samples(saved)

    def require_records(self, saved: Checkpoint | None) -> None:
        """RecordError if records are lost that nothing makes again, or that only the whole run does; changes
        nothing."""
        folder, metrics, timings = (self.out / name for name in ("checkpoints", "metrics.jsonl", "timings.jsonl"))
        if saved is None:
            if checkpoint.latest(folder, self.require_fits)[0] is not None:
                raise RecordError(
                    metrics,
                    "is missing, or does not begin with the rows that any checkpoint was taken after",
                    f"put it back from a copy, or delete {str(folder)!r}, and the run is made again from its start",
                )
            if (self.out / "summary.json").exists():
                raise RecordError(
                    self.out,
                    "is a finished run with damaged records and without a good checkpoint",
                    "put them back from a copy, or delete summary.json, and the run is made again from its start",
                )
            return
        if saved.config and read_file(self.out / "config.json", CONFIG_REMEDY) != saved.config.encode():
            wrong = "is not what it was when the checkpoint was taken"
            raise RecordError(self.out / "config.json", wrong, CONFIG_REMEDY)
        rows, digest = saved.rows["timings"], saved.digests.get(timings.name, "")
        if not timings.exists():
            if rows:
                self.say(f"{str(timings)!r} is missing: the run goes on without the times that it held")
        elif not self.logs["timings"].begins_with(rows, digest):
            wrong = f"does not begin with the {rows} rows that the checkpoint was taken after"
            raise RecordError(timings, wrong, TIMINGS_REMEDY)
        else:
            read_timings(self.out, rows)

    def mend_samples(self, saved: Checkpoint) -> None:
        """Draw again what is missing or damaged of the images that the evaluations of finished stages have kept."""
        for stage in self.stages[: self.stage]:
            path = samples_path(self.out, stage.learnt)
            wanted = saved.digests.get(path.relative_to(self.out).as_posix(), "")
            if not processes.from_first(processes.is_first() and self.lacks_samples(stage, wanted)):
                self.note_samples(stage)
            elif self.draw_again(stage, wanted):
                self.say(f"{str(path)!r} was missing or damaged: its images are drawn again")
            else:
                if processes.is_first():
                    path.unlink(missing_ok=True)
                self.samples.pop(path.relative_to(self.out).as_posix(), None)
                self.say(
                    f"{str(path)!r} was missing or damaged, and no checkpoint has the model that drew its images: the "
                    "run goes on without them"
                )
                self.save()  # so that nothing looks for them again

    def lacks_samples(self, stage: Stage, wanted: str) -> bool:
        """Whether the images that the stage's evaluation has kept are not those of this digest; "" stands for any that
        can be read."""
        if wanted:
            return sha256_of(samples_path(self.out, stage.learnt)) != wanted
        try:
            return read_samples(self.out, stage.learnt) is None
        except RecordError:
            return True

    def draw_again(self, stage: Stage, wanted: str) -> bool:
        """Repeat the evaluation of a finished stage with the model that its last checkpoint holds; returns whether what
        it keeps is what was wanted or, where that is not known, has the numbers in metrics.jsonl."""
        weights: dict[str, Tensor] = {}
        if processes.is_first():
            with suppress(SafetensorError, OSError, ValueError, KeyError):
                end = checkpoint.load(checkpoint.end_of_stage(self.out / "checkpoints", stage.number))
                self.require_fits(end)
                # The teacher is a copy from before the penalty's own steps, if it takes any.
                weights = end.part(f"{MEMORY}teacher") or end.part("model")
        weights = processes.from_first(weights)
        if not weights:
            return False
        model = frozen_copy(self.model)
        model.load_state_dict(weights)
        rows = self.evaluate(stage, model)
        same = True
        if processes.is_first():
            path = samples_path(self.out, stage.learnt)
            known = [row for row in read_metrics(self.out) if row.get("after_task") == stage.learnt]
            same = sha256_of(path) == wanted if wanted else rows == known
        return processes.from_first(same)

    def require_fits_and_rows(self, saved: Checkpoint) -> None:
        """ValueError or KeyError unless this is a checkpoint of this run, has all that it must, and was taken after
        rows that metrics.jsonl begins with; changes nothing."""
        self.require_fits(saved)
        rows, digest = saved.rows["metrics"], saved.digests.get("metrics.jsonl", "")
        stale = StaleRecords(f"metrics.jsonl does not begin with the {rows} rows")
        if not self.logs["metrics"].begins_with(rows, digest):
            raise stale
        try:
            read_metrics(self.out, rows)
        except RecordError as error:
            raise stale from error

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
        since = min(saved.step % self.config.log_every, saved.step % self.config.checkpoint_every)
        at_end = saved.step and saved.step == self.stage_steps[saved.stage]
        table = torch.zeros(0 if at_end else since, 3, dtype=torch.float64)
        require_like(saved.part("losses"), {"table": table} if len(table) else {}, "losses")
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
        if losses := saved.part("losses"):
            table = losses["table"].to(self.device)
            if not processes.is_first():  # it holds the sums over processes, which are to be added up once
                table[:, :2] = 0
            self.losses = list(table)
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


def loss_table(losses: Sequence[Tensor]) -> Tensor:
    """What steps have returned, with the losses of all processes added up: float64 (steps, 3), on the CPU."""
    table = torch.stack([row.double() for row in losses]).cpu()
    table[:, :2] = processes.sum_(table[:, :2].contiguous())
    return table
