"""What is run in each regime, and how every free number of it is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

BASELINE = "gd"
Borrowed = Literal["", "same lam", "same lam a", "same precision"]


class Arm(NamedTuple):
    """One method in one setting: a row of the report.

    With `lams`, its lam is the one of them with the lowest average FID on validation images of the tuning seed. With
    `candidates`, each a setting and a method, the arm is chosen among them in the same way. Without either, lam is
    borrowed from another arm, `model`: the same lam; the same product of lam and the mean curvature; or,
    among the lams that were tried for this method, the one whose drop of Adam's precision is closest to the model's.
    """

    setting: str
    method: str
    lams: tuple[float, ...] = ()
    borrowed: Borrowed = ""
    model: str = ""  # label of another arm
    candidates: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return f"{self.setting} {self.method}" + (f", {self.borrowed}" if self.borrowed else "")


@dataclass(frozen=True)
class Regime:
    """Settings and arms. Every setting has a run of the baseline; reports show no run of the tuning seed."""

    common: Mapping[str, Any]  # settings of every run
    settings: Mapping[str, Mapping[str, Any]]  # by name: what is different in them
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    tuning_seed: int = 100
    # A setting whose rate is chosen: the settings among which the baseline of the tuning seed chooses.
    chosen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    curve: tuple[int, ...] = ()  # steps a task of further runs of the baseline, in the settings of CURVE
    curve_seeds: tuple[int, ...] = (0, 1, 2)


CURVE = ("constant", "one-cycle")
LATER = ("later-0.5", "later-0.3", "later-0.1")
SGD = ("sgd-0.001", "sgd-0.003", "sgd-0.01")  # with 0.03 the loss is soon not finite
SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {},
    "one-cycle": {"lr_schedule": "one-cycle"},
    "ema": {"ema": 0.999},
    "ema-one-cycle": {"ema": 0.999, "lr_schedule": "one-cycle"},
    "ema-later-0.3": {"ema": 0.999, "lr_later": 0.3},
    **{name: {"lr_later": float(name.removeprefix("later-"))} for name in LATER},
    "twice-the-rate": {"lr": 0.006},
    "a-third-of-the-rate": {"lr": 0.001},
    "a-tenth-of-the-rate": {"lr": 0.0003},
    **{name: {"optimizer": "sgd", "lr": float(name.removeprefix("sgd-"))} for name in SGD},
}
COMMON = {
    **{"batch": 16, "replay_batch": 16, "lr": 0.003, "lr_schedule": "constant", "clip": 0.0, "fisher_samples": 4000},
    **{"checkpoint_every": 100_000, "log_every": 100, "device": "cpu"},
}
IN_GRADIENT, DECOUPLED = (300.0, 1000.0, 3000.0, 10000.0), (30.0, 300.0, 3000.0, 30000.0)
SEVERAL, DIAGONAL = (1000.0, 3000.0, 10000.0, 30000.0), (3.0, 30.0, 300.0, 1000.0)  # in the gradient
WITH_SGD = (1.0, 3.0, 10.0, 30.0)  # in the gradient; with 300 the loss is soon not finite
RANDOM, SLOPES, PRECONDITIONED = (3.0, 10.0, 30.0, 100.0), (3.0, 10.0, 30.0, 100.0), (0.001, 0.003, 0.01, 0.03)
RANK1 = Arm("constant", "gd+rank1:gradient", IN_GRADIENT)

# One arm for each system of `crl_diffusion.config.systems`, by name. Penalties are in the gradient, as in the papers.
L2, L2_WITH_REPLAY = (0.001, 0.01, 0.1, 1.0), (1e-6, 1e-5, 1e-4, 0.001)
DIAGONAL_WITH_REPLAY = (0.1, 1.0, 10.0, 100.0)
ALONE, RANK1_ALONE = (30.0, 300.0, 3000.0, 30000.0), (10.0, 100.0, 1000.0, 10000.0)
GUIDANCE, RANKS, SHARES = (0.3, 1.0, 3.0, 10.0), (1, 4, 16, 64), (0.1, 0.25, 0.5, 0.75)
TRUST_REGION = "fisher-10000"
SYSTEM_SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {},
    TRUST_REGION: {"fisher_samples": 10_000},
    **{f"guidance-{scale:g}": {"guidance": scale} for scale in GUIDANCE},
}


def interpolated(replayed: str) -> Arm:
    return Arm(
        "constant",
        f"{replayed}interpolate",
        candidates=tuple(("constant", f"{replayed}interpolate{w}") for w in SHARES),
    )


SYSTEM_ARMS: dict[str, Arm] = {
    "fine-tuning": Arm("constant", "fine-tune"),
    "joint-training": Arm("constant", "joint"),
    "generative-replay": Arm("constant", "replay"),
    "generative-distillation": Arm("constant", "masip"),
    "pooled-distillation": Arm("constant", BASELINE),
    "ddgr": Arm("constant", "ddgr", candidates=tuple((f"guidance-{scale:g}", "ddgr") for scale in GUIDANCE)),
    "ewc": Arm("constant", "diagonal:gradient", ALONE),
    "rank1-ewc": Arm("constant", "rank1:gradient", RANK1_ALONE),
    "ewc-guided-replay": Arm("constant", "replay+diagonal:gradient", DIAGONAL_WITH_REPLAY),
    "ewc-distillation": Arm("constant", "gd+diagonal:gradient", DIAGONAL),
    "rank1-ewc-distillation": RANK1,
    "trust-region": Arm(TRUST_REGION, "gd+rank1:gradient", borrowed="same lam", model=RANK1.label),
    "l2-anchor": Arm("constant", "l2:gradient", L2),
    "l2-average-anchor": Arm("constant", "l2-average:gradient", L2),
    "l2-distillation": Arm("constant", "gd+l2:gradient", L2_WITH_REPLAY),
    "l2-average-distillation": Arm("constant", "gd+l2-average:gradient", L2_WITH_REPLAY),
    "weight-interpolation": interpolated(""),
    "interpolated-replay": interpolated("replay+"),
    "interpolated-distillation": interpolated("gd+"),
    "adapters": Arm("constant", "adapters", candidates=tuple(("constant", f"adapters{rank}") for rank in RANKS)),
}
SYSTEMS_REGIME = "systems"
REGIMES = {
    SYSTEMS_REGIME: Regime(
        common={**COMMON, "data": "digits", "model": "mlp", "steps": 2000},
        settings=SYSTEM_SETTINGS,
        seeds=tuple(range(4)),
        arms=tuple(SYSTEM_ARMS.values()),
    ),
    "regime-mlp": Regime(
        common={**COMMON, "data": "digits", "model": "mlp", "steps": 2000},
        settings=SETTINGS,
        chosen={"sgd": SGD},
        seeds=tuple(range(10)),
        arms=(
            *(Arm("constant", method) for method in ("gd", "fine-tune", "joint")),
            *(Arm(setting, "gd") for setting in ("one-cycle", "ema", *LATER, "twice-the-rate", "sgd")),
            *(Arm(setting, "gd") for setting in ("ema-one-cycle", "ema-later-0.3")),
            *(Arm(setting, "gd") for setting in ("a-third-of-the-rate", "a-tenth-of-the-rate")),
            Arm("a-third-of-the-rate", "gd+rank1:gradient", IN_GRADIENT),
            Arm("one-cycle", "joint"),
            RANK1,
            Arm("constant", "gd+diagonal:gradient", DIAGONAL),
            *(Arm("constant", f"gd+{name}:gradient", SEVERAL) for name in ("rank10", "bands8")),
            Arm("constant", "gd+rank1:top,gradient", IN_GRADIENT),
            Arm("constant", "gd+rank1:signs,gradient", IN_GRADIENT),
            Arm("constant", "gd+rank1:random,gradient", RANDOM),
            *(Arm("constant", f"gd+{name}", DECOUPLED) for name in ("rank1", "diagonal", "rank10", "bands8")),
            Arm("constant", "gd+rank1:signs,gradient", borrowed="same lam", model=RANK1.label),
            Arm("constant", "gd+rank1:random,gradient", borrowed="same lam", model=RANK1.label),
            Arm("constant", "gd+rank1:random,gradient", borrowed="same precision", model=RANK1.label),
            Arm("constant", "gd+rank1:top,gradient", borrowed="same lam a", model=RANK1.label),
            Arm("constant", "gd+rank1:damping", IN_GRADIENT),
            Arm("constant", "gd+rank1:preconditioned", PRECONDITIONED),
            Arm("sgd", "gd+rank1:gradient", WITH_SGD),
            *(Arm(setting, "gd+rank1:gradient", IN_GRADIENT) for setting in ("ema", "one-cycle")),
            *(Arm(setting, "gd+bands8:slopes", SLOPES) for setting in ("constant", "ema", "one-cycle")),
        ),
        curve=(500, 1000, 4000, 8000),
    ),
    "regime-mlp-longer": Regime(
        common={**COMMON, "data": "digits", "model": "mlp", "steps": 4000},
        settings={name: SETTINGS[name] for name in ("constant", "one-cycle", "ema", "later-0.3")},
        seeds=tuple(range(10)),
        arms=(
            *(Arm(setting, "gd") for setting in ("constant", "one-cycle", "ema", "later-0.3")),
            RANK1,
            Arm("constant", "gd+rank1:damping", IN_GRADIENT),
            Arm("constant", "gd+rank1", DECOUPLED),
            *(Arm(setting, "gd+rank1:gradient", IN_GRADIENT) for setting in ("ema", "one-cycle")),
        ),
    ),
    "regime-digits": Regime(
        common={**COMMON, "data": "digits", "model": "mini", "lr": 0.001, "steps": 1500},
        settings={name: SETTINGS[name] for name in ("constant", "one-cycle", "ema", "later-0.3")},
        seeds=tuple(range(4)),
        arms=(
            *(Arm(setting, "gd") for setting in ("constant", "one-cycle", "ema", "later-0.3")),
            RANK1,
            Arm("constant", "gd+rank1:damping", IN_GRADIENT),
            Arm("constant", "gd+rank1:signs,gradient", borrowed="same lam", model=RANK1.label),
            Arm("constant", "gd+rank1", DECOUPLED),
            Arm("constant", "gd+diagonal:gradient", DIAGONAL),
            *(Arm(setting, "gd+rank1:gradient", IN_GRADIENT) for setting in ("ema", "one-cycle")),
        ),
        curve=(500, 3000, 6000),
        curve_seeds=(0,),
    ),
    "regime-mnist": Regime(
        common={**COMMON, "data": "mnist", "image_size": 16, "model": "mlp", "steps": 2000},
        settings={
            name: SETTINGS[name] for name in ("constant", "one-cycle", "ema", "later-0.3", "later-0.1", "ema-later-0.3")
        },
        seeds=tuple(range(8)),
        arms=(
            *(Arm("constant", method) for method in ("gd", "fine-tune", "joint")),
            *(Arm(setting, "gd") for setting in ("one-cycle", "ema", "later-0.3", "later-0.1", "ema-later-0.3")),
            RANK1,
            Arm("constant", "gd+rank1:damping", IN_GRADIENT),
            Arm("constant", "gd+rank1:signs,gradient", borrowed="same lam", model=RANK1.label),
            Arm("constant", "gd+rank1:random,gradient", RANDOM),
            Arm("constant", "gd+bands8:gradient", SEVERAL),
            Arm("constant", "gd+diagonal:gradient", DIAGONAL),
            *(Arm("constant", f"gd+{name}", DECOUPLED) for name in ("rank1", "bands8")),
            *(Arm(setting, "gd+rank1:gradient", IN_GRADIENT) for setting in ("ema", "one-cycle")),
            Arm("ema", "gd+rank1:damping", IN_GRADIENT),
            Arm("one-cycle", "gd+bands8", DECOUPLED),
            Arm("one-cycle", "gd+bands8:slopes", SLOPES),
        ),
        curve=(500, 1000, 4000),
        curve_seeds=(0, 1),
    ),
}
