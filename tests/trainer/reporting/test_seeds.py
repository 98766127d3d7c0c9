"""Numbers over seeds, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from crl_diffusion.reporting import seeds
from scipy import stats


def test_an_estimate_has_the_t_interval_of_scipy() -> None:
    values = [3.0, 5.5, 4.25, 9.0]
    estimate = seeds.estimate(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert (estimate.mean, estimate.std, estimate.n) == pytest.approx((np.mean(values), np.std(values, ddof=1), 4))


def test_one_value_has_no_standard_deviation_and_no_interval() -> None:
    estimate = seeds.estimate([2.0])
    assert estimate == (2.0, None, None, 1)
    assert (estimate.low, estimate.high) == (None, None)


def test_differences_are_taken_seed_by_seed() -> None:
    assert seeds.paired({5: 1.0, 0: 9.0, 2: 3.0}, {0: 10.0, 1: 0.0, 5: 4.0}) == {0: -1.0, 5: -3.0}


@pytest.mark.parametrize("n", [2, 3, 6, 10])
def test_sign_flip_p_values_are_those_of_scipy(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.7, 1, n)
    test = seeds.sign_flip(differences.tolist())
    exact = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=2**n, vectorized=True
    )
    assert test is not None
    assert test.p == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("n", [2, 3, 5, 16])
def test_differences_of_one_sign_have_the_smallest_p_value(n: int) -> None:
    # No difference is a short binary fraction, so that sums are rounded.
    test = seeds.sign_flip([0.1 + 0.01 * k for k in range(n)])
    assert test == (2 / 2**n, 2 / 2**n)


def test_a_sign_flip_test_needs_two_seeds_and_gives_1_for_no_difference() -> None:
    assert seeds.sign_flip([3.0]) is None
    assert seeds.sign_flip([0.1] * (seeds.EXACT_SEEDS + 1)) is None
    test = seeds.sign_flip([0.0, 0.0, 0.0])
    assert test is not None
    assert test.p == 1


def test_a_score_lies_between_joint_and_fine_tuning_of_its_own_seed() -> None:
    joint, fine_tune = {0: 2.0, 1: 4.0, 2: 9.0}, {0: 12.0, 1: 24.0, 2: 9.0}
    assert seeds.normalised({0: 7.0, 1: 6.0, 2: 9.0, 3: 1.0}, joint, fine_tune) == {0: 0.5, 1: 0.1}
    assert seeds.normalised(joint, joint, fine_tune) == {0: 0, 1: 0}
    assert seeds.normalised(fine_tune, joint, fine_tune) == {0: 1, 1: 1}
