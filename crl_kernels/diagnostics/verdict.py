"""Is rank 1 enough? The rule for a Fisher's spectra, and the sentences that state the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .spectrum import IntervalEstimate, Spectrum

ENOUGH = 0.5
MARGIN = 0.05


@dataclass(frozen=True)
class Verdict:
    """The answer, and three sentences that state it.

    The rule uses held-out shares of the trace and their 95 % intervals. A form of the Fisher is enough if the lower end
    of its share is at least one half, not enough if the upper end is below one half, and undecided otherwise. Rank 1 is
    enough if the mean gradient or the top eigenvector is enough.

    Fields:
        answer          "yes", "no" or "undecided": is rank 1 enough with t uniform?
        direction       "top" if the top eigenvector's share is above the mean's by more than 0.05 at the lower end of
                        the difference's interval, or if only the top eigenvector is enough; "mean" otherwise
        use             with t uniform, the first of these that is enough, in the order of their number of directions:
                        "mean", "top", "rank 2", "rank 4", "bands" (one direction at each of the listed timesteps),
                        "rank 8", "rank 16"; if none is, "diagonal", which keeps the whole trace but not the directions
        enough_at, not_at, undecided_at
                        timesteps, by whether rank 1 is enough for F of that timestep alone
        sentences       about t uniform, about single timesteps, and what to use
    """

    answer: str
    direction: str
    use: str
    enough_at: tuple[int, ...]
    not_at: tuple[int, ...]
    undecided_at: tuple[int, ...]
    sentences: tuple[str, str, str]


def judge(uniform: Spectrum, at: Mapping[int, Spectrum], bands: IntervalEstimate | None = None) -> Verdict:
    """Applies :class:`Verdict`'s rule to the numbers of t uniform, of single timesteps, and of their bands."""
    answer, direction = _rank_1(uniform)
    rank_1_at = {t: _rank_1(spectrum) for t, spectrum in at.items()}
    enough, no, undecided = (tuple(t for t in at if rank_1_at[t][0] == a) for a in ("yes", "no", "undecided"))

    candidates = [(k, f"rank {k}", share) for k, share in uniform.held_out.items() if k > 1]
    if bands is not None:
        candidates.append((len(at), "bands", bands))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1]))
    use = next((name for _, name, share in candidates if share.low >= ENOUGH), "diagonal")
    if answer == "yes":
        use = direction
    return Verdict(
        answer,
        direction,
        use,
        enough,
        no,
        undecided,
        (
            _first_sentence(answer, direction, uniform),
            _second_sentence(rank_1_at, at, enough, no, undecided),
            _third_sentence(use, answer, uniform, len(at), bands),
        ),
    )


def _rank_1(spectrum: Spectrum) -> tuple[str, str]:
    mean, top = spectrum.held_out_mean, spectrum.held_out[1]
    better = spectrum.top_over_mean.low > MARGIN or (top.low >= ENOUGH > mean.low)
    if mean.low >= ENOUGH or top.low >= ENOUGH:
        answer = "yes"
    else:
        answer = "no" if max(mean.high, top.high) < ENOUGH else "undecided"
    return answer, "top" if better else "mean"


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


def _third_sentence(use: str, answer: str, s: Spectrum, count: int, bands: IntervalEstimate | None) -> str:
    if use == "mean":
        return 'Use estimate_fisher with rank=1 and direction="mean", as the paper does.'
    if use == "top":
        return 'Use estimate_fisher with rank=1 and direction="top".'
    if use == "bands" and bands is not None:
        return (
            f"Use bands of timesteps as strata of estimate_fisher: one direction at each of the {count} timesteps "
            f"holds {bands.percent} together."
        )
    if use.startswith("rank "):
        k = int(use.removeprefix("rank "))
        return f'Use estimate_fisher with rank={k} and direction="top": {k} directions hold {s.held_out[k].percent}.'
    k = max(s.held_out)
    banded = f", {count} bands of timesteps {bands.percent}" if bands is not None else ""
    diagonal, low_rank = s.error_diagonal, s.error[k]
    text = (
        f'Use kind="diagonal", which keeps the whole trace: nothing of low rank surely holds half of it (rank {k} '
        f"{s.held_out[k].percent}{banded})"
    )
    if diagonal.value == diagonal.value:
        closer = "the diagonal" if diagonal.high < low_rank.low else f"rank {k}" if low_rank.high < diagonal.low else ""
        judged = f"{closer} is the closer one" if closer else "neither is surely the closer one"
        text += (
            f"; as matrices {judged}, with relative Frobenius errors of {diagonal} (diagonal) and {low_rank} (rank {k})"
        )
    if answer == "undecided":
        text += "; more samples may change this"
    return text + "."


def short(ratio: float) -> str:
    """A ratio of any size in two significant digits: 160, 8.5, 0.0069, 5.9e-05."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps))
