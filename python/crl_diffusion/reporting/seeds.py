"""Numbers over seeds. The replicate is the seed: one run gives one number of each kind.

Means come with the sample standard deviation and a 95 % Student t interval, mean +- t(0.975, n - 1) * sd / sqrt(n).
Methods are compared by the differences of the runs of one seed, which share their batches, noise, timesteps and
evaluation latents, so what they share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Values = Mapping[int, float]  # one number a seed

EXACT_SEEDS = 16  # up to here all 2^n signs are tried; no comparison of diffusion models has had more


class Estimate(NamedTuple):
    """Of n values: their mean and, from two on, standard deviation and half width of the 95 % t interval."""

    mean: float
    std: float | None
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


class SignFlip(NamedTuple):
    """A two-sided p value, and the smallest one that so many differences can give."""

    p: float
    smallest: float


def estimate(values: Sequence[float]) -> Estimate:
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, None, n)
    std = float(np.std(values, ddof=1))
    return Estimate(mean, std, float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n), n)


def paired(values: Values, baseline: Values) -> dict[int, float]:
    """value - baseline over the seeds of both, in the order of seeds."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}


def sign_flip(differences: Sequence[float]) -> SignFlip | None:
    """Exact two-sided sign-flip test of a mean difference of zero; None below two differences or above `EXACT_SEEDS`.

    If a method did nothing, each difference could as well have had the other sign. p is the share of the 2^n choices
    of signs whose mean is at least as far from zero as the one seen, so it is never below 2 / 2^n.
    """
    n = len(differences)
    if not 2 <= n <= EXACT_SEEDS:
        return None
    from scipy import stats

    test = stats.permutation_test(
        (np.asarray(differences),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    return SignFlip(float(test.pvalue), 2.0 / 2**n)


def normalised(values: Values, joint: Values, fine_tune: Values) -> dict[int, float]:
    """(FID - joint) / (fine-tune - joint) of each seed that has all three: 0 is as good as joint training, 1 as bad as
    fine-tuning. Seeds where fine-tuning was no worse than joint training have no such scale and are left out."""
    common = sorted(values.keys() & joint.keys() & fine_tune.keys())
    scale = {seed: fine_tune[seed] - joint[seed] for seed in common}
    return {seed: (values[seed] - joint[seed]) / scale[seed] for seed in common if scale[seed] > 0}
