"""Methods as values, and the frozen configuration of a run.

A method is what is replayed, what is penalised, and in which order classes arrive. Its parts are named here and given
their meaning in `replay.py` and `penalties.py`, which do not know one another; the training loop reads the parts and
never asks for a method's name. Nothing here imports torch, so that a mistyped option is answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

DataName = Literal["digits", "mnist", "fashion_mnist"]
ModelName = Literal["tiny", "small", "paper"]
MethodName = Literal["fine-tune", "joint", "rank1", "gd", "gd+diagonal", "gd+rank1"]
Mode = Literal["decoupled", "gradient"]
Device = Literal["auto", "cpu", "cuda"]


class OptionError(ValueError):
    """An option that cannot be honoured: the command line prints its one line and exits with code 2."""


@dataclass(frozen=True)
class Replay:
    """One batch of old images in every step: where images come from, what the model is asked to predict on them."""

    source: Literal["pool"]
    target: Literal["noise", "teacher"]
    weight: float = 1.0


@dataclass(frozen=True)
class Penalty:
    """(lam / 2) * sum over past tasks of the quadratic that a Fisher matrix defines around the old optimum."""

    fisher: Literal["rank1", "diagonal"]
    lam: float
    mode: Mode = "decoupled"


class Stage(NamedTuple):
    """One stretch of training on one set of classes with a fresh optimizer, followed by an evaluation."""

    number: int  # from 0
    classes: tuple[int, ...]
    learnt: int  # tasks that the model should know at the end of the stage
    share: int  # length, in units of the steps of one task


def continual(tasks: Sequence[tuple[int, ...]]) -> list[Stage]:
    """One stage a task, in order, each seeing its own classes only."""
    return [Stage(i, classes, i + 1, 1) for i, classes in enumerate(tasks)]


def joint(tasks: Sequence[tuple[int, ...]]) -> list[Stage]:
    """One stage with all classes and as many steps as all tasks together: the upper bound, not continual."""
    return [Stage(0, tuple(c for classes in tasks for c in classes), len(tasks), len(tasks))]


CURRICULA: dict[str, Callable[[Sequence[tuple[int, ...]]], list[Stage]]] = {"continual": continual, "joint": joint}


@dataclass(frozen=True)
class Method:
    """What is replayed, what is penalised, and the order in which classes arrive."""

    replays: tuple[Replay, ...] = ()
    penalty: Penalty | None = None
    curriculum: Literal["continual", "joint"] = "continual"


# A decoupled penalty pulls parameters back along a direction of curvature a with a time constant of 1 / (lr * lam * a)
# steps. Here that is about one task (mean lr 1e-3 * lam * a * 300 steps ~ 1): felt, and soft enough to learn the next
# one. After the first digits the rank-1 term had a = 0.13, and the diagonal's mean, weighted by itself, was 9e-4.
RANK1_LAM = 20.0
DIAGONAL_LAM = 3000.0
DISTILLATION = Replay("pool", "teacher")

METHODS: dict[str, Method] = {
    "fine-tune": Method(),
    "joint": Method(curriculum="joint"),
    "rank1": Method(penalty=Penalty("rank1", RANK1_LAM)),
    "gd": Method((DISTILLATION,)),
    "gd+diagonal": Method((DISTILLATION,), Penalty("diagonal", DIAGONAL_LAM)),
    "gd+rank1": Method((DISTILLATION,), Penalty("rank1", RANK1_LAM)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers, except its method and its seed."""

    data: DataName = "digits"
    """Data set: digits comes with scikit-learn; mnist and fashion_mnist are read from --data-root."""
    image_size: int = 0
    """Side of the images in pixels; 0 means the data set's default (digits 8, the others 16; they may be 32)."""
    tasks: int = 5
    """How many tasks of two classes each to learn, in the labels' original order."""
    model: ModelName = "tiny"
    """UNet preset: tiny (0.36 M parameters, made for a CPU), small (2.5 M) or paper (34 M, the rank-1 paper's channels,
    for images of 32 pixels)."""
    steps: int = 300
    """Optimization steps a task."""
    batch: int = 32
    """Real images a step."""
    replay_batch: int = 32
    """Replayed images a step, for each replay of the method."""
    lr: float = 2e-3
    """Peak of Adam's one-cycle learning rate; Adam starts afresh with every task."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it."""
    pool: int = 100
    """Images that the teacher draws for each old class after every task."""
    pool_steps: int = 10
    """DDIM steps for the images of the pool."""
    eval_samples: int = 100
    """Images drawn for each class in an evaluation."""
    eval_steps: int = 10
    """DDIM steps for the images of an evaluation."""
    fisher_samples: int = 1000
    """Per-sample gradients for the Fisher matrix of one task, half for its direction and half for its curvature."""
    lam: float | None = None
    """Strength of the penalty; by default the method's own."""
    mode: Mode | None = None
    """How the penalty acts: decoupled (its own step after Adam's) or gradient (added before Adam); by default the
    method's own."""
    log_every: int = 20
    """Steps between two rows of losses in metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between two checkpoints within a task."""
    device: Device = "auto"
    """Where to train; auto takes a CUDA device if there is one."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run: settings, one method, one seed."""

    method: MethodName
    """What is replayed and what is penalised; see the README for each."""
    seed: int = 0
    """Names the random streams; runs of one seed see identical batches, noise, timesteps and evaluation latents."""

    @property
    def recipe(self) -> Method:
        """The method's value, with the penalty that --lam and --mode ask for."""
        method = METHODS[self.method]
        if method.penalty is None:
            return method
        penalty = method.penalty
        if self.lam is not None:
            penalty = replace(penalty, lam=self.lam)
        if self.mode is not None:
            penalty = replace(penalty, mode=self.mode)
        return replace(method, penalty=penalty)

    def as_json(self) -> dict[str, Any]:
        """The resolved configuration as `config.json` keeps it."""
        recipe = asdict(self.recipe)
        recipe["replays"] = list(recipe["replays"])  # JSON knows no tuples
        return {**asdict(self), "recipe": recipe}


CLASSES_PER_TASK = 2
MAX_TASKS = 5


def task_classes(tasks: int) -> list[tuple[int, ...]]:
    """Classes of each task: (0, 1), (2, 3), ..."""
    return [tuple(range(CLASSES_PER_TASK * i, CLASSES_PER_TASK * (i + 1))) for i in range(tasks)]


def stages(config: RunConfig) -> list[Stage]:
    return CURRICULA[config.recipe.curriculum](task_classes(config.tasks))


def check(config: RunConfig) -> None:
    """Refuse what cannot run, naming the option, its value, what was expected and what to do."""

    def whole(name: str, low: int, high: int | None = None) -> None:
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"between {low} and {high}"
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")

    whole("tasks", 1, MAX_TASKS)
    for name in ("steps", "batch", "replay_batch", "pool", "log_every", "checkpoint_every"):
        whole(name, 1)
    whole("eval_samples", 2)
    whole("fisher_samples", 4)
    whole("pool_steps", 1, 1000)
    whole("eval_steps", 1, 1000)
    whole("image_size", 0)
    whole("seed", 0)
    for name in ("lr", "clip"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"--{name} is {value}; it must be a finite number above 0")
    if config.lam is not None and not (math.isfinite(config.lam) and config.lam >= 0):
        raise OptionError(f"--lam is {config.lam}; it must be a finite number, 0 or more")
    if METHODS[config.method].penalty is None:
        for name in ("lam", "mode"):
            if getattr(config, name) is not None:
                penalised = ", ".join(n for n, m in METHODS.items() if m.penalty is not None)
                raise OptionError(
                    f"--{name} is {getattr(config, name)}, but {config.method} has no penalty; "
                    f"leave it out, or choose one of {penalised}"
                )
