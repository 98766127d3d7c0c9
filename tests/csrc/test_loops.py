"""The loops over one piece, for every instruction set that this processor runs.

Most cases are small multiples of 1/8, for which every float64 product and sum below is exact: then fused, unfused and
reordered arithmetic must all give the same bits, and only the rounding to the target's dtype remains to compare.

Every input ends where its allocation ends, and so does every other target, so that AddressSanitizer sees an access one
element too far; the other targets end in elements that must stay as they are.
"""

import ast
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from helpers.loops import (
    DTYPES,
    LENGTHS,
    OFFSETS,
    Slice,
    anywhere,
    dtype,
    eighths,
    narrow,
    other_dtype,
    overwrite,
    state_dtype,
    widen,
)

C = 0.625  # every multiple of 1/8 times C is a multiple of 1/64
STRENGTH = 2.0
UNIT = 2.0**-53
# Lists of terms: about as many as the loops read side by side, fewer, more; of one dtype, in runs, all mixed.
terms = pytest.mark.parametrize(
    "terms",
    [
        ["float32"] * 2,
        ["bfloat16"] * 20,
        ["float32"] * 11,
        ["float64"] * 23,
        ["float16", "bfloat16", "bfloat16", "bfloat16", "float32"],
        [*DTYPES] * 4,
    ],
    ids=lambda terms: f"{len(terms)}-{terms[0]}",
)


def fishers(dtype: str, seed: int) -> np.ndarray:
    """S with 1 + 2 S a power of two, so that the proximal weight for strength 2 is exact."""
    return narrow(np.random.default_rng(seed).choice([0.0, 0.5, 1.5, 3.5, 7.5], max(LENGTHS)), dtype)


def placements():
    """(n, index, offset, three other offsets, tail): pieces of all lengths, at all alignments and places in a chunk."""
    for n, offset in product(LENGTHS, OFFSETS):
        others = ((3 * offset + 1) % 8, (5 * offset + n) % 8, (n + 2) % 8)
        yield n, 2**40 + 4096 + 13 * offset + 5 * n, offset, others, 0 if offset % 2 == 0 else 3


def fewer_placements():
    """(n, index, offset, tail), for tests of many buffers."""
    for n, index, offset, _, tail in placements():
        if offset == n % 8:
            yield n, index, offset, tail


def slices(arrays: list[np.ndarray], n: int) -> list[np.ndarray]:
    """The first n elements of each, at offsets that differ."""
    return [Slice(array[:n], (3 * k + n) % 8).elements for k, array in enumerate(arrays)]


def sum_with(before: np.ndarray, added: np.ndarray, overwrite: bool) -> np.ndarray:
    return added if overwrite else widen(before) + added


def lanes_after(core, lanes: np.ndarray, index: int, summands: np.ndarray) -> np.ndarray:
    """Flat element j goes to lane j % LANES."""
    places = (index + np.arange(summands.size)) % core.LANES
    return lanes + np.bincount(places, summands, minlength=core.LANES)


@pytest.mark.parametrize("length", [1, 2, 9, 16, 27, 128])
def test_dequantise(loops, length):
    """Of a piece that begins and ends within blocks; q is every int8, and a scale has 16 significant bits."""
    generator = np.random.default_rng(length)
    q = generator.permutation(np.arange(max(LENGTHS)) % 256 - 128).astype(np.int8)
    for n, index, offset, (second, third, _), tail in placements():
        first = index % (2 * length + 5)
        scales = generator.integers(2**15, 2**16, -(-(first + n) // length)).astype(np.float32) * np.float32(2.0**-80)
        values = Slice(np.zeros(n, np.float32), third, tail)
        elements, blocks = Slice(q[:n], offset).elements, Slice(scales, second).elements
        loops["dequantise"](elements, blocks, length, first, values.elements)
        expected = q[:n] * scales.astype(np.float64)[(first + np.arange(n)) // length]
        assert values.holds(expected.astype(np.float32)), (n, offset)


@dtype
@other_dtype
def test_dot(core, loops, dtype, other_dtype):
    x, u = eighths(dtype, 1), eighths(other_dtype, 2)
    summands = widen(x) * widen(u)
    before = np.arange(core.LANES) / 8
    for n, index, offset, (second, *_), _ in placements():
        lanes = Slice(before, 0)
        loops["dot"](Slice(x[:n], offset).elements, [Slice(u[:n], second).elements], 1, index, n, lanes.elements)
        assert lanes.holds(lanes_after(core, before, index, summands[:n])), (n, offset)


@dtype
@terms
def test_dot_of_several_terms(core, loops, dtype, terms):
    x, u = eighths(dtype, 1), [eighths(name, 30 + k) for k, name in enumerate(terms)]
    summands = [widen(x) * widen(term) for term in u]
    before = np.arange(len(terms) * core.LANES) / 8
    for n, index, offset, tail in fewer_placements():
        lanes = Slice(before, 0, tail)
        loops["dot"](Slice(x[:n], offset).elements, slices(u, n), len(terms), index, n, lanes.elements)
        parts = zip(before.reshape(len(terms), core.LANES), summands, strict=True)
        assert lanes.holds(np.concatenate([lanes_after(core, part, index, term[:n]) for part, term in parts])), n


@dtype
@other_dtype
@overwrite
def test_combine(loops, dtype, other_dtype, overwrite):
    before, u, c = eighths(dtype, 3), eighths(other_dtype, 4), np.array([C])
    after = narrow(sum_with(before, C * widen(u), overwrite), dtype)
    for n, _, offset, (second, *_), tail in placements():
        target = Slice(before[:n], offset, tail)
        loops["combine"](target.elements, [Slice(u[:n], second).elements], c, 1, n, overwrite)
        assert target.holds(after[:n]), (n, offset)


@dtype
@terms
@overwrite
def test_combine_several_terms(loops, dtype, terms, overwrite):
    before, u = eighths(dtype, 5), [eighths(name, 60 + k) for k, name in enumerate(terms)]
    c = np.arange(1, len(terms) + 1) / 8
    after = narrow(sum_with(before, sum(c[k] * widen(term) for k, term in enumerate(u)), overwrite), dtype)
    for n, _, offset, tail in fewer_placements():
        target = Slice(before[:n], offset, tail)
        loops["combine"](target.elements, slices(u, n), Slice(c, 0).elements, len(terms), n, overwrite)
        assert target.holds(after[:n]), n


@dtype
@state_dtype
def test_quadratic(core, loops, dtype, state_dtype):
    theta, fisher, anchor = eighths(dtype, 9), eighths(state_dtype, 10), eighths(state_dtype, 11)
    summands = widen(fisher) * (widen(theta) - widen(anchor)) ** 2
    before = np.arange(core.LANES) / 8
    for n, index, offset, (second, third, _), _ in placements():
        lanes = Slice(before, 0)
        loops["quadratic"](
            Slice(theta[:n], offset).elements,
            Slice(fisher[:n], second).elements,
            Slice(anchor[:n], third).elements,
            index,
            n,
            lanes.elements,
        )
        assert lanes.holds(lanes_after(core, before, index, summands[:n])), (n, offset)


@dtype
@state_dtype
@overwrite
def test_quadratic_gradient(core, loops, dtype, state_dtype, overwrite):
    theta, fisher, anchor = eighths(dtype, 12), eighths(state_dtype, 13), eighths(state_dtype, 14)
    before = eighths(dtype, 15)
    distance = widen(theta) - widen(anchor)
    after = narrow(sum_with(before, C * widen(fisher) * distance, overwrite), dtype)
    lanes_before = np.arange(core.LANES) / 8
    for n, index, offset, (second, third, fourth), tail in placements():
        target, lanes = Slice(before[:n], offset, tail), Slice(lanes_before, 0)
        loops["quadratic_gradient"](
            target.elements,
            Slice(theta[:n], second).elements,
            Slice(fisher[:n], third).elements,
            Slice(anchor[:n], fourth).elements,
            index,
            n,
            C,
            overwrite,
            lanes.elements,
        )
        assert target.holds(after[:n]), (n, offset)
        assert lanes.holds(lanes_after(core, lanes_before, index, (widen(fisher) * distance**2)[:n])), (n, offset)


@dtype
@state_dtype
def test_shrink(loops, dtype, state_dtype):
    before, fisher, anchor = eighths(dtype, 16), fishers(state_dtype, 17), eighths(state_dtype, 18)
    x = STRENGTH * widen(fisher)
    after = narrow(widen(before) - x / (1 + x) * (widen(before) - widen(anchor)), dtype)
    for n, _, offset, (second, third, _), tail in placements():
        theta = Slice(before[:n], offset, tail)
        loops["shrink"](
            theta.elements, Slice(fisher[:n], second).elements, Slice(anchor[:n], third).elements, n, STRENGTH
        )
        assert theta.holds(after[:n]), (n, offset)


SETTINGS = {
    "factor": 0.7,
    "beta1": 0.9,
    "beta2": 0.99,
    "decay": 0.999,
    "step_size": 0.01,
    "root_scale": 1.3,
    "eps": 1e-3,
    "share": 0.6,
}
SHARE = SETTINGS["share"]


def test_columns_of_settings(core):
    """In C++, here, and in AdamWSettings, whose file is only parsed, because the sanitizers' run has no torch."""
    assert {name: column for column, name in enumerate(SETTINGS)} == core.SETTINGS
    assert len(SETTINGS) == core.NUM_SETTINGS
    reference = Path(__file__).parents[2] / "crl_kernels" / "backends" / "reference.py"
    if not reference.exists():
        pytest.skip("needs the package's source beside the tests")
    [row] = [node for node in ast.parse(reference.read_text()).body if getattr(node, "name", "") == "AdamWSettings"]
    assert [field.target.id for field in row.body if isinstance(field, ast.AnnAssign)] == [*SETTINGS]


adamw_dtypes = pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "rounding_dtype"),
    [
        ("float32", "float32", None),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("float64", "float64", None),
    ],
)


def adamw_inputs(dtype: str, gradient_dtype: str, rounding_dtype: str | None) -> list[np.ndarray]:
    """theta, gradient, m, v and, given its dtype, the rounding, of which every third element is another number. Some of
    theta are a NaN whose bits, rounded as a number's, would be those of -0, beside a rounding of 0."""
    theta, m, v = (anywhere(dtype, seed, max(LENGTHS)) for seed in (30, 31, 32))
    inputs = [theta, anywhere(gradient_dtype, 33, max(LENGTHS)), m, np.abs(v)]
    if rounding_dtype is None:
        return inputs
    rounding = narrow(theta.astype(np.float64), rounding_dtype)
    rounding[::3] = anywhere(rounding_dtype, 36, max(LENGTHS))[::3]
    theta.view(np.uint32)[::33], rounding[::33] = 0x7FFFFFFF, 0
    return [*inputs, rounding]


def begin_of(inputs: list[np.ndarray], rounding_dtype: str | None) -> np.ndarray:
    """Where a step begins: theta, or its rounding where that is another number than theta's."""
    theta = inputs[0]
    if rounding_dtype is None:
        return theta
    written = widen(inputs[4])
    with np.errstate(invalid="ignore"):
        kept = widen(narrow(theta.astype(np.float64), rounding_dtype)) == written
    return np.where(kept, theta, written.astype(theta.dtype))


def adamw_outputs(inputs: list[np.ndarray], start: np.ndarray, pull: np.ndarray) -> list[np.ndarray]:
    """theta, m and v after a step, one operation after the other in theta's own arithmetic."""
    theta, gradient, m, v, *_ = inputs
    real = theta.dtype.type
    factor, beta1, beta2, decay, step_size, root_scale, eps, _ = SETTINGS.values()
    g = real(factor) * widen(gradient).astype(real) + pull
    first = m + real(1 - beta1) * (g - m)
    second = real(beta2) * v + real(1 - beta2) * g * g
    root = real(root_scale) * np.sqrt(second) + real(eps)
    return [real(decay) * start - real(step_size) * (first / root), first, second]


def adamw_slices(inputs: list[np.ndarray], n: int, offset: int, tail: int) -> list[Slice]:
    return [Slice(array[:n], (offset + 3 * i) % 8, tail) for i, array in enumerate(inputs)]


def piece_of(state: list[Slice]) -> list[np.ndarray]:
    """Without a rounding theta is in its place."""
    rounding = [] if len(state) == 5 else [state[0].elements]
    return [*(part.elements for part in state), *rounding, Slice(np.array([*SETTINGS.values()]), 0).elements]


def assert_stepped(
    state: list[Slice], after: list[np.ndarray], rounding_dtype: str | None, n: int, offset: int
) -> None:
    theta, _, m, v, *rounding = state
    expected = [*after, *([narrow(after[0].astype(np.float64), rounding_dtype)] if rounding_dtype else [])]
    for target, elements in zip((theta, m, v, *rounding), expected, strict=True):
        assert target.holds(elements[:n]), (n, offset)


@adamw_dtypes
def test_adamw(loops, dtype, gradient_dtype, rounding_dtype):
    inputs = adamw_inputs(dtype, gradient_dtype, rounding_dtype)
    begin = begin_of(inputs, rounding_dtype)
    after = adamw_outputs(inputs, begin, begin * 0)
    for n, _, offset, tail in fewer_placements():
        state = adamw_slices(inputs, n, offset, tail)
        loops["adamw"](piece_of(state), n)
        assert_stepped(state, after, rounding_dtype, n, offset)
        assert state[1].holds(inputs[1][:n])


@adamw_dtypes
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("terms", [["float32"], ["bfloat16"], ["float64"], ["float16"], ["float32"] * 3 + ["bfloat16"]])
def test_low_rank_adamw(core, loops, dtype, gradient_dtype, rounding_dtype, terms, decoupled):
    """The step in theta's arithmetic, and lanes as test_dot has them, of theta as it is written."""
    inputs, real = adamw_inputs(dtype, gradient_dtype, rounding_dtype), DTYPES[dtype]
    begin = begin_of(inputs, rounding_dtype)
    u = [anywhere(other_dtype, 40 + k, max(LENGTHS)) for k, other_dtype in enumerate(terms)]
    c = np.linspace(-0.3, 0.4, len(terms))
    if len(terms) == 1:
        pull = real(SHARE * c[0]) * widen(u[0]).astype(real)
    else:
        total = np.empty(max(LENGTHS), real)
        loops["combine"](total, u, c, len(terms), total.size, True)
        pull = real(SHARE) * total
    nothing = pull * 0
    after = adamw_outputs(inputs, begin + (pull if decoupled else 0), nothing if decoupled else pull)
    before = np.arange(len(terms) * core.LANES) / 8
    for n, index, offset, tail in fewer_placements():
        state = adamw_slices(inputs, n, offset, tail)
        directions, lanes = slices(u, n), Slice(before, 0)
        loops["low_rank_adamw"](piece_of(state), directions, c, len(terms), decoupled, index, n, lanes.elements)
        assert_stepped(state, after, rounding_dtype, n, offset)
        expected_lanes = before.copy()
        loops["dot"](after[0][:n].copy(), directions, len(terms), index, n, expected_lanes)
        assert lanes.holds(expected_lanes), (n, offset)


@adamw_dtypes
@state_dtype
@pytest.mark.parametrize("decoupled", [False, True])
def test_diagonal_adamw(core, loops, dtype, gradient_dtype, rounding_dtype, state_dtype, decoupled):
    """The step in theta's arithmetic, the penalty in float64, and lanes as test_quadratic has them."""
    inputs, real = adamw_inputs(dtype, gradient_dtype, rounding_dtype), DTYPES[dtype]
    begin = begin_of(inputs, rounding_dtype)
    fisher, anchor = np.abs(anywhere(state_dtype, 34, max(LENGTHS))), anywhere(state_dtype, 35, max(LENGTHS))
    start, nothing = begin.copy(), begin * 0
    loops["shrink"](start, fisher, anchor, start.size, SHARE)
    slope = widen(fisher) * (widen(begin) - widen(anchor))
    pull = (SHARE * slope).astype(real)
    after = adamw_outputs(inputs, start, nothing) if decoupled else adamw_outputs(inputs, begin, pull)
    before = np.arange(core.LANES) / 8
    for n, index, offset, tail in fewer_placements():
        state, diagonal = adamw_slices(inputs, n, offset, tail), slices([fisher, anchor], n)
        lanes = Slice(before, 0)
        loops["diagonal_adamw"](piece_of(state), *diagonal, decoupled, index, n, lanes.elements)
        assert_stepped(state, after, rounding_dtype, n, offset)
        expected_lanes = before.copy()
        loops["quadratic"](begin[:n].copy(), *diagonal, index, n, expected_lanes)
        assert lanes.holds(expected_lanes), (n, offset)


# Any float64 values: the largest error that the arithmetic may have.


def fractions(elements: np.ndarray) -> list[Fraction]:
    return [Fraction(value) for value in widen(elements).tolist()]


def between(rounded: np.ndarray, exact: list[Fraction], doubt: list[Fraction], dtype: str) -> bool:
    """Whether each element is a rounding of some number within ``doubt`` of the exact one."""
    lowest = narrow(np.array([float(e - d) for e, d in zip(exact, doubt, strict=True)]), dtype)
    highest = narrow(np.array([float(e + d) for e, d in zip(exact, doubt, strict=True)]), dtype)
    return bool(np.all((widen(lowest) <= widen(rounded)) & (widen(rounded) <= widen(highest))))


@dtype
@other_dtype
def test_dot_of_any_values(core, loops, dtype, other_dtype):
    """A lane of m products is off by at most m (m with fused, m + 1 without) roundings of the sum of magnitudes; where
    every product is exact, as it is unless a factor is float64, the lane is the plain sum in index order."""
    n, index = 5 * core.LANES + 7, 3
    x, u = anywhere(dtype, 20, n), anywhere(other_dtype, 21, n)
    lanes = np.zeros(core.LANES)
    loops["dot"](x, [u], 1, index, n, lanes)
    products = [a * b for a, b in zip(fractions(x), fractions(u), strict=True)]
    for lane in range(core.LANES):
        summands = products[(lane - index) % core.LANES :: core.LANES]
        error = abs(Fraction(lanes[lane]) - sum(summands))
        assert error <= (len(summands) + 1) * Fraction(UNIT) * sum(abs(summand) for summand in summands)
        if "float64" not in (dtype, other_dtype):
            in_order = 0.0
            for summand in summands:
                in_order += float(summand)
            assert lanes[lane] == in_order


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_fused_dot_of_float64_is_fused(core, name):
    if name not in core.LOOPS:
        pytest.skip(f"needs a processor with {name}")
    n = 6 * core.LANES + 5
    x, u = anywhere("float64", 22, n), anywhere("float64", 23, n)
    lanes, expected = np.zeros(core.LANES), [0.0] * core.LANES
    core.LOOPS[name]["dot"](x, [u], 1, 0, n, lanes)
    for j, (a, b) in enumerate(zip(fractions(x), fractions(u), strict=True)):
        expected[j % core.LANES] = float(a * b + Fraction(expected[j % core.LANES]))
    assert lanes.tolist() == expected


@dtype
@other_dtype
@overwrite
def test_combine_any_values(loops, dtype, other_dtype, overwrite):
    """Overwriting rounds c u once in float64, the same for every instruction set. Adding rounds at most twice."""
    n, c = 83, 0.3141592653589793
    before, u = anywhere(dtype, 24, n), anywhere(other_dtype, 25, n)
    target = before.copy()
    loops["combine"](target, [u], np.array([c]), 1, n, overwrite)
    if overwrite:
        assert target.tobytes() == narrow(c * widen(u), dtype).tobytes()
        return
    terms = [(t, Fraction(c) * b) for t, b in zip(fractions(before), fractions(u), strict=True)]
    sums = [t + b for t, b in terms]
    doubt = [Fraction(2 * UNIT) * (abs(t) + abs(b)) for t, b in terms]
    assert between(target, sums, doubt, dtype)


@dtype
@terms
def test_several_terms_are_each_summed_as_if_alone(core, loops, dtype, terms):
    """Bit by bit, whatever the arithmetic, so that a projection does not depend on the terms beside it."""
    n, index = 3 * core.LANES + 7, 5
    x, u = anywhere(dtype, 29, n), [anywhere(name, 90 + k, n) for k, name in enumerate(terms)]
    together, alone = np.zeros((len(terms), core.LANES)), np.zeros((len(terms), core.LANES))
    loops["dot"](x, u, len(terms), index, n, together)
    for term, lanes in zip(u, alone, strict=True):
        loops["dot"](x, [term], 1, index, n, lanes)
    assert together.tobytes() == alone.tobytes()


@dtype
@terms
@overwrite
def test_combine_several_terms_of_any_values(loops, dtype, terms, overwrite):
    """Two roundings for each term and one for the target at most, then one to the target's dtype."""
    n = 83
    before, u = anywhere(dtype, 31, n), [anywhere(name, 120 + k, n) for k, name in enumerate(terms)]
    c = anywhere("float64", 32, len(terms))
    target = before.copy()
    loops["combine"](target, u, c, len(terms), n, overwrite)
    summands = [[Fraction(factor) * b for b in fractions(term)] for factor, term in zip(c.tolist(), u, strict=True)]
    if not overwrite:
        summands.append(fractions(before))
    sums = [sum(column) for column in zip(*summands, strict=True)]
    doubt = [
        2 * len(summands) * Fraction(UNIT) * sum(abs(summand) for summand in column)
        for column in zip(*summands, strict=True)
    ]
    assert between(target, sums, doubt, dtype)


@dtype
@state_dtype
def test_diagonal_loops_of_any_values(core, loops, dtype, state_dtype):
    n, index, c, strength = 83, 5, 0.3141592653589793, 1.7
    theta, anchor = anywhere(dtype, 26, n), anywhere(state_dtype, 27, n)
    fisher = np.abs(anywhere(state_dtype, 28, n))
    exact = list(zip(fractions(theta), fractions(fisher), fractions(anchor), strict=True))
    slopes = [s * (t - m) for t, s, m in exact]

    lanes, more_lanes = np.zeros(core.LANES), np.zeros(core.LANES)
    gradient = np.empty_like(theta)
    loops["quadratic"](theta, fisher, anchor, index, n, lanes)
    loops["quadratic_gradient"](gradient, theta, fisher, anchor, index, n, c, True, more_lanes)
    assert lanes.tobytes() == more_lanes.tobytes()
    # theta - m, its product with S, and with c: three roundings in this order, the same for every instruction set.
    assert gradient.tobytes() == narrow(c * (widen(fisher) * (widen(theta) - widen(anchor))), dtype).tobytes()
    for lane in range(core.LANES):
        summands = [slope * (t - m) for slope, (t, _, m) in zip(slopes, exact, strict=True)]
        summands = summands[(lane - index) % core.LANES :: core.LANES]
        # Each summand is off by at most four roundings (theta - m counts twice), the sum by one for each summand.
        assert abs(Fraction(lanes[lane]) - sum(summands)) <= (len(summands) + 5) * Fraction(UNIT) * sum(summands)

    loops["shrink"](theta, fisher, anchor, n, strength)
    weights = [Fraction(strength) * s / (1 + Fraction(strength) * s) for _, s, _ in exact]
    moves = [w * (t - m) for w, (t, _, m) in zip(weights, exact, strict=True)]
    # The move is off by at most six roundings, the difference by one.
    doubt = [Fraction(8 * UNIT) * (abs(move) + abs(t)) for move, (t, _, _) in zip(moves, exact, strict=True)]
    steps = [t - move for move, (t, _, _) in zip(moves, exact, strict=True)]
    assert between(theta, steps, doubt, dtype)


# Rounding: every 16-bit element, and every place between two of them where rounding can go wrong.


def convert(loops, elements: np.ndarray, dtype: str, step: int) -> np.ndarray:
    """1 * elements, written as ``dtype``, ``step`` elements a call."""
    target, one = np.empty(elements.size, DTYPES[dtype]), np.ones(1)
    for begin in range(0, elements.size, step):
        part = slice(begin, begin + step)
        loops["combine"](target[part], [elements[part]], one, 1, min(step, elements.size - begin), True)
    return target


def same(elements: np.ndarray, expected: np.ndarray) -> bool:
    """Bit by bit, except that a NaN may be any NaN."""
    elements64, expected64 = widen(elements), widen(expected)
    nan = np.isnan(expected64)
    return bool(np.array_equal(np.isnan(elements64), nan) and elements[~nan].tobytes() == expected[~nan].tobytes())


def all_elements(dtype: str) -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])


def ties_and_their_neighbours(dtype: str) -> np.ndarray:
    """All finite elements, the middle between each and the next larger in magnitude, and the float32 values beside
    both; where an element is the largest, the next is the power of two that overflows."""
    elements = widen(all_elements(dtype))
    magnitudes = np.unique(np.abs(elements[np.isfinite(elements)]))
    following = np.append(magnitudes[1:], 2 * magnitudes[-1] - magnitudes[-2])
    exact = np.concatenate([magnitudes, (magnitudes + following) / 2]).astype(np.float32)
    with np.errstate(over="ignore"):
        beside = [np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    positive = np.concatenate([exact, *beside])
    return np.concatenate([positive, -positive])


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 1e-45, 7.1e-46, 1e-40, 1.2e-38, 3.4e38, 3.5e38, -1e300]

whole_blocks_and_rests = pytest.mark.parametrize("step", [4096, 15])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@whole_blocks_and_rests
def test_every_16_bit_element_is_read_exactly(loops, dtype, step):
    elements = all_elements(dtype)
    assert same(convert(loops, elements, "float64", step), widen(elements))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@whole_blocks_and_rests
def test_writing_16_bits_rounds_to_nearest_even(loops, dtype, step):
    values = ties_and_their_neighbours(dtype)
    assert same(convert(loops, values, dtype, step), narrow(values.astype(np.float64), dtype))


@dtype
@pytest.mark.parametrize("count", [1, 16])
def test_special_values_are_kept(loops, dtype, count):
    """No NaN or infinity is lost, no denormal is flushed, float64 goes to 16 bits through float32."""
    for value in [*SPECIAL, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40]:
        values = np.full(count, value)
        assert same(convert(loops, values, dtype, count), narrow(values, dtype)), value


@pytest.mark.parametrize("count", [1, 16])
def test_nan_and_infinity_reach_every_result(core, loops, count):
    one, zero = np.ones(count), np.zeros(count)
    for bad in (np.nan, np.inf, -np.inf):
        values = np.full(count, bad)
        lanes = np.zeros(core.LANES)
        loops["dot"](values, [zero], 1, 0, count, lanes)
        assert np.isnan(lanes[0])
        lanes = np.zeros(core.LANES)
        loops["quadratic"](values, one, zero, 0, count, lanes)
        assert lanes[0] == np.inf or (np.isnan(bad) and np.isnan(lanes[0]))
        target = np.zeros(count)
        loops["combine"](target, [values], np.zeros(1), 1, count, False)
        assert np.isnan(target).all()
        theta = np.full(count, bad)
        loops["shrink"](theta, zero, one, count, np.inf)  # no curvature, no step: 0 * (inf - 1) is NaN all the same
        assert np.isnan(theta).all()
