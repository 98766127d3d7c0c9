"""One run, top to bottom: stages, steps, evaluations, checkpoints. To resume a run, give the same command again.

A run folder holds config.json, metrics.jsonl (the same bits whether or not the run was interrupted), timings.jsonl
(wall-clock times, which are not), checkpoints/, samples/ (the images of each evaluation), tensorboard/, pictures, and,
once the run has finished, summary.json.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crl_diffusion import checkpoint, diffusion, evaluation, pictures, replay, report
from crl_diffusion.checkpoint import Checkpoint
from crl_diffusion.data import Data, Images, join, load
from crl_diffusion.evaluation import Instruments
from crl_diffusion.extractors import Custom
from crl_diffusion.method import Device, ExtractorName, Method, OptionError, RunConfig, Stage, planned, stages
from crl_diffusion.model import build, frozen_copy, predict
from crl_diffusion.penalties import PenaltyState
from crl_diffusion.records import Log, Row, TensorBoard, read_json, write_json
from crl_diffusion.replay import Moment, NoisedBatch

Say = Callable[[str], None]
Advance = Callable[[int], None]  # told how many steps of the run are done
FISHER_BATCH = 32


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


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: NoisedBatch,
    penalty: PenaltyState | None,
    lr: float,
    clip: float,
) -> Tensor:
    """Forward, weighted squared errors, backward, clip, step; returns the weighted losses of the samples, (B,)."""
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    prediction = predict(model, batch.noised, batch.t, batch.label)
    losses = batch.weight * diffusion.per_sample_loss(prediction, batch.target)
    losses.sum().backward()
    if penalty is not None:
        penalty.after_backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    if penalty is not None:
        penalty.after_step(lr)
    return losses.detach()


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam; the learning rate is set in every step."""
    return torch.optim.Adam(model.parameters(), lr=0.0, fused=True)


class Run:
    """The state of a run: everything that a checkpoint holds, and the folder that it is written to."""

    def __init__(self, config: RunConfig, out: Path, data: Data, tools: Instruments, say: Say) -> None:
        self.config, self.out, self.data, self.tools, self.say = config, out, data, tools, say
        self.method: Method = config.recipe
        self.stages: list[Stage] = stages(config)
        self.device = torch.device(config.device)
        self.model = build(config.model, data.shape, data.classes, config.seed).to(self.device)
        self.like = next(self.model.parameters())
        self.teacher: nn.Module | None = None
        self.optimizer = new_optimizer(self.model)
        self.sources = {
            name: replay.SOURCES[name](config, data.shape)
            for name in dict.fromkeys(r.source for r in self.method.replays)
        }
        in_sample = config.fisher_estimate == "in-sample"
        self.penalty = PenaltyState(self.method.penalty, self.model, in_sample) if self.method.penalty else None
        self.stage, self.step = 0, 0
        self.logs = {"metrics": Log(out / "metrics.jsonl"), "timings": Log(out / "timings.jsonl")}

    def lr(self, step: int, steps: int) -> float:
        return LR_SCHEDULES[self.config.lr_schedule](step, steps, self.config.lr)

    # One step

    def batch(self, images: Images, stage: Stage) -> NoisedBatch:
        """The step's real images and, once there are old classes, its replayed ones."""
        moment = Moment(self.config.seed, stage.number, self.step)
        real, weights = replay.shares(self.method, stage.number)
        batches = [replay.real_batch(images, self.config.batch, real, moment, self.like)]
        if self.teacher is not None:
            for position, (part, weight) in enumerate(zip(self.method.replays, weights, strict=True)):
                source, n = self.sources[part.source], self.config.replay_batch
                batches.append(
                    replay.replay_batch(part.target, position, weight, source, self.teacher, n, moment, self.like)
                )
        return replay.concatenate(batches)

    def take_step(self, images: Images, stage: Stage) -> Tensor:
        """Returns the mean loss of the real batch and the sum over replays of their weighted mean losses, (2,)."""
        lr = self.lr(self.step, stage.share * self.config.steps)
        batch = self.batch(images, stage)
        losses = training_step(self.model, self.optimizer, batch, self.penalty, lr, self.config.clip)
        self.step += 1
        real = losses[: self.config.batch].sum()
        return torch.stack([real, losses.sum() - real])

    # The end of a stage

    def draw(self, latents: Tensor, label: Tensor) -> Tensor:
        """Images of the model for an evaluation."""
        return replay.draw_images(self.model, latents, label, self.config.eval_steps)

    def evaluate(self, stage: Stage) -> list[Row]:
        """One row of R; see evaluation.py."""
        return evaluation.evaluate(self.draw, self.tools, self.data, self.config, stage.learnt, self.out)

    def remember(self, stage: Stage) -> None:
        """Freeze the teacher, refill the pools and measure the Fisher matrix: all that later tasks are held to."""
        learnt = [c for task in self.data.tasks[: stage.learnt] for c in task.classes]
        if self.method.replays:
            self.teacher = frozen_copy(self.model)
            for source in self.sources.values():
                source.refill(self.teacher, learnt, stage.number)
        if self.penalty is not None:
            images = self.task_images(stage, self.config.fisher_images)
            batches = fisher_batches(images, stage, self.config, self.like)
            generator = diffusion.stream(self.config.seed, "fisher", stage.number)
            task_lr = sum(self.lr(step, self.config.steps) for step in range(self.config.steps))
            statistics = self.penalty.learn(per_sample_loss, batches, generator, task_lr)
            self.log({"kind": "fisher", "task": stage.learnt, **statistics, "state_bytes": self.penalty.nbytes})

    def task_images(self, stage: Stage, part: str) -> Images:
        """Training or validation images of the classes of a stage."""
        return join([getattr(task, part) for task in self.data.tasks if set(task.classes) <= set(stage.classes)])

    # Records

    def log(self, row: Row) -> None:
        self.logs["metrics"].append(row)

    def save(self) -> None:
        """A checkpoint of this moment."""
        for log in self.logs.values():
            log.sync()
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        if self.step:
            for name, parameter in self.model.named_parameters():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        if self.teacher is not None:
            tensors.update({f"teacher/{name}": value for name, value in self.teacher.state_dict().items()})
        for source_name, source in self.sources.items():
            tensors.update({f"source/{source_name}/{name}": value for name, value in source.state().items()})
        if self.penalty is not None:
            tensors.update({f"penalty/{name}": value for name, value in self.penalty.state().items()})
        rows = {name: log.count for name, log in self.logs.items()}
        checkpoint.save(self.out / "checkpoints", Checkpoint(self.stage, self.step, rows, tensors))

    def resume(self) -> None:
        """Go back to the newest good checkpoint, or to the start if there is none."""
        saved, complaints = checkpoint.latest(self.out / "checkpoints")
        for line in complaints:
            self.say(line)
        if saved is None:
            for log in self.logs.values():
                log.keep(0)
            return
        self.stage, self.step = saved.stage, saved.step
        self.model.load_state_dict(saved.part("model"))
        moments = saved.part("optimizer")
        for name, parameter in self.model.named_parameters():
            if self.step:
                self.optimizer.state[parameter] = {
                    key: moments[f"{key}/{name}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
        if teacher := saved.part("teacher"):
            self.teacher = frozen_copy(self.model)
            self.teacher.load_state_dict(teacher)
        for name, source in self.sources.items():
            source.load_state(saved.part(f"source/{name}"))
        if self.penalty is not None:
            self.penalty.load_state(saved.part("penalty"))
        for name, log in self.logs.items():
            log.keep(saved.rows[name])
        self.say(f"resuming after {self.stage} finished stage(s) and {self.step} steps of the next")


def train(
    config: RunConfig,
    out: Path,
    data_root: Path = Path("data"),
    features: ExtractorName | Custom = "cnn",
    extractor_folder: Path | None = None,
    say: Say = print,
    advance: Advance = lambda done: None,
) -> Row:
    """Run `config` in the folder `out` from wherever it stands, and return its summary.

    FIDs are measured on `features`; extractors are kept and looked for in `extractor_folder`, by default `out`.
    """
    config = resolve(config)
    if (out / "summary.json").exists():
        check_folder(config, out)
        evaluation.check_finished(features, out)
        return dict(read_json(out / "summary.json"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    data = load(config, data_root)

    # The folder belongs to this configuration.
    check_folder(config, out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        tools = evaluation.instruments(features, data, extractor_folder or out, config.device)
        for line in tools.about(config, data):
            say(line)
        claim(config, out, tools.names())
        run = Run(config, out, data, tools, say)

        # To resume: the newest good checkpoint.
        run.resume()
        with TensorBoard(out / "tensorboard", steps_done(run)) as board:
            while run.stage < len(run.stages):
                run_stage(run, run.stages[run.stage], board, advance)
        return finish(run)


def run_stage(run: Run, stage: Stage, board: TensorBoard, advance: Advance) -> None:
    """Steps, evaluation, memory, checkpoint."""
    config, steps = run.config, stage.share * run.config.steps
    images = run.task_images(stage, "train")
    run.model.train()
    losses: list[Tensor] = []
    since = time.perf_counter()
    while run.step < steps:
        losses.append(run.take_step(images, stage))

        # Losses, at fixed steps, so that an interrupted run writes the same rows.
        at_checkpoint = run.step % config.checkpoint_every == 0 or run.step == steps
        if run.step % config.log_every == 0 or at_checkpoint:
            log_losses(run, stage, losses, (time.perf_counter() - since) / len(losses), board)
            advance(steps_done(run))
            losses, since = [], time.perf_counter()
        if at_checkpoint:
            run.save()
            since = time.perf_counter()

    run.model.eval()
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
    bad = torch.nonzero(~table.isfinite().all(1)).flatten()
    if len(bad):
        raise TrainingError(explain(run, stage, run.step - len(losses) + int(bad[0]) + 1))
    real, replayed = table.mean(0).tolist()
    run.log({"kind": "step", "stage": stage.number + 1, "step": run.step, "loss": real, "replay_loss": replayed})
    penalty = run.penalty.seconds if run.penalty is not None else []
    timing: Row = {"stage": stage.number + 1, "step": run.step, "step_ms": 1e3 * seconds}
    if penalty:
        timing["penalty_ms"] = 1e3 * sorted(penalty)[len(penalty) // 2]
        penalty.clear()
    run.logs["timings"].append(timing)
    board.scalars(steps_done(run), {"loss/real": real, "loss/replay": replayed})


def explain(run: Run, stage: Stage, step: int) -> str:
    config, penalty = run.config, run.method.penalty
    cause = f"the learning rate is likely too high: try --lr {config.lr / 3:.2g}"
    if penalty is not None and stage.number > 0 and penalty.mode == "gradient":
        cause = f"a stiff penalty in gradient mode is unstable: try lam={penalty.lam / 10:g} or the decoupled mode"
    return f"the loss is not finite at step {step} of stage {stage.number + 1}; {cause}, in a new folder"


def per_sample_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """The loss whose gradients make the Fisher matrix: (noised, t, label, noise) -> (N,)."""
    noised, t, label, noise = batch
    return diffusion.per_sample_loss(predict(model, noised, t, label), noise)


def fisher_batches(images: Images, stage: Stage, config: RunConfig, like: Tensor) -> list[tuple[Tensor, ...]]:
    """`fisher_samples` images of the task, in shuffled epochs, each with its own timestep and noise."""
    batches: list[tuple[Tensor, ...]] = []
    samples = config.fisher_samples or len(images.labels)
    for number, start in enumerate(range(0, samples, FISHER_BATCH)):
        moment = Moment(config.seed, stage.number, number)
        chosen = replay.epoch_batch(images, FISHER_BATCH, moment, "fisher epoch")
        n = min(FISHER_BATCH, samples - start)
        part = chosen.take(torch.arange(n))
        batches.append(replay.noise_up(part, moment.stream("fisher noise"), like))
    return batches


def finish(run: Run) -> Row:
    """Pictures and the summary, which marks the run as finished."""
    pictures.of_run(run.out)
    summary = report.summarise(run.out)
    write_json(run.out / "summary.json", summary)
    return summary


def steps_done(run: Run) -> int:
    return run.config.steps * sum(s.share for s in run.stages[: run.stage]) + run.step


def claim(config: RunConfig, out: Path, measured_with: dict[str, str]) -> None:
    """Write config.json, or see that the run goes on being measured with what it was begun with."""
    path = out / "config.json"
    if not path.exists():
        write_json(path, {"run": config.as_json(), **measured_with, "environment": environment()})
        return
    begun = read_json(path)
    for key, name in measured_with.items():
        if begun.get(key, name) != name:
            raise OptionError(
                f"the {key} is {name}, but the run in {str(out)!r} was begun with {begun[key]}; choose that one with "
                "--extractor and --extractor-folder"
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


def environment() -> dict[str, Any]:
    packages = ("crl-kernels", "diffusers", "torchmetrics", "torchvision", "scikit-learn", "numpy")
    versions: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    versions["torch"] = torch.__version__
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["threads"] = torch.get_num_threads()
    return versions
