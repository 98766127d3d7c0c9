"""Methods as values: what is replayed, what is penalised, and in which order classes arrive.

The parts of a method are defined here and implemented in `methods/replay.py` and `methods/penalties.py`, which do not
import one another. The training loop reads the parts and never the name of a method. Nothing in `config/` imports
torch, so the command line reports a mistyped option at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["decoupled", "gradient", "preconditioned", "damping", "once", "alone"]
OF_ADAM: tuple[Mode, ...] = ("preconditioned", "damping")  # modes that need Adam's second moments
Direction = Literal["mean", "top", "random", "signs"]


@dataclass(frozen=True)
class Replay:
    """One batch of old images in every step: where the images come from and what the model must predict on them."""

    source: Literal["pool", "fresh", "guided"]
    target: Literal["noise", "teacher"]
    weight: float = 1.0


@dataclass(frozen=True)
class Penalty:
    """(lam / 2) * sum over past tasks of (theta - theta_k)^T F_k (theta - theta_k), with Fisher matrix F_k and anchor
    theta_k.

    A low-rank F has `rank` directions for each of `bands` equal bands of timesteps: F = sum_s p_s F_s, where p_s is the
    share of samples in band s. The modes preconditioned, damping, once and alone and the directions random and
    signs are controls for experiments.

    l2 and l2_average estimate nothing: F is the identity. l2 is (lam / 2) |theta - theta_k|^2 with the last task's
    theta_k only. l2_average is (lam / 2) |theta - mean of all theta_k|^2: the sum over k with strength lam / k, but for
    a constant, so lam means the same after any number of tasks.
    """

    fisher: Literal["low_rank", "diagonal", "l2", "l2_average"]
    lam: float
    mode: Mode = "decoupled"
    rank: int = 1
    bands: int = 1
    direction: Direction = "mean"
    slopes: bool = False  # keep the first-order term u_k . mean gradient: it moves the anchor down the old task's slope

    @property
    def is_estimated(self) -> bool:
        """Whether F is estimated from gradients of the loss."""
        return self.fisher in ("low_rank", "diagonal")


@dataclass(frozen=True)
class Method:
    """What is replayed, what is penalised, how weights are interpolated, the order in which classes arrive, and the
    weights that a task trains.

    At the end of every task after the first, theta becomes (1 - interpolation) theta + interpolation theta_old, with
    the weights theta_old that the task before it ended with.

    Loss of the k-th task: with weights "sum", real loss + sum of replay.weight * replay loss; with "tasks", 1/k of the
    real loss + (1 - 1/k) of the replay losses, so every task so far has the same weight.
    """

    replays: tuple[Replay, ...] = ()
    penalty: Penalty | None = None
    curriculum: Literal["continual", "joint"] = "continual"
    weights: Literal["sum", "tasks"] = "sum"
    interpolation: float = 0.0
    adapter_rank: int = 0  # of the low-rank adapters that each task after the first trains, and nothing else; 0: none


# A decoupled penalty pulls parameters back along a direction of curvature a with a time constant of 1 / (lr * lam * a)
# steps. These values make it about one task (mean lr 1e-3 * lam * a * 300 steps ~ 1): strong enough to matter, weak
# enough to learn the next task. After the first digits the rank-1 term had a = 0.13, and the diagonal's mean, weighted
# by itself, was 9e-4. An L2 penalty has a = 1 along every direction.
LOW_RANK_LAM = 20.0
DIAGONAL_LAM = 3000.0
L2_LAM = 3.0
L2_MODES: tuple[Mode, ...] = ("decoupled", "gradient")

POOL_NOISE, POOL_TEACHER = Replay("pool", "noise"), Replay("pool", "teacher")
REPLAYS: dict[str, Method] = {
    "": Method(),
    "replay": Method((POOL_NOISE,)),  # images of the old model, used as data
    "gd": Method((POOL_TEACHER,)),  # generative distillation as the rank-1 paper describes it
    "replay+gd": Method((POOL_NOISE, POOL_TEACHER)),  # generative distillation as in its authors' code
    "masip": Method((Replay("fresh", "teacher"),), weights="tasks"),  # as in arXiv 2311.14028
    "ddgr": Method((Replay("guided", "noise"),)),  # DDGR (Gao & Liu, ICML 2023); `SYSTEMS` says how it differs
    "guided-gd": Method((Replay("guided", "teacher"),)),
}
FAMILIES: dict[str, Callable[[int], Penalty]] = {  # names that end in a number; at most 1000, the number of timesteps
    "rank": lambda k: Penalty("low_rank", LOW_RANK_LAM, rank=k, direction="top"),
    "bands": lambda n: Penalty("low_rank", LOW_RANK_LAM, bands=n),
}
NUMBERED = re.compile(rf"({'|'.join(FAMILIES)})([2-9]|[1-9][0-9]{{1,2}}|1000)")
INTERPOLATION = re.compile(r"interpolate(0\.[0-9]*[1-9])")  # after a method's name: gd+interpolate0.5
PENALTIES: dict[str, Penalty] = {
    "l2": Penalty("l2", L2_LAM),
    "l2-average": Penalty("l2_average", L2_LAM),
    "diagonal": Penalty("diagonal", DIAGONAL_LAM),
    "rank1": Penalty("low_rank", LOW_RANK_LAM),
    **{f"{family}{n}": FAMILIES[family](n) for family, n in (("rank", 10), ("rank", 50), ("bands", 8), ("bands", 16))},
}
ADAPTERS = re.compile("adapters([1-9][0-9]{0,2}|1000)")  # names of methods with adapters, which end in their rank
METHODS: dict[str, Method] = {
    "fine-tune": Method(),
    "joint": Method(curriculum="joint"),
    "adapters4": Method(adapter_rank=4),
    **{name: method for name, method in REPLAYS.items() if name},
    **{
        f"{replayed}+{penalty}".strip("+"): replace(method, penalty=PENALTIES[penalty])
        for penalty in PENALTIES
        for replayed, method in REPLAYS.items()
    },
}
