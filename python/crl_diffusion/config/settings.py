"""The frozen configuration of a run: settings, their checks, and the defaults of each data set."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from crl_diffusion.config.method import OF_ADAM, Method
from crl_diffusion.config.spelling import VARIED, label, parse_method
from crl_diffusion.errors import OptionError

DataName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "imagenet32", "folder"]
ModelName = Literal["mlp", "mini", "tiny", "small", "paper"]
Device = Literal["auto", "cpu", "cuda"]
ExtractorName = Literal["cnn", "lenet", "inception"]


class DataPlan(NamedTuple):
    """Defaults of a data set: side of its images in pixels, number of tasks, classes in each task."""

    image_size: int
    tasks: int
    classes_per_task: int
    classes: int  # in the data set; 0: not known in advance


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
    """Everything that determines the results of a run, except its method and its seed."""

    data: DataName = "digits"
    """Data set. digits comes with scikit-learn. The others are read from --data-root. folder is any folder with a
    folder of images for each class, or with train/<class>/ and test/<class>/. Without test, one image in five of each
    class is held out."""
    skip_unreadable: bool = False
    """With --data folder, leave out images that cannot be read. By default they are an error that names them."""
    image_size: int = 0
    """Side of the images in pixels. 0 means the data set's default: digits 8, MNIST and FashionMNIST 16, others 32."""
    tasks: int = 0
    """Number of tasks. 0 means the data set's default: 5, or 20 for imagenet32. A folder with fewer than 10 classes has
    tasks of 2 classes if that comes out even, or of 1."""
    classes_per_task: int = 0
    """Number of classes in each task. 0 means the data set's default: 2, or 50 for imagenet32, or what --tasks leaves
    of a folder."""
    class_order: int = -1
    """Random seed for the order of the classes. -1 keeps the order of the labels."""
    per_class: int = 0
    """Largest number of training images of each class; the first ones are used. 0 means all."""
    held_out: Literal["test", "validation"] = "test"
    """Images that evaluations compare with. Choose validation to tune lam and other settings: these images are taken
    from the training images, so the test images stay unseen."""
    model: ModelName = "tiny"
    """Network. mlp is a residual multilayer perceptron (0.1 M parameters at 8 pixels), the fastest, for images of 8 or
    16 pixels. The others are UNets: mini (0.16 M) and tiny (0.36 M) suit a CPU; small has 2.5 M; paper has 36 M, the
    channels of the rank-1 paper, and is meant for images of 32 pixels."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule over the 1000 timesteps."""
    steps: int = 300
    """Optimization steps of each task."""
    epochs: int = 0
    """Passes over the training images of each task, used instead of --steps. The number of steps of each
    pass is rounded up. 0 means that --steps is used."""
    batch: int = 32
    """Real images in each step."""
    replay_batch: int = 32
    """Replayed images in each step, for each replay of the method."""
    lr: float = 2e-3
    """Learning rate; the peak value if --lr-schedule is one-cycle. Each task starts with a new optimizer."""
    lr_later: float = VARIED["lr_later"]
    """Learning rate of all tasks after the first, as a share of --lr: with 0.1, a tenth of it."""
    lr_schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """Learning rate within a task: one-cycle rises for a tenth of the steps and then falls to 0 along a cosine;
    constant does not change."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer. adam has the decay rates 0.9 and 0.999. sgd is stochastic gradient descent with momentum 0.9; its
    --lr is on another scale than Adam's and has to be tuned."""
    clip: float = 1.0
    """Largest norm of the gradient. Longer gradients are scaled down to this norm. 0 means no clipping."""
    ema: float = VARIED["ema"]
    """Decay of an exponential moving average (EMA) of the weights. 0 means no average. After step n of a task the decay
    is at most n / (n + 9), so the weights from the start of the task soon lose their influence. At the end of a task
    the average replaces the model's weights. Evaluation, the teacher, the penalty's anchor and the next task all use
    these weights."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """Arithmetic of the network, in training and in sampling. bf16 and fp16 use autocast and keep the parameters in
    float32; fp16 also uses a gradient scaler. fp64 changes the parameters too. Fisher matrices are estimated in the
    precision of the parameters."""
    pool: int = 100
    """Images in the replay pool for each old class. The teacher draws them after every task."""
    pool_steps: int = 10
    """DDIM steps for the images of the pool."""
    pool_latents: Literal["per-class", "shared"] = "per-class"
    """Starting noise of the images of the pool. per-class draws it for every class and task; shared uses the same noise
    for all classes and all tasks, as the code of the rank-1 paper does."""
    fresh_steps: int = 2
    """DDIM steps for replay images that are drawn in every training step (method masip)."""
    guidance: float = 1.0
    """Strength of the classifier that guides the images of a pool (methods ddgr and guided-gd). 0 means no guidance."""
    eval_samples: int = 100
    """Images drawn for each class in an evaluation."""
    eval_steps: int = 10
    """DDIM steps for the images of an evaluation."""
    fisher_samples: int = 1000
    """Per-sample gradients for the Fisher matrix of each task. With --fisher-estimate held-out, half of them determine
    the directions and the other half the curvatures. 0 means every image of the task once."""
    fisher_estimate: Literal["held-out", "in-sample"] = "held-out"
    """held-out estimates directions and curvatures from different samples. in-sample uses all samples for both, as the
    paper does."""
    fisher_images: Literal["train", "validation"] = "train"
    """Images of the task that the Fisher matrix is estimated from."""
    log_every: int = 20
    """Steps between two rows of losses in metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between two checkpoints within a task."""
    device: Device = "auto"
    """Device for training. auto means CUDA if a CUDA device is available, otherwise the CPU."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One run: settings, one method, one seed."""

    method: str
    """What is replayed and what is penalised: NAME or NAME:OPTION,..., for example gd+rank1:gradient,lam=60.
    `crl-diffusion list` shows all names and options. After each task, a run prints the lam at which drift would halve
    within the next one: where to begin a sweep of lam. The options once, alone, preconditioned, damping,
    random and signs are controls for experiments, not methods to use."""
    seed: int = 0
    """Random seed. Runs with the same seed see the same batches, noise, timesteps and evaluation latents."""

    @property
    def recipe(self) -> Method:
        """The parts of the method."""
        return parse_method(self.method)

    def task_steps(self, images: int) -> int:
        """Optimization steps of a task with this number of training images."""
        return self.epochs * math.ceil(images / self.batch) if self.epochs else self.steps

    @property
    def label(self) -> str:
        """What the run is called in a comparison: its method and, if they are not the defaults, the settings in which
        the runs of a comparison may differ."""
        return label(self.method, vars(self))

    def as_json(self) -> dict[str, Any]:
        """The configuration as `config.json` stores it. Options of ADDED are in it where they differ from their
        defaults, so a run of an earlier version has the same configuration and can be resumed."""
        recipe = asdict(self.recipe)
        recipe["replays"] = list(recipe["replays"])  # JSON knows no tuples
        recipe = {name: x for name, x in recipe.items() if name not in ADDED_PARTS or x != ADDED_PARTS[name]}
        values = {name: x for name, x in asdict(self).items() if x != ADDED.get(name)}
        return {**values, "recipe": recipe}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> RunConfig:
        saved = {**ADDED, **saved}
        return cls(**{field.name: saved[field.name] for field in fields(cls)})


# Options that earlier versions did not have; these values are what they did.
ADDED: dict[str, Any] = {
    "guidance": 1.0,
    "lr_later": 1.0,
    "optimizer": "adam",
    "pool_latents": "per-class",
    "skip_unreadable": False,
}
ADDED_PARTS: dict[str, Any] = {"interpolation": 0.0, "adapter_rank": 0}  # the same for the parts of a method


def least_fisher_samples(config: RunConfig) -> int:
    """Smallest number of samples for the Fisher matrix of a task: its number of directions, twice if held-out."""
    penalty = config.recipe.penalty
    if penalty is None:
        return 4
    return max(4, penalty.rank * (2 if config.fisher_estimate == "held-out" else 1))


LARGEST = 2**63 - 1  # integer of a record


def check(config: RunConfig) -> None:
    """OptionError if the configuration cannot run. It names the option, its value, what was expected and what to do."""

    def require_range(name: str, low: int, high: int = LARGEST) -> None:
        value = getattr(config, name)
        if not low <= value <= high:
            wanted = f"at least {low}" if value < low and high == LARGEST else f"between {low} and {high}"
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")

    parse_method(config.method)
    for name in ("steps", "batch", "replay_batch", "pool", "log_every", "checkpoint_every"):
        require_range(name, 1)
    for name in ("image_size", "tasks", "classes_per_task", "per_class", "epochs", "seed", "fisher_samples"):
        require_range(name, 0)
    require_range("class_order", -1)
    require_range("eval_samples", 2)
    for name in ("pool_steps", "fresh_steps", "eval_steps"):
        require_range(name, 1, 1000)
    least = least_fisher_samples(config)
    if 0 < config.fisher_samples < least:
        raise OptionError(
            f"--fisher-samples is {config.fisher_samples}; for {config.method} it must be at least {least}, or 0 for "
            "all images"
        )
    if not (math.isfinite(config.lr) and config.lr > 0):
        raise OptionError(f"--lr is {config.lr}; it must be a finite number above 0")
    if not (math.isfinite(config.lr_later) and config.lr_later > 0):
        raise OptionError(f"--lr-later is {config.lr_later}; it must be a finite number above 0")
    penalty = config.recipe.penalty
    if config.optimizer != "adam" and penalty is not None and penalty.mode in OF_ADAM:
        raise OptionError(
            f"--optimizer is {config.optimizer}, and the mode {penalty.mode} of {config.method} needs Adam's second "
            "moments; use --optimizer adam, or the mode gradient or decoupled"
        )
    if not (math.isfinite(config.clip) and config.clip >= 0):
        raise OptionError(f"--clip is {config.clip}; it must be a finite number, 0 or more")
    if not 0 <= config.ema < 1:
        raise OptionError(f"--ema is {config.ema}; it must be at least 0 and less than 1")
    if not (math.isfinite(config.guidance) and config.guidance >= 0):
        raise OptionError(f"--guidance is {config.guidance}; it must be a finite number, 0 or more")
    if config.skip_unreadable and config.data != "folder":
        raise OptionError(f"--skip-unreadable is for --data folder, but --data is {config.data}; leave it out")
    plan = DATA_PLANS[config.data]
    tasks, classes_per_task = config.tasks or plan.tasks, config.classes_per_task or plan.classes_per_task
    if 0 < plan.classes < tasks * classes_per_task:
        raise OptionError(
            f"--tasks is {tasks} and --classes-per-task is {classes_per_task}, but {config.data} has {plan.classes} "
            "classes; their product must not be larger"
        )
