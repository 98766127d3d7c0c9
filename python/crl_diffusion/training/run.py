"""The state of a run: what a step needs, and what later tasks keep of an earlier one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from crl_diffusion import processes
from crl_diffusion.config.curriculum import Stage, stages
from crl_diffusion.config.method import OF_ADAM, Method
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data.images import Images, join
from crl_diffusion.data.tasks import Data
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.diffusion.network import frozen_copy
from crl_diffusion.diffusion.precision import Precision
from crl_diffusion.errors import TrainingError
from crl_diffusion.evaluation import evaluate
from crl_diffusion.evaluation.evaluate import Instruments
from crl_diffusion.files import Log, Row, read_if_there
from crl_diffusion.methods import adapters, regression, replay
from crl_diffusion.methods.adapters import AdaptedNetwork
from crl_diffusion.methods.optimizers import new_optimizer
from crl_diffusion.methods.penalties import PenaltyState
from crl_diffusion.methods.regression import Moment, NoisedBatch
from crl_diffusion.run_folder.readers import samples_path, sha256_of
from crl_diffusion.training.fisher_batches import fisher_batches, per_sample_loss
from crl_diffusion.training.plan import stage_steps
from crl_diffusion.training.step import LR_SCHEDULES, training_step

Say = Callable[[str], None]


class Run:
    """The state of a run, and the folder that it is written to. `snapshot` saves and restores it."""

    def __init__(self, config: RunConfig, out: Path, data: Data, tools: Instruments | None, say: Say) -> None:
        """`tools` measure images; the other processes than the first have None. `config` is resolved."""
        self.config, self.out, self.data, self.tools, self.say = config, out, data, tools, say
        self.method: Method = config.recipe
        self.stages: list[Stage] = stages(config)
        self.stage_steps = stage_steps(config, data)
        self.schedule = noising.SCHEDULES[config.schedule]
        self.device = torch.device(config.device)
        self.precision = Precision(config.precision, self.device)
        self.model = self.new_model().to(self.device)
        self.like = next(self.model.parameters())
        self.average: dict[str, Tensor] | None = None  # of the weights (--ema), within a stage
        self.teacher: nn.Module | None = None  # the model at the start of the stage, from the second on
        self.optimizer = self.new_optimizer()
        self.sources = self.new_sources()
        self.penalty = self.new_penalty()
        self.stage, self.step = 0, 0
        self.losses: list[Tensor] = []  # results of `take_step` since the last row of losses
        names = ("metrics", "timings") if processes.is_first() else ()
        self.logs = {name: Log(out / f"{name}.jsonl", say) for name in names}
        config_json = (read_if_there(out / "config.json") or b"") if processes.is_first() else b""
        self.config_text = config_json.decode()  # for the checkpoints
        self.samples: dict[str, str] = {}  # digests of the stored images of evaluations, by file

    def new_model(self, tasks: int = 1) -> nn.Module:
        """A model with new weights, of the form that it has after so many tasks."""
        return self.precision.of(adapters.new_network(self.config, self.data.shape, self.data.classes, tasks))

    def begin(self, stage: Stage) -> None:
        """Get ready for the steps of a stage: the weights that it trains, and their optimizer."""
        self.model.zero_grad()  # of weights that are not trained any more: clipping sees all gradients
        if isinstance(self.model, AdaptedNetwork):
            self.model.expand(stage.learnt)
        self.optimizer = self.new_optimizer()

    def new_optimizer(self) -> torch.optim.Optimizer:
        return new_optimizer(self.model, self.config.optimizer)

    def new_sources(self) -> dict[str, replay.ReplaySource]:
        names = dict.fromkeys(part.source for part in self.method.replays)
        return {name: replay.SOURCES[name](self.config, self.data.shape) for name in names}

    def new_penalty(self) -> PenaltyState | None:
        in_sample = self.config.fisher_estimate == "in-sample"
        return PenaltyState(self.method.penalty, self.model, in_sample) if self.method.penalty else None

    @property
    def steps_done(self) -> int:
        return sum(self.stage_steps[: self.stage]) + self.step

    def lr(self, stage: Stage, step: int) -> float:
        peak = self.config.lr * (self.config.lr_later if stage.number else 1.0)
        return LR_SCHEDULES[self.config.lr_schedule](step, self.stage_steps[stage.number], peak)

    # One step

    def batch(self, images: Images, stage: Stage) -> NoisedBatch:
        """The real images of the step and, once there are old classes, its replayed images."""
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
        """One optimization step. Returns (3,): this process's share of the unweighted mean loss of the real batch, its
        share of the sum of the replays' weighted mean losses, and the norm of the gradient."""
        if self.config.ema and self.average is None:
            self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        lr = self.lr(stage, self.step)
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
        norm = taken.norm if taken.moved else torch.zeros_like(taken.norm)  # the scaler has skipped an overflow
        weight, _ = regression.shares(self.method, stage.number)
        return torch.stack([real / weight, taken.losses.sum() - real, norm.to(real)])

    def adopt_average(self) -> None:
        """Replace the weights of the model by their average."""
        if self.average is not None:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(self.average[name])
            self.average = None

    def interpolate(self) -> None:
        """Move the weights of the model towards the teacher's, by the method's share of the way."""
        if self.teacher is not None and self.method.interpolation:
            with torch.no_grad():
                for p, old in zip(self.model.parameters(), self.teacher.parameters(), strict=True):
                    p.lerp_(old, self.method.interpolation)

    # The end of a stage

    def draw(self, latents: Tensor, label: Tensor, model: nn.Module | None = None) -> Tensor:
        """Images for an evaluation, drawn with `model` or, by default, the model of the run."""
        with self.precision.autocast():
            return sampling.draw_images(model or self.model, self.schedule, latents, label, self.config.eval_steps)

    def evaluate(self, stage: Stage, model: nn.Module | None = None) -> list[Row]:
        """One row of the FID matrix. All processes draw images. The first measures them; the others return no rows."""
        draw = partial(self.draw, model=model)
        rows = evaluate.evaluate(draw, self.tools, self.data, self.config, stage.learnt, self.out)
        self.note_samples(stage)
        return rows

    def note_samples(self, stage: Stage) -> None:
        """Record the digest of the stage's stored images, for the checkpoints that follow."""
        path = samples_path(self.out, stage.learnt)
        if processes.is_first() and path.exists():
            self.samples[path.relative_to(self.out).as_posix()] = sha256_of(path)

    def remember(self, stage: Stage) -> None:
        """Keep what later tasks need of this one: freeze the teacher, refill the pools, estimate the Fisher matrix."""
        learnt = [c for task in self.data.tasks[: stage.learnt] for c in task.classes]
        if not self.method.adapter_rank:  # which keep all that the model was
            self.teacher = frozen_copy(self.model)
        if self.teacher is not None and self.method.replays:
            with self.precision.autocast():
                for source in self.sources.values():
                    source.refill(self.teacher, self.task_images(stage, "train"), learnt, stage.number)
        if self.penalty is not None:
            batches: list[tuple[Tensor, ...]] = []
            if self.penalty.spec.is_estimated:
                images = self.task_images(stage, self.config.fisher_images)
                batches = fisher_batches(images, stage, self.config, self.schedule, self.like)
            generator = noising.stream(self.config.seed, "fisher", stage.number)
            task_lr = sum(self.lr(stage, step) for step in range(self.stage_steps[stage.number]))
            try:
                statistics = self.penalty.learn(per_sample_loss, batches, generator, task_lr)
            except ValueError as error:
                raise TrainingError(f"no Fisher matrix of task {stage.learnt} of {self.out}: {error}") from error
            row = {"kind": "fisher", "task": stage.learnt, **statistics, "state_bytes": self.penalty.nbytes}
            self.log({**row, "suggested_lam": self.suggested_lam(stage.number + 1)})
            self.say_lam(stage.number + 1)

    def suggested_lam(self, number: int) -> float | None:
        """The lam at which the drift of past tasks halves within the stage `number`; None if there is no such stage, or
        nothing to hold."""
        if self.penalty is None or number == len(self.stages):
            return None
        steps, stage = self.stage_steps[number], self.stages[number]
        return self.penalty.suggested_lam(math.fsum(self.lr(stage, step) for step in range(steps)) / steps, steps)

    def say_lam(self, number: int) -> None:
        """Say which lam is in use, and which one is suggested for the stage `number`."""
        suggested, penalty = self.suggested_lam(number), self.method.penalty
        if suggested is not None and penalty is not None:
            rescaled = self.config.optimizer == "adam" and penalty.mode in ("gradient", *OF_ADAM)
            self.say(
                f"after task {number}: lam is {penalty.lam:g}; at lam={suggested:.3g} drift would halve within the next"
                f" task's {self.stage_steps[number]} steps"
                + (f", if Adam did not rescale the mode {penalty.mode}" if rescaled else "")
            )

    def task_images(self, stage: Stage, part: str) -> Images:
        """Training or validation images of the classes of a stage."""
        return join([getattr(task, part) for task in self.data.tasks if set(task.classes) <= set(stage.classes)])

    # Records

    def log(self, row: Row, name: str = "metrics") -> None:
        if processes.is_first():
            self.logs[name].append(row)


def loss_table(losses: Sequence[Tensor]) -> Tensor:
    """Results of `take_step`, with the losses summed over processes: float64 (steps, 3), on the CPU."""
    table = torch.stack([row.double() for row in losses]).cpu()
    table[:, :2] = processes.sum_(table[:, :2].contiguous())
    return table
