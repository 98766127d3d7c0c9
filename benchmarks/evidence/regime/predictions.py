"""The six predictions of a regime and their verdicts, by rules that were fixed before the final runs.

The hypothesis: what a rank-1 penalty in the gradient gains under Adam at a constant rate, it gains because its
gradient enters Adam's second moment v and shortens every step, not because of its direction. Differences are paired by
seed; p is that of the exact two-sided sign-flip test. A gain is a lower average FID than the baseline's, distillation
alone.

A difference is shown if p <= LIMIT. "Gains nothing" is supported if no gain is shown and the 95 % interval excludes
half of what rank 1 in the gradient gains at the constant rate. Where neither is so, the prediction is open. It is not
tested while no two runs that it compares have finished.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Literal, NamedTuple

from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.seeds import Estimate

from .definitions import LATER
from .runs import Result

LIMIT = 0.01
Verdict = Literal["supported", "refuted", "open", "not tested"]
Groups = Mapping[str, Mapping[int, Result]]  # label of an arm -> its results by seed
FID, FORGETTING = attrgetter("average_fid"), attrgetter("forgetting")


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


class Paired(NamedTuple):
    """Differences of pairs of arms, of those that have run; `complete` if all have."""

    found: Sequence[Difference]
    complete: bool

    def any_lower(self) -> bool:
        return any(test.lower for test in self.found)

    def any_higher(self, limit: float = 0.0) -> bool:
        """Whether one is shown to be above 0, with a mean above the limit."""
        return any(test.higher and test.estimate.mean > limit for test in self.found)

    def all_below(self, limit: float) -> bool:
        """Whether all have run, and all 95 % intervals end below the limit."""
        highs = [test.estimate.high for test in self.found]
        return self.complete and all(high is not None and high < limit for high in highs)

    def all_above(self, limit: float) -> bool:
        lows = [test.estimate.low for test in self.found]
        return self.complete and all(low is not None and low > limit for low in lows)


def paired(groups: Groups, pairs: Sequence[tuple[str, str]], measure: Callable[[Result], float], unit: str) -> Paired:
    """First less second of each pair of labels, seed by seed."""
    found = []
    for first, second in pairs:
        a, b = groups.get(first, {}), groups.get(second, {})
        if seeds_of_both := sorted(a.keys() & b.keys()):
            values = [measure(a[seed]) - measure(b[seed]) for seed in seeds_of_both]
            found.append(Difference(f"{unit}: {first} less {second}", values))
    return Paired(found, len(found) == len(pairs))


def gains_nothing(tests: Paired, gain: float) -> Verdict:
    """Of arms that should be no better than their baselines; `gain` is positive."""
    if tests.any_lower():
        return "refuted"
    return "supported" if tests.found and tests.all_above(-gain / 2) else "open"


C, RANK1 = "constant ", "gd+rank1:gradient"
CALM = ("one-cycle", "ema")


def predictions(groups: Groups, lowered: str, arms: Collection[str]) -> list[Prediction]:
    """The six predictions. `lowered` is the label of the lowered rate that the tuning seed prefers; `arms` are the
    labels of the regime, of which some may not have run yet."""
    base, rank1, damping = C + "gd", C + RANK1, C + "gd+rank1:damping"
    random, signs, top = (C + f"gd+rank1:{direction},gradient" for direction in ("random", "signs", "top"))

    def fid(*pairs: tuple[str, str]) -> Paired:
        return paired(groups, [pair for pair in pairs if {*pair} <= {*arms}], FID, "average FID")

    gains = fid((rank1, base))
    gain = max(0.0, -gains.found[0].estimate.mean) if gains.found else 0.0
    alike = fid((f"{random}, same precision", rank1), (f"{top}, same lam a", rank1), (random, rank1))
    slow = fid((lowered, rank1))
    nothing = (
        "refuted if a gain is shown; supported if no gain is shown and every 95 % interval excludes half of what rank "
        "1 in the gradient gains at the constant rate"
    )
    under_sgd = fid((f"sgd {RANK1}", "sgd gd"))
    decoupled = fid(*((f"{C}gd+{name}", base) for name in ("rank1", "rank10", "bands8", "diagonal")))
    on_top = fid(*((f"{name} {RANK1}", f"{name} gd") for name in CALM))
    tests = [
        _forgetting(groups),
        Prediction(
            "Rank 1 in the gradient gains, and its gain follows the drop of Adam's precision, whatever the direction.",
            "supported if rank 1 gains, and a random direction with the same drop of precision, the top eigenvector "
            "with the same lam a, and a random direction with its own best lam are each worse by less than half of "
            "that gain (95 % interval); refuted if one of them is shown to be worse, by more than that, or if rank 1 "
            "is shown to be worse than no penalty",
            [
                *gains.found,
                *alike.found,
                *fid((f"{random}, same lam", rank1), (signs, rank1), (f"{signs}, same lam", rank1)).found,
                *fid((damping, rank1), (damping, base)).found,
            ],
            "refuted"
            if gains.any_higher() or (gains.any_lower() and alike.any_higher(gain / 2))
            else "supported"
            if gains.any_lower() and alike.found and alike.all_below(gain / 2)
            else "open",
        ),
        Prediction(
            "Distillation alone at a lowered rate gains as much as rank 1 in the gradient.",
            "of the lowered rates the one that the tuning seed prefers; supported if rank 1 gains and the lowered rate "
            "is worse by less than half of that gain (95 % interval); refuted if it is shown to be worse, by more than "
            "that",
            [*slow.found, *fid(*((f"{name} gd", rank1) for name in LATER if f"{name} gd" != lowered)).found],
            "refuted"
            if gains.any_lower() and slow.any_higher(gain / 2)
            else "supported"
            if gains.any_lower() and slow.found and slow.all_below(gain / 2)
            else "open",
        ),
        Prediction(
            "Under SGD, which has no v, rank 1 in the gradient gains nothing.",
            nothing,
            under_sgd.found,
            gains_nothing(under_sgd, gain),
        ),
        Prediction("Decoupled, the penalties gain nothing.", nothing, decoupled.found, gains_nothing(decoupled, gain)),
        Prediction(
            "On top of an EMA or of one-cycle, rank 1 in the gradient adds nothing.",
            nothing,
            [
                *on_top.found,
                *fid(*((f"ema {RANK1}", other) for other in ("ema-later-0.3 gd", "ema gd+rank1:damping"))).found,
            ],
            gains_nothing(on_top, gain),
        ),
    ]
    return [test if test.differences else test._replace(verdict="not tested") for test in tests]


def _forgetting(groups: Groups) -> Prediction:
    base = C + "gd"
    values = [result.forgetting for _, result in sorted(groups[base].items())]
    forgets = Difference(f"forgetting of {base}", values)
    rate = paired(groups, [("twice-the-rate gd", base)], FORGETTING, "forgetting")
    calm = paired(groups, [(f"{name} gd", base) for name in CALM], FORGETTING, "forgetting")
    # With a third of the forgetting, the difference is two thirds of it.
    small = all(test.estimate.mean < -2 / 3 * forgets.estimate.mean for test in calm.found)
    verdict: Verdict = "open"
    if forgets.lower or rate.any_lower() or calm.any_higher():
        verdict = "refuted"
    elif forgets.higher and rate.any_higher() and calm.complete and all(t.lower for t in calm.found) and small:
        verdict = "supported"
    return Prediction(
        "At a constant rate distillation alone forgets, and more so with a larger rate; with one-cycle or an EMA it "
        "hardly does.",
        "supported if it forgets, forgets more at twice the rate, and less than a third as much with one-cycle and "
        "with the EMA, all shown; refuted if one of these differences is shown to have the other sign",
        [forgets, *rate.found, *calm.found],
        verdict,
    )
