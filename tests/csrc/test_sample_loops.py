"""The loops over per-sample gradients, for every instruction set that this processor runs: those of a block of a matrix
(csrc/cpu/sample_matrix.inc) and those of a tile of weight gradients (csrc/cpu/weight_gradients.inc).

Values are few bits wide, so that every sum below is exact in the dtype in which it is taken, and results are compared
bit by bit. Every operand ends where its allocation ends, so that AddressSanitizer sees an access one element too far.
"""

import numpy as np
import pytest
from helpers.loops import DTYPES, Slice, anywhere, dtype, eighths, narrow, widen

real = pytest.mark.parametrize("real", [np.float32, np.float64], ids=["float32", "float64"])
in_float64 = pytest.mark.parametrize("in_float64", [False, True])
LENGTHS = [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 513, 1024, 1025, 2055]
ROWS = [1, 2, 3, 4, 7, 8, 9, 16, 23]


def blocks():
    """(rows, columns, elements from one row to the next, offset of the first)."""
    for step, n in enumerate(LENGTHS):
        for rows in (ROWS[step % len(ROWS)], ROWS[(2 * step + 5) % len(ROWS)]):
            yield rows, n, n + (0, 3, 64)[step % 3], step % 8


def block_of(dtype: str, rows: int, n: int, stride: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows as the loops take them, (rows, n) float64); between the rows is a known pattern of large numbers."""
    elements = np.empty((rows - 1) * stride + n, DTYPES[dtype])
    elements.view(np.uint8).fill(0x5A)
    matrix = np.stack([eighths(dtype, 40 + i)[:n] for i in range(rows)])
    for i, row in enumerate(matrix):
        elements[i * stride : i * stride + n] = row
    return Slice(elements, offset).elements, widen(matrix)


@dtype
@in_float64
@pytest.mark.parametrize("with_squares", [False, True])
@pytest.mark.parametrize("ahead", [0, 4096])
def test_sample_sums(core, loops, dtype, in_float64, with_squares, ahead):
    for rows, n, stride, offset in blocks():
        elements, matrix = block_of(dtype, rows, n, stride, offset)
        room = core.sample_columns(n)
        before = np.arange(room) / 8
        sums, norms = before.copy(), np.arange(rows) / 8
        squares = before.copy() if with_squares else None
        loops["sample_sums"](elements, stride, rows, n, ahead, in_float64, sums, squares, norms)
        assert np.array_equal(sums[:n], before[:n] + matrix.sum(0)), (rows, n)
        assert np.array_equal(norms, np.arange(rows) / 8 + (matrix**2).sum(1)), (rows, n)
        if squares is not None:
            assert np.array_equal(squares[:n], before[:n] + (matrix**2).sum(0)), (rows, n)


@dtype
@in_float64
@pytest.mark.parametrize("terms", [0, 1, 3])
def test_sample_dots(loops, dtype, in_float64, terms):
    weight_dtype = "float64" if dtype == "float64" else "float32"
    for rows, n, stride, offset in blocks():
        elements, matrix = block_of(dtype, rows, n, stride, offset)
        weights_stride = n + 5
        weights = np.full(max(0, (terms - 1) * weights_stride + n), np.nan, DTYPES[weight_dtype])
        for k in range(terms):
            weights[k * weights_stride : k * weights_stride + n] = eighths(weight_dtype, 80 + k)[:n]
        exact = np.array([[row @ eighths("float64", 80 + k)[:n] for k in range(terms)] for row in matrix])
        dots_stride = terms + 2
        dots = Slice(np.ones(rows * dots_stride), 0)
        expected = np.ones((rows, dots_stride))
        expected[:, :terms] += exact.reshape(rows, terms)
        weights = Slice(weights, (offset + 1) % 8).elements
        loops["sample_dots"](
            elements, stride, rows, weights, weights_stride, terms, n, 4096, in_float64, dots.elements, dots_stride
        )
        assert dots.holds(expected.ravel()), (rows, n)


@dtype
def test_sums_in_float32_are_short(core, loops, dtype):
    """For any values: at most 32 roundings of float32 and those of the tree."""
    rows, n = 8, 40_000
    matrix = np.stack([anywhere(dtype, 200 + i, n) for i in range(rows)])
    values = widen(matrix)
    sums, squares, norms, dots = (
        np.zeros(size) for size in (core.sample_columns(n), core.sample_columns(n), rows, rows)
    )
    weights = anywhere("float64" if dtype == "float64" else "float32", 300, n)
    loops["sample_sums"](matrix, n, rows, n, 0, False, sums, squares, norms)
    loops["sample_dots"](matrix, n, rows, weights, n, 1, n, 0, False, dots, 1)
    unit = 2.0**-53 * n if dtype == "float64" else 2.0**-24 * 33
    assert np.all(np.abs(sums[:n] - values.sum(0)) <= unit * np.abs(values).sum(0))
    assert np.all(np.abs(squares[:n] - (values**2).sum(0)) <= unit * (values**2).sum(0))
    assert np.all(np.abs(norms - (values**2).sum(1)) <= unit * (values**2).sum(1))
    assert np.all(np.abs(dots - values @ widen(weights)) <= unit * (np.abs(values) @ np.abs(widen(weights))))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@in_float64
def test_nan_and_infinity_reach_their_results_and_no_other(core, loops, in_float64, bad):
    rows, n, at = 9, 100, 97
    matrix = np.ones((rows, n), np.float32)
    matrix[4, at] = bad
    room = core.sample_columns(n)
    sums, squares, norms, dots = np.zeros(room), np.zeros(room), np.zeros(rows), np.zeros(rows)
    loops["sample_sums"](matrix, n, rows, n, 0, in_float64, sums, squares, norms)
    loops["sample_dots"](matrix, n, rows, np.ones(n, np.float32), n, 1, n, 0, in_float64, dots, 1)
    for results, place in ((sums[:n], at), (squares[:n], at), (norms, 4), (dots, 4)):
        assert np.array_equal(results[place], bad, equal_nan=True)
        assert np.isfinite(np.delete(results, place)).all()


@dtype
def test_divide(loops, dtype):
    sums = anywhere("float64", 50, max(LENGTHS))
    for n in LENGTHS:
        target = Slice(np.zeros(n, DTYPES[dtype]), n % 8, 3)
        loops["divide"](target.elements, Slice(sums[:n], (n + 3) % 8).elements, 7.0, n)
        assert target.holds(narrow(sums[:n] / 7, dtype)), n


def integers(shape: tuple[int, ...], dtype: type, seed: int) -> np.ndarray:
    """From -4 to 4, in an allocation that ends with them; products of sums of 33 rows are exact in float32."""
    values = np.random.default_rng(seed).integers(-4, 4, shape, endpoint=True).astype(dtype)
    return Slice(values.ravel(), seed % 8).elements.reshape(shape)


@real
@pytest.mark.parametrize("input_in_rows", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (3, 2)], ids=str)
def test_correlate(core, loops, real, input_in_rows, stride, dilation):
    """Images of one pixel, of fewer and of more pixels than a run, in a row and in many, and of none."""
    columns = loops["block_columns"](np.dtype(real))
    kernel = (2, 3)
    for seed, (height, width) in enumerate(
        [(1, 1), (3, 5), (9, 7), (1, 200), (200, 1), (13, 64), (5, 65), (0, 3), (3, 0)]
    ):
        sides = [
            max(1, (out - 1) * step + (size - 1) * spread + 1)
            for out, step, size, spread in zip((height, width), stride, kernel, dilation, strict=True)
        ]
        lanes = (core.BLOCK_ROWS, columns) if input_in_rows else (columns, core.BLOCK_ROWS)
        a, b = integers((*sides, lanes[0]), real, seed), integers((height, width, lanes[1]), real, seed + 1)
        walk_a = (stride[0] * sides[1], stride[1], dilation[0] * sides[1], dilation[1])
        walk_b = (width, 1, 0, 0)
        for ky, kx in np.ndindex(kernel):
            block = Slice(np.full(core.BLOCK_ROWS * columns, np.nan, real), seed % 8, 3)
            operands = (a, walk_a, b, walk_b) if input_in_rows else (b, walk_b, a, walk_a)
            loops["correlate"](*operands, height, width, ky, kx, block.elements)
            y, x = (
                slice(k * spread, k * spread + (out - 1) * step + 1, step) if out else slice(0, 0)
                for k, spread, out, step in zip((ky, kx), dilation, (height, width), stride, strict=True)
            )
            pair = (a[y, x], b) if input_in_rows else (b, a[y, x])
            expected = np.einsum("yxr,yxc->rc", *pair) if height and width else np.zeros((core.BLOCK_ROWS, columns))
            assert np.array_equal(block.elements, expected.ravel()), (height, width, ky, kx)
            assert block.holds(block.elements.copy())


@real
@pytest.mark.parametrize("directions", [None, 0, 1, 3, 4])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("squares", [False, True])
def test_statistics_of_a_tile(loops, real, directions, gram, squares):
    for samples in (0, 1, 2, 3, 4, 5, 7, 8, 9, 33):
        length = loops["block_columns"](np.dtype(real)) * (1, 5, 12)[samples % 3]
        rows = integers((samples, length), real, samples)
        u = integers((directions, length), real, 90) if directions else None
        count = 1 if directions is None else directions
        norms, projections = Slice(np.full(samples, 0.5), 0), Slice(np.full(samples * count, 0.5), 0)
        products = np.full((samples, samples), 0.5) if gram else None
        total = Slice(np.full(length, np.nan, real), samples % 8, 3)
        total_squares = Slice(np.full(length, np.nan, real), samples % 8, 3)
        loops["tile_statistics"](
            rows,
            samples,
            length,
            norms.elements,
            projections.elements,
            products,
            u,
            count,
            total.elements,
            total_squares.elements if squares else None,
        )
        values = rows.astype(np.float64)
        along = (values.sum(0)[None] if u is None else u.astype(np.float64))[:count]
        assert norms.holds(0.5 + (values**2).sum(1))
        assert projections.holds(0.5 + (values @ along.T).ravel())
        assert total.holds(values.sum(0).astype(real))
        assert total_squares.holds((values**2).sum(0).astype(real) if squares else np.full(length, np.nan, real))
        if products is not None:
            assert np.array_equal(np.tril(products), np.tril(0.5 + values @ values.T))
