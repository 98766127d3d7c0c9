"""Methods as values, and the frozen configuration of a run.

A method is what is replayed, what is penalised, and in which order classes arrive. Its parts are named here and given
their meaning in `replay.py` and `penalties.py`, which do not know one another; the training loop reads the parts and
never asks for a method's name. Nothing here imports torch, so that a mistyped option is answered at once.

A method is written NAME or NAME:OPTION,OPTION,...: `gd+bands8:top,slopes,gradient,lam=60` is generative distillation
with a penalty of eight bands of timesteps, top eigenvectors as directions, each task's slope kept, added to the
gradient, lam = 60. `rank<k>` and `bands<n>` stand for any number: METHODS lists the usual ones. Of two options of one
kind the last counts. `spell` writes every method in one way only, which names it in tables and folders.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

DataName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "imagenet32", "folder"]
ModelName = Literal["mini", "tiny", "small", "paper"]
Mode = Literal["decoupled", "gradient", "once", "alone"]
Direction = Literal["mean", "top", "random"]
Device = Literal["auto", "cpu", "cuda"]
ExtractorName = Literal["cnn", "lenet", "inception"]


class OptionError(ValueError):
    """An option that cannot be honoured: the command line prints its one line and exits with code 2."""


@dataclass(frozen=True)
class Replay:
    """One batch of old images in every step: where images come from, what the model is asked to predict on them."""

    source: Literal["pool", "fresh"]
    target: Literal["noise", "teacher"]
    weight: float = 1.0


@dataclass(frozen=True)
class Penalty:
    """(lam / 2) * sum over past tasks of the quadratic that a Fisher matrix defines around the old optimum.

    A low-rank matrix has `rank` directions for each of `bands` equal bands of timesteps: F = sum_s p_s F_s.
    """

    fisher: Literal["low_rank", "diagonal"]
    lam: float
    mode: Mode = "decoupled"
    rank: int = 1
    bands: int = 1
    direction: Direction = "mean"
    slopes: bool = False  # keep the first-order term u_k . mean gradient: it moves the anchor down the old task's slope


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
    """What is replayed, what is penalised, and the order in which classes arrive.

    Weights of the k-th task: "sum" trains on real + sum of replay.weight * replay; "tasks" on 1/k of the real loss and
    1 - 1/k of the replayed ones, so that every task seen so far counts alike.
    """

    replays: tuple[Replay, ...] = ()
    penalty: Penalty | None = None
    curriculum: Literal["continual", "joint"] = "continual"
    weights: Literal["sum", "tasks"] = "sum"


# A decoupled penalty pulls parameters back along a direction of curvature a with a time constant of 1 / (lr * lam * a)
# steps. Here that is about one task (mean lr 1e-3 * lam * a * 300 steps ~ 1): felt, and soft enough to learn the next
# one. After the first digits the rank-1 term had a = 0.13, and the diagonal's mean, weighted by itself, was 9e-4.
LOW_RANK_LAM = 20.0
DIAGONAL_LAM = 3000.0

POOL_NOISE, POOL_TEACHER = Replay("pool", "noise"), Replay("pool", "teacher")
REPLAYS: dict[str, Method] = {
    "": Method(),
    "replay": Method((POOL_NOISE,)),  # images of the old model as if they were data
    "gd": Method((POOL_TEACHER,)),  # generative distillation as the rank-1 paper describes it
    "replay+gd": Method((POOL_NOISE, POOL_TEACHER)),  # as its authors' code has it
    "masip": Method((Replay("fresh", "teacher"),), weights="tasks"),  # as arXiv 2311.14028 has it
}
FAMILIES: dict[str, Callable[[int], Penalty]] = {  # their names end in a number; there are 1000 timesteps to band
    "rank": lambda k: Penalty("low_rank", LOW_RANK_LAM, rank=k, direction="top"),
    "bands": lambda n: Penalty("low_rank", LOW_RANK_LAM, bands=n),
}
NUMBERED = re.compile(rf"({'|'.join(FAMILIES)})([2-9]|[1-9][0-9]{{1,2}}|1000)")
PENALTIES: dict[str, Penalty] = {
    "diagonal": Penalty("diagonal", DIAGONAL_LAM),
    "rank1": Penalty("low_rank", LOW_RANK_LAM),
    **{f"{family}{n}": FAMILIES[family](n) for family, n in (("rank", 10), ("rank", 50), ("bands", 8), ("bands", 16))},
}
METHODS: dict[str, Method] = {
    "fine-tune": Method(),
    "joint": Method(curriculum="joint"),
    **{name: method for name, method in REPLAYS.items() if name},
    **{
        f"{replayed}+{penalty}".strip("+"): replace(method, penalty=PENALTIES[penalty])
        for penalty in PENALTIES
        for replayed, method in REPLAYS.items()
    },
}


def parse_method(text: str) -> Method:
    """The method that NAME or NAME:OPTION,... stands for."""
    name, colon, options = text.partition(":")
    method = _named(name)
    if not colon:
        return method
    if method.penalty is None:
        raise OptionError(
            f"method {text!r}: {name} has no penalty, so {options!r} means nothing; options belong to methods that end "
            f"in {', '.join(penalty_names())}"
        )
    penalty = method.penalty
    for option in options.split(","):
        penalty = _with_option(penalty, option, text)
    if penalty.mode == "gradient" and math.isinf(penalty.lam):
        raise OptionError(f"method {text!r}: a gradient needs a finite lam; give one, or the decoupled mode")
    if penalty.mode == "alone" and not (penalty.slopes and math.isfinite(penalty.lam)):
        raise OptionError(f"method {text!r}: alone is the slopes' pull alone; it needs slopes and a finite lam")
    return replace(method, penalty=penalty)


def _named(name: str) -> Method:
    """The method of a name alone: one of METHODS, or REPLAY+FAMILY and a number."""
    if name in METHODS:
        return METHODS[name]
    replayed, plus, penalty = name.rpartition("+")
    family = NUMBERED.fullmatch(penalty)
    if family is None or replayed not in REPLAYS or (plus and not replayed):
        raise OptionError(
            f"method {name!r} is not known; choose {', '.join(n for n, m in METHODS.items() if m.penalty is None)}, or "
            f"a penalty ({', '.join(penalty_names())}; n from 2 to 1000), by itself or after one of "
            f"{', '.join(f'{replay}+' for replay in REPLAYS if replay)}"
        )
    return replace(REPLAYS[replayed], penalty=FAMILIES[family[1]](int(family[2])))


def penalty_names() -> list[str]:
    """All penalties, a family as one name."""
    return [*(name for name in PENALTIES if not NUMBERED.fullmatch(name)), *(f"{family}<n>" for family in FAMILIES)]


def _with_option(penalty: Penalty, option: str, text: str) -> Penalty:
    if option in get_args(Mode):
        return replace(penalty, mode=option)  # type: ignore[arg-type]
    if option.startswith("lam="):
        try:
            lam = float(option[4:])
        except ValueError:
            lam = math.nan
        if not lam >= 0:
            raise OptionError(f"method {text!r}: {option!r}; lam must be a number, 0 or more (inf is one)")
        return replace(penalty, lam=lam + 0.0)  # -0 becomes 0
    if penalty.fisher == "low_rank":
        if option == "slopes":
            return replace(penalty, slopes=True)
        if option in ("top", "random") or (option == "mean" and penalty.rank == 1):
            return replace(penalty, direction=option)  # type: ignore[arg-type]
    known = [*get_args(Mode), "lam=NUMBER"]
    if penalty.fisher == "low_rank":
        known += ["slopes", "top", "random"] + (["mean"] if penalty.rank == 1 else [])
    raise OptionError(f"method {text!r}: {option!r} is not an option of its penalty; choose among {', '.join(known)}")


def spell(text: str, with_lam: bool = True) -> str:
    """A method's one spelling: options that differ from the name's own, in a fixed order; without lam, if asked."""
    method, name = parse_method(text), text.partition(":")[0]
    if method.penalty is None:
        return name
    own, asked = _named(name).penalty, method.penalty
    assert own is not None
    words = []
    if asked.direction != own.direction:
        words.append(asked.direction)
    if asked.slopes:
        words.append("slopes")
    if asked.mode != own.mode:
        words.append(asked.mode)
    if with_lam and asked.lam != own.lam:
        short = f"{asked.lam:g}"
        words.append(f"lam={short if float(short) == asked.lam else repr(asked.lam)}")
    return f"{name}:{','.join(words)}" if words else name


def in_order(texts: Iterable[str]) -> list[str]:
    """Methods in the order in which tables show them: without a penalty, then penalties from simple to rich."""

    def key(text: str) -> tuple[Any, ...]:
        method = parse_method(text)
        bare, known = replace(method, penalty=None), [METHODS["fine-tune"], METHODS["joint"], *REPLAYS.values()]
        replayed = known.index(bare) if bare in known else len(known)
        p = method.penalty
        if p is None:
            return (False, replayed, text)
        return (True, p.fisher != "diagonal", p.bands, p.rank, replayed, p.direction, p.slopes, p.mode, p.lam, text)

    return sorted(dict.fromkeys(texts), key=key)


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


def task_classes(config: RunConfig) -> list[tuple[int, ...]]:
    """Classes of each task: (0, 1), (2, 3), ..., or the same of a shuffled order."""
    config = planned(config)
    order = list(range(DATA_PLANS[config.data].classes or config.tasks * config.classes_per_task))
    if config.class_order >= 0:
        random.Random(config.class_order).shuffle(order)
    size = config.classes_per_task
    return [tuple(order[size * i : size * (i + 1)]) for i in range(config.tasks)]


def stages(config: RunConfig) -> list[Stage]:
    return CURRICULA[config.recipe.curriculum](task_classes(config))


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
    wanted = planned(config)
    classes = DATA_PLANS[config.data].classes
    if classes and wanted.tasks * wanted.classes_per_task > classes:
        raise OptionError(
            f"--tasks is {wanted.tasks} and --classes-per-task is {wanted.classes_per_task}, but {config.data} has "
            f"{classes} classes; their product must not be larger"
        )
