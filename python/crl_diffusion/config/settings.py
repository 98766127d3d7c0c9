"""The frozen configuration of a run: settings, their checks, and each data set's defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from crl_diffusion.config.method import Method
from crl_diffusion.config.spelling import parse_method, spell
from crl_diffusion.errors import OptionError

DataName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "imagenet32", "folder"]
ModelName = Literal["mini", "tiny", "small", "paper"]
Device = Literal["auto", "cpu", "cuda"]
ExtractorName = Literal["cnn", "lenet", "inception"]


class DataPlan(NamedTuple):
    """What a data set is unless told otherwise: side of its images, tasks, classes of each."""

    image_size: int
    tasks: int
    classes_per_task: int
    classes: int  # 0: as many as the tasks have


DATA_PLANS: dict[str, DataPlan] = {
    "digits": DataPlan(8, 5, 2, 10),
    "mnist": DataPlan(16, 5, 2, 10),
    "fashion_mnist": DataPlan(16, 5, 2, 10),
    "cifar10": DataPlan(32, 5, 2, 10),
    "imagenet32": DataPlan(32, 20, 50, 1000),
    "folder": DataPlan(32, 5, 2, 0),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers, except its method and its seed."""

    data: DataName = "digits"
    """Data set: digits comes with scikit-learn, the others are read from --data-root; folder is any folder of images
    with train/<class>/ and test/<class>/ in it."""
    image_size: int = 0
    """Side of the images in pixels; 0 means the data set's default (digits 8, MNIST and FashionMNIST 16, others 32)."""
    tasks: int = 0
    """How many tasks to learn; 0 means the data set's default (5; imagenet32 20)."""
    classes_per_task: int = 0
    """Classes of each task; 0 means the data set's default (2; imagenet32 50)."""
    class_order: int = -1
    """Seed of the order in which classes arrive; -1 is the labels' own order."""
    per_class: int = 0
    """At most so many training images of each class, the first ones; 0 means all."""
    held_out: Literal["test", "validation"] = "test"
    """Which held-out images the evaluations compare with: test images, or, to choose lam and the like, validation
    images, which are taken from the training part."""
    model: ModelName = "tiny"
    """UNet preset: mini (0.16 M parameters) and tiny (0.36 M), made for a CPU, small (2.5 M) or paper (36 M, the rank-1
    paper's channels, for images of 32 pixels)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the 1000 timesteps."""
    steps: int = 300
    """Optimization steps a task."""
    epochs: int = 0
    """Passes over the images of a task, the last batch of each rounded up, instead of --steps; 0 means that --steps
    counts."""
    batch: int = 32
    """Real images a step."""
    replay_batch: int = 32
    """Replayed images a step, for each replay of the method."""
    lr: float = 2e-3
    """Adam's learning rate, or its peak; Adam starts afresh with every task."""
    lr_schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """Learning rate over a task: a rise and a long cosine down to 0, or always the same."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is scaled down to it. 0 means no limit."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights; 0 means none. After step n of a task the decay is at most
    n / (n + 9), so that a task's first weights are soon forgotten. At the end of a task the average becomes the model:
    it is evaluated, it is the teacher and the penalty's anchor, and the next task starts from it."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the network in training and in drawing images: bf16 and fp16 through autocast, with float32
    parameters, and with a gradient scaler for fp16; fp64 also for the parameters. Fisher matrices are estimated in the
    parameters' own precision."""
    pool: int = 100
    """Images that the teacher draws for each old class after every task."""
    pool_steps: int = 10
    """DDIM steps for the images of the pool."""
    fresh_steps: int = 2
    """DDIM steps for replay images that are drawn anew in every step."""
    eval_samples: int = 100
    """Images drawn for each class in an evaluation."""
    eval_steps: int = 10
    """DDIM steps for the images of an evaluation."""
    fisher_samples: int = 1000
    """Per-sample gradients for the Fisher matrix of one task, half for its directions and half for its curvatures; 0
    means every image of the task once."""
    fisher_estimate: Literal["held-out", "in-sample"] = "held-out"
    """Whether directions and curvatures come from different samples, or both from all of them, as in the paper."""
    fisher_images: Literal["train", "validation"] = "train"
    """Images of the task that the Fisher matrix is estimated from."""
    log_every: int = 20
    """Steps between two rows of losses in metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between two checkpoints within a task."""
    device: Device = "auto"
    """Where to train; auto takes a CUDA device if there is one."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run: settings, one method, one seed."""

    method: str
    """What is replayed and what is penalised: NAME or NAME:OPTION,... such as gd+rank1:gradient,lam=60; see the
    README."""
    seed: int = 0
    """Names the random streams; runs of one seed see identical batches, noise, timesteps and evaluation latents."""

    @property
    def recipe(self) -> Method:
        """The method's value."""
        return parse_method(self.method)

    def as_json(self) -> dict[str, Any]:
        """The resolved configuration as `config.json` keeps it."""
        recipe = asdict(self.recipe)
        recipe["replays"] = list(recipe["replays"])  # JSON knows no tuples
        return {**asdict(self), "recipe": recipe}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RunConfig:
        return cls(**{field.name: saved[field.name] for field in fields(cls)})


def planned(config: RunConfig) -> RunConfig:
    """The configuration with the data set's defaults and the method's one spelling filled in."""
    plan = DATA_PLANS[config.data]
    return replace(
        config,
        method=spell(config.method),
        image_size=config.image_size or plan.image_size,
        tasks=config.tasks or plan.tasks,
        classes_per_task=config.classes_per_task or plan.classes_per_task,
    )


def least_fisher_samples(config: RunConfig) -> int:
    """Samples that a task's Fisher matrix needs: as many as directions, in each half if halves are kept apart."""
    penalty = config.recipe.penalty
    if penalty is None:
        return 4
    return max(4, penalty.rank * (2 if config.fisher_estimate == "held-out" else 1))


def check(config: RunConfig) -> None:
    """Refuse what cannot run, naming the option, its value, what was expected and what to do."""

    def whole(name: str, low: int, high: int | None = None) -> None:
        value = getattr(config, name)
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"between {low} and {high}"
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")

    parse_method(config.method)
    for name in ("steps", "batch", "replay_batch", "pool", "log_every", "checkpoint_every"):
        whole(name, 1)
    for name in ("image_size", "tasks", "classes_per_task", "per_class", "epochs", "seed", "fisher_samples"):
        whole(name, 0)
    whole("class_order", -1)
    whole("eval_samples", 2)
    for name in ("pool_steps", "fresh_steps", "eval_steps"):
        whole(name, 1, 1000)
    least = least_fisher_samples(config)
    if 0 < config.fisher_samples < least:
        raise OptionError(
            f"--fisher-samples is {config.fisher_samples}; for {config.method} it must be at least {least}, or 0 for "
            "all images"
        )
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise OptionError(f"--lr is {config.lr}; it must be a finite number above 0")
    if not (math.isfinite(config.clip) and config.clip >= 0):
        raise OptionError(f"--clip is {config.clip}; it must be a finite number, 0 or more")
    if not 0 <= config.ema < 1:
        raise OptionError(f"--ema is {config.ema}; it must be at least 0 and less than 1")
    plan = DATA_PLANS[config.data]
    tasks, classes_per_task = config.tasks or plan.tasks, config.classes_per_task or plan.classes_per_task
    if 0 < plan.classes < tasks * classes_per_task:
        raise OptionError(
            f"--tasks is {tasks} and --classes-per-task is {classes_per_task}, but {config.data} has {plan.classes} "
            "classes; their product must not be larger"
        )
