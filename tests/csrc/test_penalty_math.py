"""The arithmetic of one element and of one sum, against exact rational numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

LARGEST = np.finfo(np.float64).max
SMALLEST = 5e-324
EXTREMES = [0.0, SMALLEST, 2.2e-308, 1e-300, 2.0**-53, 0.5, 1.0, math.nextafter(1.0, 2.0), 2.0**53, 1e308, LARGEST]

unit = Fraction(1, 2**53)
positive = st.one_of(st.sampled_from(EXTREMES), st.floats(min_value=0.0, allow_infinity=False))
positive_or_infinite = st.one_of(positive, st.just(math.inf))


@given(fisher=positive, strength=positive)
@example(fisher=1e308, strength=1e308)
@example(fisher=SMALLEST, strength=SMALLEST)
def test_proximal_weight_is_exact_to_three_roundings(core, fisher, strength):
    """w = x / (1 + x), x = strength S: the product, the sum and the quotient are each rounded once, and the product
    and the quotient may lose half of the smallest denormal besides."""
    x = Fraction(fisher) * Fraction(strength)
    exact = x / (1 + x)
    weight = core.proximal_weight(fisher, strength)
    assert 0.0 <= weight <= 1.0
    assert abs(Fraction(weight) - exact) <= 4 * unit * exact + Fraction(SMALLEST)


def check_rises(below: float, above: float) -> None:
    """Two weights of three roundings each may change places within their errors, and no further."""
    assert Fraction(below) <= Fraction(above) * (1 + 8 * unit) + 2 * Fraction(SMALLEST)


@given(fishers=st.tuples(positive, positive), strengths=st.tuples(positive_or_infinite, positive_or_infinite))
def test_proximal_weight_rises_with_both_arguments(core, fishers, strengths):
    for strength in strengths:
        check_rises(*(core.proximal_weight(fisher, strength) for fisher in sorted(fishers)))
    for fisher in fishers:
        check_rises(*(core.proximal_weight(fisher, strength) for strength in sorted(strengths)))


@pytest.mark.parametrize("strength", [0.0, SMALLEST, 1.0, LARGEST, math.inf])
def test_no_curvature_no_step(core, strength):
    assert core.proximal_weight(0.0, strength) == 0.0


@pytest.mark.parametrize(
    ("fisher", "strength"),
    [(1.0, math.inf), (SMALLEST, math.inf), (math.inf, SMALLEST), (math.inf, math.inf), (1e200, 1e200)],
)
def test_infinite_products_have_the_weight_of_a_full_step(core, fisher, strength):
    assert core.proximal_weight(fisher, strength) == 1.0


@pytest.mark.parametrize(
    ("fisher", "strength"),
    [(math.nan, 0.0), (math.nan, 1.0), (math.nan, math.inf), (1.0, math.nan), (math.inf, math.nan), (math.inf, 0.0)],
)
def test_nan_is_kept(core, fisher, strength):
    assert math.isnan(core.proximal_weight(fisher, strength))


@given(
    values=st.lists(st.one_of(st.sampled_from([1e16, -1e16, 1.0]), st.floats(allow_nan=False)), max_size=70),
    stride=st.integers(1, 5),
)
def test_ordered_sum_adds_in_index_order(core, values, stride):
    spread = np.full(max(0, (len(values) - 1) * stride + 1), np.nan)  # ends with the last value
    spread[::stride] = values
    expected = 0.0
    for value in values:
        expected += value
    total = core.ordered_sum(spread, len(values), stride)
    assert total == expected or (math.isnan(total) and math.isnan(expected))
