"""The six predictions of a regime and their verdicts, by rules that were fixed before the final runs.

The hypothesis: what a rank-1 penalty in the gradient gains under Adam at a constant rate, it gains because its
gradient enters Adam's second moment v and shortens every step, not because of its direction. Differences are paired by
seed; p is that of the exact two-sided sign-flip test. A gain is a lower average FID than the baseline's, distillation
alone.

A difference is shown if p <= LIMIT. "Gains nothing" is supported if no gain is shown and the 95 % interval excludes
half of what rank 1 in the gradient gains at the constant rate. Where neither is so, the prediction is open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.seeds import Estimate

from .definitions import LATER
from .runs import Result

LIMIT = 0.01
Verdict = Literal["supported", "refuted", "open"]
Groups = Mapping[str, Mapping[int, Result]]  # label of an arm -> its results by seed
FID: Callable[[Result], float] = lambda result: result.average_fid  # noqa: E731
FORGETTING: Callable[[Result], float] = lambda result: result.forgetting  # noqa: E731


class Difference(NamedTuple):
    """Paired differences of two arms, first less second."""

    text: str
    values: Sequence[float]

    @property
    def estimate(self) -> Estimate:
        return seeds.estimate(self.values)

    @property
    def p(self) -> float:
        test = seeds.sign_flip(self.values)
        return 1.0 if test is None else test.p

    @property
    def shown(self) -> bool:
        return self.p <= LIMIT

    @property
    def lower(self) -> bool:
        """Shown to be below 0."""
        return self.shown and self.estimate.mean < 0

    @property
    def higher(self) -> bool:
        return self.shown and self.estimate.mean > 0


class Prediction(NamedTuple):
    """A prediction, the differences that test it, and what follows from them."""

    text: str
    rule: str
    differences: Sequence[Difference]
    verdict: Verdict


def difference(groups: Groups, first: str, second: str, measure: Callable[[Result], float], unit: str) -> Difference:
    a, b = groups[first], groups[second]
    values = [measure(a[seed]) - measure(b[seed]) for seed in sorted(a.keys() & b.keys())]
    return Difference(f"{unit}: {first} less {second}", values)


def gains_nothing(tests: Sequence[Difference], gain: float) -> Verdict:
    """Of arms that should be no better than their baselines; `gain` is positive."""
    if any(test.lower for test in tests):
        return "refuted"
    lows = [test.estimate.low for test in tests]
    return "supported" if all(low is not None and low > -gain / 2 for low in lows) else "open"


C, GD, RANK1 = "constant ", "gd", "gd+rank1:gradient"


def predictions(groups: Groups, lowered: str) -> list[Prediction]:
    """The six predictions, of the arms that have run. `lowered` is the label of the lowered rate that the tuning seed
    prefers."""

    def fid(first: str, second: str) -> Difference:
        return difference(groups, first, second, FID, "average FID")

    def forgetting(first: str, second: str) -> Difference:
        return difference(groups, first, second, FORGETTING, "forgetting")

    base, rank1, random = C + GD, C + RANK1, C + "gd+rank1:random,gradient"
    gain = fid(rank1, base)
    size = max(0.0, -gain.estimate.mean)
    result = []

    # 1
    forgets = Difference(f"forgetting of {base}", [FORGETTING(r) for _, r in sorted(groups[base].items())])
    rate = forgetting("twice-the-rate gd", base)
    calm = [forgetting(f"{name} gd", base) for name in ("one-cycle", "ema")]
    smaller = all(
        np.mean([FORGETTING(r) for r in groups[f"{name} gd"].values()]) < forgets.estimate.mean / 3
        for name in ("one-cycle", "ema")
    )
    verdict: Verdict = "open"
    if forgets.higher and rate.higher and all(d.lower for d in calm) and smaller:
        verdict = "supported"
    elif forgets.lower or rate.lower or any(d.higher for d in calm):
        verdict = "refuted"
    result.append(
        Prediction(
            "At a constant rate distillation alone forgets, and more so with a larger rate; with one-cycle or an EMA "
            "it hardly does.",
            "supported if it forgets, forgets more at twice the rate, and less than a third as much with one-cycle and "
            "with the EMA, all shown; refuted if one of these differences is shown to have the other sign",
            [forgets, rate, *calm],
            verdict,
        )
    )

    # 2
    same = [fid(label, rank1) for label in (f"{random}, same precision", f"{C}gd+rank1:top,gradient, same lam a")]
    own = fid(random, rank1)
    if not gain.lower:
        verdict = "refuted" if gain.higher else "open"
    elif any(d.higher for d in (*same, own)):
        verdict = "refuted"
    else:
        highs = [d.estimate.high for d in (*same, own)]
        verdict = "supported" if all(high is not None and high < size / 2 for high in highs) else "open"
    result.append(
        Prediction(
            "Rank 1 in the gradient gains, and its gain follows the drop of Adam's precision, whatever the direction.",
            "supported if rank 1 gains, and a random direction with the same drop of precision, a random direction "
            "with its own best lam, and the top eigenvector with the same lam a are each worse by less than half of "
            "that gain (95 % interval); refuted if one of them is shown to be worse, or rank 1 to gain nothing",
            [gain, *same, own, fid(f"{random}, same lam", rank1)],
            verdict,
        )
    )

    # 3
    slow = fid(lowered, rank1)
    verdict = "open"
    if slow.higher:
        verdict = "refuted"
    elif gain.lower and slow.estimate.high is not None and slow.estimate.high < size / 2:
        verdict = "supported"
    result.append(
        Prediction(
            "Distillation alone at a lowered rate gains as much as rank 1 in the gradient.",
            "of the lowered rates the one that the tuning seed prefers; supported if rank 1 gains and the lowered rate "
            "is worse by less than half of that gain (95 % interval); refuted if it is shown to be worse than rank 1",
            [slow, *(fid(f"{name} gd", rank1) for name in LATER if f"{name} gd" != lowered)],
            verdict,
        )
    )

    # 4 to 6
    for text, pairs in (
        ("Under SGD, which has no v, rank 1 in the gradient gains nothing.", [(f"sgd {RANK1}", "sgd gd")]),
        (
            "Decoupled, the penalties gain nothing.",
            [(f"{C}gd+{name}", base) for name in ("rank1", "rank10", "bands8", "diagonal")],
        ),
        (
            "On top of an EMA or of one-cycle, rank 1 in the gradient adds nothing.",
            [(f"{name} {RANK1}", f"{name} gd") for name in ("ema", "one-cycle")],
        ),
    ):
        tests = [fid(*pair) for pair in pairs if all(label in groups for label in pair)]
        rule = (
            "refuted if a gain is shown; supported if no gain is shown and every 95 % interval excludes half of what "
            "rank 1 in the gradient gains at the constant rate"
        )
        result.append(Prediction(text, rule, tests, gains_nothing(tests, size)))
    return result
