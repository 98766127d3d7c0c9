"""Is rank 1 enough? The rule for a Fisher's spectra, and the sentences that state the result."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .spectrum import IntervalEstimate, Spectrum

ENOUGH = 0.5
MARGIN = 0.05
EVIDENCE = "https://github.com/crl-kernels/crl-kernels/blob/main/docs/evidence.md"
# What docs/evidence.md says of penalties of these forms, added to distillation.
_EXPERIENCE = {
    "low rank": (
        "in this project's experiments low-rank penalties in the gradient lowered distillation's average FID where the "
        "learning rate is constant; where it falls, none without slopes was shown to"
    ),
    "diagonal": "in this project's experiments no diagonal penalty was shown to lower distillation's average FID",
}
_UNKNOWN = IntervalEstimate(math.nan)


@dataclass(frozen=True)
class Verdict:
    """The answer, and three sentences that state it.

    The rule uses held-out shares of the trace and relative Frobenius errors, with their 95 % intervals. A form of the
    Fisher is enough if the lower end of its share is at least one half, not enough if the upper end is below one half,
    and undecided otherwise. Rank 1 is enough if the mean gradient or the top eigenvector is enough. A form is surely
    closer to F than another if the intervals of their errors do not meet.

    Compared with t uniform, by the number of vectors that are kept: "mean" and "top" (1), "diagonal" (2: itself and the
    anchor), "rank 2", "rank 4", "bands" (one direction at each of the listed timesteps, as many as these), "rank 8",
    "rank 16". The diagonal keeps the whole trace and no direction, so it has an error and no share; bands have a share
    and no error.

    Fields:
        answer          "yes", "no" or "undecided": is rank 1 enough with t uniform?
        direction       "top" if the top eigenvector's share is above the mean's by more than 0.05 at the lower end of
                        the difference's interval, if it is surely closer to F, or if only the top eigenvector is
                        enough; "mean" otherwise
        use             the smallest form that is enough, unless another one of at most its size is surely closer to F.
                        Otherwise the form of the smallest error or, if they surely hold more than that, bands. So a
                        form that is surely closer than the one named is larger, and the one named is enough then
        enough_at, not_at, undecided_at
                        timesteps, by whether rank 1 is enough for F of that timestep alone
        sentences       about t uniform, about single timesteps, and what to use
        reason          the third sentence without its first part, which says how to choose the form in the library: the
                        numbers, and what our experiments say of a penalty of this form
    """

    answer: str
    direction: str
    use: str
    enough_at: tuple[int, ...]
    not_at: tuple[int, ...]
    undecided_at: tuple[int, ...]
    sentences: tuple[str, str, str]
    reason: str = ""  # not in files of earlier versions


class _Form(NamedTuple):
    """A form of the Fisher: the number of vectors that it keeps, its share of the trace, and its Frobenius error."""

    name: str
    size: int
    share: IntervalEstimate
    error: IntervalEstimate

    @property
    def is_enough(self) -> bool:
        return self.share.low >= ENOUGH

    def surely_closer(self, other: "_Form") -> bool:
        return self.error.high < other.error.low


def judge(uniform: Spectrum, at: Mapping[int, Spectrum], bands: IntervalEstimate | None = None) -> Verdict:
    """Applies ``Verdict``'s rule to the numbers of t uniform, of single timesteps, and of their bands."""
    answer, direction = _rank_1(uniform)
    rank_1_at = {t: _rank_1(spectrum) for t, spectrum in at.items()}
    enough, no, undecided = (tuple(t for t in at if rank_1_at[t][0] == a) for a in ("yes", "no", "undecided"))
    forms = _forms(uniform, direction, len(at), bands)
    use = _chosen(forms)
    reason = _reason(use, forms, answer)
    return Verdict(
        answer,
        direction,
        use.name,
        enough,
        no,
        undecided,
        (
            _first_sentence(answer, direction, uniform),
            _second_sentence(rank_1_at, at, enough, no, undecided),
            f"{_how_to_use(use)}{reason}",
        ),
        reason,
    )


def _rank_1(spectrum: Spectrum) -> tuple[str, str]:
    mean, top = spectrum.held_out_mean, spectrum.held_out[1]
    better = (
        spectrum.top_over_mean.low > MARGIN
        or spectrum.error[1].high < spectrum.error_mean.low
        or (top.low >= ENOUGH > mean.low)
    )
    if mean.low >= ENOUGH or top.low >= ENOUGH:
        answer = "yes"
    else:
        answer = "no" if max(mean.high, top.high) < ENOUGH else "undecided"
    return answer, "top" if better else "mean"


def _forms(s: Spectrum, direction: str, count: int, bands: IntervalEstimate | None) -> list[_Form]:
    """All forms that are compared, from the smallest; of the two of rank 1, the verdict's direction comes first."""
    rank_1 = {
        "mean": _Form("mean", 1, s.held_out_mean, s.error_mean),
        "top": _Form("top", 1, s.held_out[1], s.error[1]),
    }
    forms = [rank_1.pop(direction), *rank_1.values(), _Form("diagonal", 2, _UNKNOWN, s.error_diagonal)]
    forms += [_Form(f"rank {k}", k, share, s.error[k]) for k, share in s.held_out.items() if k > 1]
    if bands is not None:
        forms.append(_Form("bands", count, bands, _UNKNOWN))
    return sorted(forms, key=lambda form: form.size)


def _chosen(forms: Sequence[_Form]) -> _Form:
    """``Verdict.use``: see there."""
    for form in forms:
        if form.is_enough and not any(f.surely_closer(form) for f in forms if f.size <= form.size):
            return form
    measured = [form for form in forms if form.error.value == form.error.value]
    closest = min(measured, key=lambda form: form.error.value, default=forms[0])
    more = [f for f in forms if f.error.value != f.error.value and f.share.low > closest.share.high]
    return max(more, key=lambda form: form.share.low, default=closest)


def _first_sentence(answer: str, direction: str, s: Spectrum) -> str:
    numbers = (
        f"with t uniform the mean gradient holds {s.held_out_mean.percent} of the trace of F, and the top eigenvector "
        f"{s.held_out[1].percent}, on samples that did not choose them (95 % intervals, {s.num_samples} samples)"
    )
    lost = "" if s.kappa.low > 0 else "; the mean gradient itself is lost in noise"
    if answer == "yes" and direction == "mean":
        return f"Rank 1 is enough here: {numbers}{lost}."
    if answer == "yes":
        return f"Rank 1 is enough here, but along the top eigenvector and not along the mean gradient: {numbers}{lost}."
    if answer == "no":
        return f"Rank 1 is not enough here: {numbers}{lost}."
    return f"These samples do not decide whether rank 1 is enough here: {numbers}{lost}."


def _second_sentence(
    rank_1_at: Mapping[int, tuple[str, str]],
    at: Mapping[int, Spectrum],
    enough: Sequence[int],
    no: Sequence[int],
    undecided: Sequence[int],
) -> str:
    if not at:
        return "No single timesteps were looked at."
    parts = []
    if enough:
        parts.append(f"enough at t = {_listed(enough)}")
        top = [t for t in enough if rank_1_at[t][1] == "top"]
        if top:
            which = "there" if len(top) == len(enough) else f"at t = {_listed(top)}"
            parts[-1] += f" ({which} along the top eigenvector rather than the mean)"
    if no:
        parts.append(f"not enough at t = {_listed(no)}")
    if undecided:
        parts.append(f"undecided at t = {_listed(undecided)}")
    share = sum(at[t].trace.value for t in enough) / sum(s.trace.value for s in at.values())
    carried = f", with {100 * share:.2g} % of the trace summed over all timesteps listed" if enough else ""
    return f"One timestep at a time, rank 1 is {parts[0]}{carried}{''.join('; ' + part for part in parts[1:])}."


def _how_to_use(form: _Form) -> str:
    """How to choose the form in the library."""
    if form.name in ("mean", "top"):
        return f'Use estimate_fisher with rank=1 and direction="{form.name}"'
    if form.name == "diagonal":
        return 'Use estimate_fisher with kind="diagonal"'
    if form.name == "bands":
        return f"Use {form.size} bands of timesteps as strata of estimate_fisher"
    return f'Use estimate_fisher with rank={form.size} and direction="top"'


def _reason(use: _Form, forms: Sequence[_Form], answer: str) -> str:
    """Why this form: what was compared, the numbers, and what experiments say of a penalty of this form."""
    names = ", ".join(f"{form.size} bands" if form.name == "bands" else form.name for form in forms)
    diagonal = next(form for form in forms if form.name == "diagonal")
    others = [form for form in forms if form.error.value == form.error.value and form is not use]
    if use is not diagonal:
        others = [form for form in others if form is diagonal]
    rival = min(others, key=lambda form: form.error.value, default=None)
    beside = "" if rival is None else f" ({rival.name}: {rival.error})"
    text = f": of the forms compared with t uniform ({names}), "
    if use.is_enough:
        text += f"it is the smallest that surely holds half of the trace, {use.share.percent}"
        if rival is not None and rival.surely_closer(use):
            text += f", though the {rival.name} is closer to F, with a relative Frobenius error of {rival.error} "
            text += f"({use.name}: {use.error})"
    else:
        text += "none surely holds half of the trace, and " * (not any(form.is_enough for form in forms))
        if use.error.value == use.error.value:
            text += f"it is the closest to F, with a relative Frobenius error of {use.error}{beside}"
        else:
            text += f"it surely holds the most of it, {use.share.percent}"
        if answer == "undecided" or (rival is not None and not use.surely_closer(rival)):
            text += ", which more samples may change"
    return f"{text}; {_EXPERIENCE['diagonal' if use is diagonal else 'low rank']} ({EVIDENCE})."


def short(ratio: float) -> str:
    """A ratio of any size in two significant digits: 160, 8.5, 0.0069, 5.9e-05."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps))
