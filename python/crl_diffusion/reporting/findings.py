"""What the runs of one data set show, in sentences: how a report begins. They say no more than its tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crl_diffusion.config.words import CONTROL, describe
from crl_diffusion.reporting import seeds, tables
from crl_diffusion.reporting.runs import Groups, runs_of
from crl_diffusion.reporting.tables import AVERAGE, FORGETTING, number, values

LEVEL = 0.05  # of the sign-flip test, divided by the number of methods that it was picked from
NAMED_METHODS = 6  # methods up to which a sentence names them


class Leader(NamedTuple):
    """The continual method with the lowest mean of average FID, and the method that it is compared with."""

    name: str
    reference: str | None
    others: int  # continual methods that it was picked from, besides itself


def leader(groups: Groups, baseline: str) -> Leader:
    """The reference is the baseline or, if that is the leader or has no runs, the next best method."""
    means = {name: float(np.mean(list(values(group, AVERAGE.key).values()))) for name, group in groups.items()}
    continual = [name for name in means if groups[name][0].config["recipe"]["curriculum"] != "joint"]
    ranked = sorted(continual or means, key=lambda name: means[name])
    best, rest = ranked[0], ranked[1:]
    return Leader(best, baseline if baseline in rest else rest[0] if rest else None, len(rest))


def found(groups: Groups, baseline: str) -> str:
    """Two sentences: the average FID of the best method, and whether it was shown to forget less."""
    best, reference, others = leader(groups, baseline)
    if reference is None:
        return f"There is one method, {best}, and nothing to compare it with. No difference can be concluded from it."
    fids = [values(groups[name], AVERAGE.key) for name in (best, reference)]
    means = [number(float(np.mean(list(by_seed.values()))), AVERAGE.digits) for by_seed in fids]
    lead = f"{best}{_control(groups, best)} has the lowest average FID of {others + 1} continual methods, {means[0]}; "
    if not tables.several(runs_of(groups)):
        return (
            f"{lead}that of {reference} is {means[1]}. Nothing can be concluded from this: there is one seed, and "
            "differences between methods may be chance."
        )
    differences = seeds.paired(*fids)
    if len(differences) < 2:
        return (
            f"{lead}that of {reference} is {means[1]}. Nothing can be concluded from this: they have fewer than two "
            "seeds in common."
        )
    estimate = seeds.estimate(list(differences.values()))
    assert estimate.low is not None
    assert estimate.high is not None
    low, high, mean = (number(x, 2, plus=True) for x in (estimate.low, estimate.high, estimate.mean))
    verdict = "is wholly below 0" if estimate.high < 0 else "is not wholly below 0, so it is not shown to be better"
    return (
        f"{lead}paired over {estimate.n} seeds, that is {mean} [{low}, {high}] against {reference}, and the 95 % "
        f"interval {verdict}. {_forgetting(groups, Leader(best, reference, others))}"
    )


def _control(groups: Groups, name: str) -> str:
    run = groups[name][0]
    text = describe(run.config["recipe"], run.settings)
    return " (a control)" if CONTROL.capitalize() in text else ""


def _forgetting(groups: Groups, chosen: Leader) -> str:
    """Whether the leader forgets less than its reference."""
    best, reference, others = chosen
    assert reference is not None
    pair = [values(groups[name], FORGETTING.key) for name in (best, reference)]
    differences = list(seeds.paired(*pair).values())
    if len(differences) < 2:
        return "Forgetting was not measured on two seeds or more."
    mean, test = float(np.mean(differences)), seeds.sign_flip(differences)
    if test is None:
        return f"With more than {seeds.EXACT_SEEDS} seeds no sign-flip test is made; its forgetting is in the tables."
    level = LEVEL / others
    picked = f", after the best of {others + 1} was picked" if others > 1 else ""
    change = f"{number(abs(mean), 2)} {'lower' if mean < 0 else 'higher'}"
    if test.p <= level:
        return f"Its forgetting is {change} in the mean, which is shown: exact sign-flip test, p {test.p:.2g}{picked}."
    few = (
        f"; {len(differences)} seeds are too few to show anything by this test, whose p cannot be below "
        f"{test.smallest:.2g}"
        if test.smallest > level
        else ""
    )
    return (
        f"Its forgetting is {change} in the mean, which is not shown: exact sign-flip test, p {test.p:.2g}, where "
        f"{level:.2g} is needed{picked}{few}."
    )


def methods(groups: Groups) -> dict[str, str]:
    """Each method in words."""
    return {name: describe(group[0].config["recipe"], group[0].settings) for name, group in groups.items()}


def conclusions(groups: Groups, baseline: str) -> str:
    """Which methods the paired differences to the baseline tell apart from it; "" without differences."""
    if not tables.several(runs_of(groups)) or (baseline in groups and len(groups) < 2):
        return ""
    if baseline not in groups:
        return (
            f"No run here is of the baseline {baseline!r}, so there are no differences; name another with --baseline."
        )
    baseline_values = values(groups[baseline], AVERAGE.key)
    better, worse, unsure, single = [], [], [], []
    for name, group in groups.items():
        differences = list(seeds.paired(values(group, AVERAGE.key), baseline_values).values())
        if name == baseline or not differences:
            continue
        estimate = seeds.estimate(differences)
        if estimate.low is None or estimate.high is None:
            single.append(name)
        else:
            (better if estimate.high < 0 else worse if estimate.low > 0 else unsure).append(name)
    sentences = [
        f"{title}: {', '.join(names) if len(names) <= NAMED_METHODS else f'{len(names)} methods'}."
        for title, names in (
            (f"Average FID below {baseline}'s, the 95 % interval of the difference wholly below zero", better),
            (f"Average FID above {baseline}'s, the interval wholly above zero", worse),
            ("Not told apart by these seeds", unsure),
            ("Fewer than two seeds in common", single),
        )
        if names
    ]
    return " ".join(sentences)
