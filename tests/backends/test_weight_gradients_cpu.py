"""Per-sample weight gradients of a convolution on a CPU: hostile shapes, NaN and Inf, threads, instruction sets, what
is refused. What every backend must give is in test_weight_gradients.py."""

import pytest
import torch
import torch.nn.functional as F
from helpers.backends import (
    BACKENDS,
    EXAMPLES,
    assert_pass_with_narrower_loops,
    for_narrower_loops,
    largest_error,
    least_bound,
    needs_cpu_library,
    needs_library,
    poison,
    threads,
)
from helpers.weight_gradients import ARGUMENTS, checked_statistics, images, output_sizes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crl_kernels.backends import reference
from crl_kernels.backends.reference import Convolution

REALS = {"float32": torch.float32, "float64": torch.float64}
LAYOUTS = ["contiguous", "channels last", "tokens", "offset", "expanded samples", "expanded pixels"]

operator = torch.ops.crl_kernels.sample_weight_gradients
channels = st.sampled_from([1, 3, 5, 6, 7, 15, 16, 17, 40])
pair = st.tuples(*[st.sampled_from([1, 2, 3])] * 2)
geometries = st.tuples(pair, pair, st.tuples(*[st.integers(0, 2)] * 2), st.tuples(*[st.integers(1, 2)] * 2))
sides = st.sampled_from([0, 1, 2, 3, 5, 8, 11])
ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # a linear layer
SAME = ((3, 3), (1, 1), (1, 1), (1, 1))


def statistics(rows: Tensor, u: Tensor | None, gram: bool, squares: bool) -> list[Tensor]:
    """What one writes in PyTorch, of gradients (N, P) and in their dtype."""
    total = rows.sum(0)
    results = [total, rows.norm(dim=1).square(), rows @ (total[None] if u is None else u).T]
    return results + [rows @ rows.T] * gram + [rows.square().sum(0)] * squares


def assert_as_good_as_plain(backend, a: Tensor, b: Tensor, geometry, groups, u: Tensor | None, gram, squares) -> None:
    results = checked_statistics(backend, a, b, geometry, groups, u, gram, squares)

    def plain(a: Tensor, b: Tensor, u: Tensor | None) -> list[Tensor]:
        rows = reference.sample_weight_gradient_matrix(Convolution(a, b, *geometry, groups)).flatten(1)
        return statistics(rows, None if u is None else u.flatten(1), gram, squares)

    exact = reference.sample_weight_gradients(
        a.double(), b.double(), *geometry, groups, None if u is None else u.double(), gram, squares
    )
    # Plain PyTorch may be lucky with few pixels or equal ones, so the expected error of n terms one after the other is
    # allowed too, first a run of at most 64 pixels, then the samples: sqrt(n) roundings, or n of them where the terms
    # are equal and round alike.
    pixels, run = b.shape[2] * b.shape[3], min(64, b.shape[2] * b.shape[3])
    equal = [all(x.stride(i) == 0 for x in (a, b) for i in axes) for axes in ((2, 3), (0,))]
    squared = sum(n**2 if alike else n for n, alike in zip((run, len(a)), equal, strict=True))
    allowed = least_bound(a.dtype) * (max(1, squared) ** 0.5 if pixels <= 256 or equal[0] else 1)
    wanted = [0, 1, 2] + [3] * gram + [4] * squares
    sizes = plain(a.double().abs(), b.double().abs(), None if u is None else u.double().abs())
    for i, theirs, size in zip(wanted, plain(a, b, u), sizes, strict=True):
        truth = exact[i].reshape(size.shape)
        ours = largest_error(results[i].reshape(size.shape), truth, size)
        assert ours <= max(2 * largest_error(theirs, truth, size), allowed), i
    if gram:
        assert torch.equal(results[3], results[3].T) or backend is reference


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=2 * EXAMPLES)
@given(
    count=st.sampled_from([0, 1, 2, 7, 8, 9, 33]),
    inputs=channels,
    outputs=channels,
    groups=st.sampled_from([1, 1, 2, 3, "depthwise"]),
    geometry=geometries,
    image=st.tuples(sides, sides),
    directions=st.sampled_from([None, None, 0, 1, 3, 4]),
    gram=st.booleans(),
    squares=st.booleans(),
    dtype=st.sampled_from(sorted(REALS)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    seed=st.integers(0, 2**30),
)
@example(2, 3, 5, 1, SAME, (64, 64), None, True, True, "float32", ("contiguous", "contiguous"), 0)  # many pixels
@example(4, 7, 6, 1, ONE, (1, 5_000), 1, True, True, "float32", ("tokens", "tokens"), 0)
@example(9, 40, 17, 1, ONE, (1, 33), 3, True, True, "float32", ("tokens", "tokens"), 0)
@example(8, 5, 7, 1, ((3, 3), (3, 3), (0, 0), (1, 1)), (11, 10), None, True, True, "float32", ("offset",) * 2, 0)
@example(7, 1, 7, 1, ONE, (8, 8), None, False, False, "float32", ("expanded pixels",) * 2, 0)  # equal terms
@example(3, 5, 7, 1, ONE, (2, 2), 0, True, False, "float32", ("contiguous", "contiguous"), 0)
@example(1, 40, 120, 2, SAME, (5, 3), 4, True, True, "float32", ("channels last",) * 2, 0)  # several tiles
def test_statistics(
    backend, count, inputs, outputs, groups, geometry, image, directions, gram, squares, dtype, layouts, seed
):
    if groups == "depthwise":
        inputs, outputs, groups = 1, min(outputs, 3), inputs
    out = output_sizes(image, geometry)
    a = images((count, groups * inputs, *image), REALS[dtype], layouts[0], seed)
    b = images((count, groups * outputs, *out), REALS[dtype], layouts[1], seed + 1)
    u = None
    if directions is not None:
        u = torch.randn(
            directions,
            groups * outputs,
            inputs,
            *geometry[0],
            generator=torch.Generator().manual_seed(seed + 2),
            dtype=REALS[dtype],
        )
    assert_as_good_as_plain(backend, a, b, geometry, groups, u, gram, squares)


@settings(deadline=None, max_examples=30)
@given(
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    groups=st.integers(1, 3),
    geometry=geometries,
    seed=st.integers(0),
)
def test_the_reference_equals_autograd_sample_by_sample(inputs, outputs, groups, geometry, seed):
    generator = torch.Generator().manual_seed(seed % 2**62)
    a = torch.randn(3, groups * inputs, 7, 6, generator=generator, dtype=torch.float64)
    weight = torch.zeros(groups * outputs, inputs, *geometry[0], dtype=torch.float64, requires_grad=True)
    kernel, stride, padding, dilation = geometry
    b = torch.randn(3, groups * outputs, *output_sizes((7, 6), geometry), generator=generator, dtype=torch.float64)
    results = reference.sample_weight_gradient_matrix(Convolution(a, b, kernel, stride, padding, dilation, groups))
    for i in range(3):
        output = F.conv2d(a[i : i + 1], weight, None, stride, padding, dilation, groups)
        (expected,) = torch.autograd.grad(output, weight, b[i : i + 1])
        torch.testing.assert_close(results[i], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", REALS.values(), ids=str)
def test_identities(backend, dtype):
    """sum_j G_ij = g_i . sum, sum_i g_i . sum = |sum|^2, tr G = sum_i |g_i|^2 = the sum of all squares."""
    a, b = images((19, 7, 9, 8), dtype, "contiguous", 0), images((19, 20, 9, 8), dtype, "channels last", 1)
    total, sq_norms, projections, gram, squares = backend.sample_weight_gradients(a, b, *SAME, 1, None, True, True)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 0}
    torch.testing.assert_close(gram.sum(1), projections[:, 0], **tolerance)
    torch.testing.assert_close(projections.sum(), total.double().square().sum(), **tolerance)
    torch.testing.assert_close(gram.diagonal(), sq_norms, **tolerance)
    torch.testing.assert_close(squares.double().sum(), sq_norms.sum(), **tolerance)
    on_total = backend.sample_weight_gradients(a, b, *SAME, 1, total[None], False, False)[2]
    torch.testing.assert_close(on_total, projections, **tolerance)


@needs_library
@pytest.mark.parametrize(
    ("shapes", "geometry", "groups"),
    [
        (((33, 16, 8, 8), (33, 17, 8, 8)), SAME, 1),
        (((9, 40, 1, 50), (9, 130, 1, 50)), ONE, 1),
        (((8, 12, 9, 9), (8, 24, 9, 9)), SAME, 12),
    ],
    ids=["convolution", "linear", "depthwise"],
)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(shapes, geometry, groups):
    a, b = (images(shape, torch.float32, "contiguous", i) for i, shape in enumerate(shapes))
    results = []
    for count in (1, 2, 1):
        with threads(count):
            poison()
            results.append(operator(a, b, *geometry, groups, None, True, True))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_input", [False, True])
@pytest.mark.parametrize("sizes", [(5, 7), (40, 13)], ids=str)
def test_nan_and_inf_reach_their_results_and_no_other(backend, bad, in_input, sizes):
    """Beside channels that do not fill a vector."""
    operands = [torch.full((3, channels, 4, 4), 0.5) for channels in sizes]
    operands[0 if in_input else 1][1, 3, 2, 2] = bad
    u = torch.ones(2, sizes[1], sizes[0], 1, 1)
    results = backend.sample_weight_gradients(*operands, *ONE, 1, u, True, True)
    expected = reference.sample_weight_gradients(*(t.double() for t in operands), *ONE, 1, u.double(), True, True)
    for ours, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, equal_nan=True)
    assert results[1].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("input", "output"),
    [
        ((0, 3, 5, 5), (0, 4, 5, 5)),
        ((2, 0, 5, 5), (2, 4, 5, 5)),
        ((2, 3, 5, 5), (2, 0, 5, 5)),
        ((2, 3, 0, 5), (2, 4, 0, 5)),
        ((2, 3, 5, 0), (2, 4, 5, 0)),
    ],
    ids=["no samples", "no inputs", "no outputs", "no rows", "no columns"],
)
def test_statistics_of_nothing_are_zero(backend, input, output):
    u = torch.ones(2, output[1], input[1], 1, 1)
    poison()
    results = backend.sample_weight_gradients(torch.ones(input), torch.ones(output), *ONE, 1, u, True, True)
    weight, count = (output[1], input[1], 1, 1), input[0]
    assert [t.shape for t in results] == [weight, (count,), (count, 2), (count, count), weight]
    assert not any(t.any() for t in results)


@needs_cpu_library
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grad_output": torch.ones(2, 6, 6, 5)}, "images of 6 x 5 pixels, but this convolution gives 5 x 5"),
        ({"grad_output": torch.ones(2, 6, 5, 4)}, "images of 5 x 4 pixels, but this convolution gives 5 x 5"),
        ({"grad_output": torch.ones(3, 6, 5, 5)}, r"shape \(N, channels, height, width\)"),
        ({"grad_output": torch.ones(2, 6, 25)}, r"shape \(N, channels, height, width\)"),
        ({"input": torch.ones(4, 5, 5)}, r"shape \(N, channels, height, width\)"),
        ({"input": torch.ones(2, 3, 5, 5)}, "channels are no multiple of groups"),
        ({"grad_output": torch.ones(2, 5, 5, 5)}, "channels are no multiple of groups"),
        ({"groups": 0}, "channels are no multiple of groups"),
        ({"input": torch.ones(2, 4, 5, 5).double()}, "have one dtype"),
        ({"input": torch.ones(2, 4, 5, 5).int()}, "expected float32, float64"),
        ({"kernel_size": [3]}, "as pairs"),
        ({"stride": [1, 1, 1]}, "as pairs"),
        ({"kernel_size": [0, 3]}, "above 0"),
        ({"stride": [1, 0]}, "above 0"),
        ({"dilation": [-1, 1]}, "above 0"),
        ({"padding": [-1, 1]}, "padding from 0 to"),
        ({"padding": [1, 2**62]}, "padding from 0 to"),
        ({"stride": [2**62, 1]}, "this convolution gives 1 x 5"),
        ({"dilation": [2**62, 1]}, "this convolution gives 0 x 5"),
        ({"kernel_size": [2**62, 3]}, "this convolution gives 0 x 5"),
        (
            {"padding": [2**32, 2**32], "stride": [2**31, 2**31], "grad_output": torch.ones(2, 6, 5, 5)},
            "more elements than int64 counts",
        ),
        ({"directions": torch.ones(3, 6, 2, 3, 3).double()}, "directions have the dtype of the sum"),
        ({"directions": torch.ones(3, 6, 4, 3, 3)}, "directions have the dtype of the sum and the shape"),
        ({"directions": torch.ones(3, 2, 6, 3, 3)}, "directions have the dtype of the sum and the shape"),
        ({"directions": torch.ones(3, 108)}, "directions have the dtype of the sum and the shape"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_operands_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(RuntimeError, match=f"crl_kernels: .*{message}"):
        operator(*(ARGUMENTS | wrong).values())


CASES = [(torch.float32, None), (torch.float64, 2)]


@pytest.mark.parametrize(("dtype", "directions"), CASES, ids=str)
def test_opcheck(dtype, directions):
    a, b = images((3, 4, 6, 5), dtype, "channels last", 0), images((3, 6, 3, 3), dtype, "contiguous", 1)
    u = None if directions is None else torch.ones(directions, 6, 2, 3, 3, dtype=dtype)
    geometry = ([3, 3], [2, 2], [1, 1], [1, 1])
    for more in (False, True):
        torch.library.opcheck(operator, (a, b, *geometry, 2, u, more, more))


@pytest.mark.parametrize(("dtype", "directions"), CASES, ids=str)
def test_compile_fullgraph_equals_eager(dtype, directions):
    a, b = images((3, 4, 6, 5), dtype, "contiguous", 0), images((3, 6, 6, 5), dtype, "contiguous", 1)
    u = None if directions is None else torch.ones(directions, 6, 4, 3, 3, dtype=dtype)

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        geometry = tuple(list(pair) for pair in SAME)
        return *operator(a, b, *geometry, 1, u, True, True), *operator(a, b, *geometry, 1, u, False, False)

    for result, expected in zip(torch.compile(both, fullgraph=True)(a, b), both(a, b), strict=True):
        assert torch.equal(result, expected)


@for_narrower_loops
def test_this_file_passes_with_narrower_loops(isa):
    assert_pass_with_narrower_loops(isa, __file__, "compiled or bitwise")
