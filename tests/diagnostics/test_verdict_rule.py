"""The verdict's rule, on any numbers: the form that it advises is not surely worse than another that it compared."""

import math
from dataclasses import dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crl_kernels.diagnostics.spectrum import IntervalEstimate, Spectrum
from crl_kernels.diagnostics.verdict import Verdict, judge

RANKS = (1, 2, 4, 8, 16)
NONE = IntervalEstimate(math.nan)


@st.composite
def intervals(draw: st.DrawFn) -> IntervalEstimate:
    low, value, high = sorted(draw(st.tuples(*[st.floats(0, 1)] * 3)))
    return IntervalEstimate(value, low, high)


def spectrum_with(**known) -> Spectrum:
    values = {field.name: IntervalEstimate(1.0, 1.0, 1.0) for field in fields(Spectrum)}
    return Spectrum(**values | {"num_samples": 256, "eigenvalues": ()} | known)


@st.composite
def spectra(draw: st.DrawFn) -> Spectrum:
    """Spectra with any numbers, also those that no Fisher has."""
    ranks = RANKS[: draw(st.integers(1, len(RANKS)))]
    return spectrum_with(
        held_out_mean=draw(intervals()),
        held_out={k: draw(intervals()) for k in ranks},
        top_over_mean=draw(intervals()),
        error_mean=draw(intervals()),
        error={k: draw(intervals()) for k in ranks},
        error_diagonal=draw(intervals() | st.just(NONE)),
    )


@dataclass
class Compared:
    """What the verdict has compared, by the name in ``use``: vectors kept, share, error."""

    uniform: Spectrum
    bands: IntervalEstimate | None
    count: int

    def __post_init__(self) -> None:
        s = self.uniform
        self.size = {"mean": 1, "top": 1, "diagonal": 2} | {f"rank {k}": k for k in s.held_out if k > 1}
        self.share = {"mean": s.held_out_mean, "top": s.held_out[1], "diagonal": NONE}
        self.share |= {f"rank {k}": share for k, share in s.held_out.items() if k > 1}
        self.error = {"mean": s.error_mean, "top": s.error[1], "diagonal": s.error_diagonal}
        self.error |= {f"rank {k}": error for k, error in s.error.items() if k > 1}
        if self.bands is not None:
            self.size["bands"], self.share["bands"], self.error["bands"] = self.count, self.bands, NONE


CASES = given(
    uniform=spectra(),
    at=st.dictionaries(st.integers(0, 999), spectra(), min_size=1, max_size=4),
    bands=intervals() | st.none(),
)


@CASES
def test_the_form_advised_is_never_surely_worse_than_another(uniform, at, bands):
    use, compared = judge(uniform, at, bands).use, Compared(uniform, bands, len(at))
    is_enough = compared.share[use].low >= 0.5
    for other in compared.size:
        if compared.error[other].high < compared.error[use].low:  # surely closer to F
            assert is_enough
            assert compared.size[other] > compared.size[use]
        if not is_enough and compared.share[other].low > compared.share[use].high:  # surely holds more
            assert compared.error[other].value >= compared.error[use].value


@CASES
def test_no_smaller_form_would_do(uniform, at, bands):
    use, compared = judge(uniform, at, bands).use, Compared(uniform, bands, len(at))
    if compared.share[use].low < 0.5 or use == "diagonal":
        return
    for other, size in compared.size.items():
        if size < compared.size[use] and compared.share[other].low >= 0.5:
            assert any(
                compared.error[third].high < compared.error[other].low and compared.size[third] <= size
                for third in compared.size
            )


@CASES
def test_the_third_sentence_names_what_was_compared_and_the_numbers(uniform, at, bands):
    verdict, compared = judge(uniform, at, bands), Compared(uniform, bands, len(at))
    sentence = verdict.sentences[2]
    for name in compared.size:
        assert (f"{len(at)} bands" if name == "bands" else name) in verdict.reason
    assert sentence.endswith(verdict.reason)
    error, share = compared.error[verdict.use], compared.share[verdict.use]
    assert (share.percent if share.low >= 0.5 or math.isnan(error.value) else str(error)) in sentence
    assert sentence.count("docs/evidence.md") == 1
    assert ("no diagonal penalty was shown to lower" in sentence) == (verdict.use == "diagonal")
    assert "nan" not in sentence


@CASES
def test_a_known_word_of_the_library_says_how_to_choose_the_form(uniform, at, bands):
    verdict = judge(uniform, at, bands)
    words = {"mean": 'direction="mean"', "top": 'rank=1 and direction="top"', "diagonal": 'kind="diagonal"'}
    words |= {f"rank {k}": f"rank={k} and" for k in RANKS} | {"bands": f"{len(at)} bands of timesteps as strata"}
    assert words[verdict.use] in verdict.sentences[2].removesuffix(verdict.reason)


def interval(value: float, reach: float = 0.02) -> IntervalEstimate:
    return IntervalEstimate(value, value - reach, value + reach)


def verdict_of(shares: dict[int, float], errors: dict[int, float], diagonal: float, mean: float = 0.1) -> Verdict:
    uniform = spectrum_with(
        held_out_mean=interval(mean),
        held_out={k: interval(x) for k, x in shares.items()},
        top_over_mean=interval(shares[1] - mean),
        error_mean=interval(0.95),
        error={k: interval(x) for k, x in errors.items()},
        error_diagonal=interval(diagonal),
    )
    return judge(uniform, {})


@pytest.mark.parametrize(
    ("shares", "errors", "diagonal", "use"),
    [
        ({1: 0.2, 16: 0.46}, {1: 0.9, 16: 0.33}, 0.98, "rank 16"),  # none is enough: the closest
        ({1: 0.2, 16: 0.46}, {1: 0.9, 16: 0.33}, 0.10, "diagonal"),
        ({1: 0.2, 16: 0.7}, {1: 0.9, 16: 0.33}, 0.98, "rank 16"),  # enough
        ({1: 0.2, 16: 0.7}, {1: 0.9, 16: 0.33}, 0.10, "diagonal"),  # closer, and an eighth of the size
        ({1: 0.6, 16: 0.9}, {1: 0.4, 16: 0.05}, 0.10, "top"),  # enough, and half of the diagonal's size
        ({1: 0.2, 2: 0.7}, {1: 0.9, 2: 0.33}, 0.98, "rank 2"),
        ({1: 0.2, 2: 0.7}, {1: 0.9, 2: 0.33}, 0.10, "diagonal"),  # closer, of the same size
    ],
)
def test_examples(shares, errors, diagonal, use):
    assert verdict_of(shares, errors, diagonal).use == use


def test_a_diagonal_that_is_closer_than_rank_1_is_said():
    verdict = verdict_of({1: 0.6}, {1: 0.4}, 0.1)
    assert "though the diagonal is closer to F, with a relative Frobenius error of 0.1" in verdict.sentences[2]


def test_a_mean_that_is_surely_farther_is_not_advised():
    verdict = verdict_of({1: 0.7}, {1: 0.2}, 0.98, mean=0.69)
    assert (verdict.direction, verdict.use) == ("top", "top")


def test_bands_that_surely_hold_more_are_advised():
    uniform = spectrum_with(
        held_out_mean=interval(0.1),
        held_out={1: interval(0.2)},
        top_over_mean=interval(0.1),
        error_mean=interval(0.9),
        error={1: interval(0.8)},
        error_diagonal=interval(0.98),
    )
    verdict = judge(uniform, {10: uniform, 500: uniform}, interval(0.4))
    assert verdict.use == "bands"
    assert "it surely holds the most of it, 40 % [38, 42]" in verdict.sentences[2]


@pytest.mark.parametrize("close", [False, True])
def test_a_choice_that_more_samples_may_change_says_so(close):
    verdict = verdict_of({1: 0.2}, {1: 0.5}, 0.51 if close else 0.9)
    assert ("more samples may change" in verdict.sentences[2]) == close
