"""Statistics of a matrix of per-sample gradients, on every backend, against float64 and plain PyTorch."""

import pytest
import torch
from helpers.backends import (
    BACKENDS,
    DTYPES,
    EXAMPLES,
    assert_pass_with_narrower_loops,
    for_narrower_loops,
    largest_error,
    least_bound,
    needs_library,
    poison,
    threads,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import crl_kernels as ck
from crl_kernels.backends import reference, registry

LAYOUTS = ["contiguous", "offset", "row stride", "transposed", "expanded"]

num_rows = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 65, 257, 300]))
num_columns = st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 255, 257, 1023, 1025, 4095, 4096, 4097, 8200])
BLOCK = 4096  # columns of a block of up to 16 rows on a CPU
if registry.INTERPRETED:
    BLOCK = 64
    from crl_kernels.backends.triton import sample_matrix

    # Every path on less data: several tiles, programs and reads from 9 rows, 65 columns and 3 directions on.
    sample_matrix.ROWS, sample_matrix.TILE, sample_matrix.COLUMNS, sample_matrix.TERMS = 8, 128, 64, 2
    sample_matrix.GROUP = 16
    num_rows = st.integers(1, 20)
    num_columns = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65])


def make(rows: int, columns: int, dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """A matrix with a common part, so that its mean is more than noise, and the named memory layout."""
    generator = torch.Generator().manual_seed(seed)

    def fresh(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)

    if layout == "offset":
        return fresh(rows * columns + 1)[1:].reshape(rows, columns)
    if layout == "row stride":
        return fresh(rows, columns + 3)[:, 1 : columns + 1]
    if layout == "transposed":
        return fresh(columns, rows).t()
    if layout == "expanded":
        return fresh(1, columns).expand(rows, columns)
    return fresh(rows, columns)


def plain(grads: Tensor, direction: Tensor | None) -> list[Tensor]:
    """What one writes in PyTorch, in the gradients' dtype; 16-bit results are float32's business."""
    values = grads if grads.dtype == torch.float64 else grads.float()
    mean = values.mean(0)
    return [mean, values.norm(dim=1).square(), values @ (mean if direction is None else direction.to(mean.dtype)),
            values.square().mean(0)]  # fmt: skip


def statistics(values: Tensor, direction: Tensor | None) -> list[Tensor]:
    """In float64: of gradients, or of their magnitudes."""
    mean = values.mean(0)
    return [mean, values.square().sum(1), values @ (mean if direction is None else direction), values.square().mean(0)]


def assert_as_good_as_plain(results: list[Tensor], grads: Tensor, direction: Tensor | None) -> None:
    values, u = grads.double(), None if direction is None else direction.double()
    exact, sizes = statistics(values, u), statistics(values.abs(), None if u is None else u.abs())
    for ours, theirs, truth, size in zip(results, plain(grads, direction), exact, sizes, strict=False):
        assert largest_error(ours, truth, size) <= max(2 * largest_error(theirs, truth, size), least_bound(grads.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=EXAMPLES)
@given(
    rows=num_rows,
    columns=num_columns,
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from(LAYOUTS),
    terms=st.sampled_from([None, None, 0, 1, 3, 5]),
    diagonal=st.booleans(),
    seed=st.integers(0, 2**30),
)
@example(rows=16, columns=BLOCK + 3, dtype="float32", layout="contiguous", terms=None, diagonal=True, seed=0)
@example(rows=17, columns=4 * BLOCK + 1, dtype="bfloat16", layout="row stride", terms=3, diagonal=True, seed=0)
@example(rows=3, columns=0, dtype="float16", layout="contiguous", terms=2, diagonal=True, seed=0)
def test_statistics(backend, rows, columns, dtype, layout, terms, diagonal, seed):
    grads = make(rows, columns, DTYPES[dtype], layout, seed)
    mean_dtype = reference.mean_dtype(grads.dtype)
    directions = None if terms is None else make(terms, columns, mean_dtype, "contiguous", seed + 1)
    poison()
    results = backend.sample_gradient_stats(grads, directions, diagonal)
    shapes = [(columns,), (rows,), (rows,) if terms is None else (rows, terms), (columns,)]
    dtypes = [mean_dtype, torch.float64, torch.float64, mean_dtype]
    assert [(t.shape, t.dtype) for t in results] == list(zip(shapes, dtypes, strict=True))[: 3 + diagonal]
    if terms is None:
        assert_as_good_as_plain(results, grads, None)
    for k in range(terms or 0):
        ours = [results[0], results[1], results[2][:, k], *results[3:]]
        assert_as_good_as_plain(ours, grads, directions[k])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=5 if registry.INTERPRETED else EXAMPLES)
@given(
    rows=num_rows,
    columns=num_columns,
    dtype=st.sampled_from(sorted(DTYPES)),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**30),
)
@example(rows=17, columns=8 * BLOCK + 1, dtype="float32", layout="contiguous", seed=0)
def test_gram(backend, rows, columns, dtype, layout, seed):
    grads = make(rows, columns, DTYPES[dtype], layout, seed)
    poison()
    gram = backend.sample_gram(grads)
    assert (gram.shape, gram.dtype) == ((rows, rows), torch.float64)
    assert torch.equal(gram, gram.T)
    values = grads.double()
    low = grads if grads.dtype == torch.float64 else grads.float()
    exact, size = values @ values.T, values.abs() @ values.abs().T
    assert largest_error(gram, exact, size) <= max(
        2 * largest_error(low @ low.T, exact, size), least_bound(grads.dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_identities(dtype):
    """mean_j G_ij = p_i, mean_i p_i = |mu|^2, and the trace of G is the sum of square norms."""
    grads = make(19, BLOCK // 2 + 5, dtype, "contiguous", 0)
    mean, sq_norms, projections = ck.sample_gradient_stats(grads)
    gram = ck.sample_gram(grads)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0}
    torch.testing.assert_close(gram.mean(1), projections, **tolerance)
    torch.testing.assert_close(projections.mean(), mean.double().square().sum(), **tolerance)
    torch.testing.assert_close(gram.trace(), sq_norms.sum(), **tolerance)
    torch.testing.assert_close(ck.sample_gradient_stats(grads, mean).projections, projections, rtol=1e-15, atol=0)


@needs_library
@pytest.mark.parametrize("shape", [(64, 20_003), (3, 200_001), (300, 1_500)], ids=str)
def test_bitwise_the_same_from_run_to_run_and_for_any_number_of_threads(shape):
    if registry.INTERPRETED:
        shape = (min(shape[0], 17), shape[1] // 500)
    grads = make(*shape, torch.float32, "contiguous", 0)
    results = []
    for count in (1, 2, 1):
        with threads(count):
            results.append([*ck.sample_gradient_stats(grads, diagonal=True), ck.sample_gram(grads)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_squares_beyond_the_range_of_float32(backend, scale):
    """One row of very large or very small gradients, beside a row of zeros."""
    grads = make(5, BLOCK + 900, torch.float32, "contiguous", 0)
    grads[1], grads[2] = grads[1] * scale, 0
    assert_as_good_as_plain_for_range(backend, grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_that_vanishes(backend):
    grads = make(4, BLOCK + 900, torch.float32, "contiguous", 0)
    grads[2:] = -grads[:2]
    mean, _, projections = backend.sample_gradient_stats(grads, None, False)
    assert not mean.any()
    assert not projections.any()
    grads[:, :] *= 1e-25
    grads[3] *= 1 + 1e-6
    assert_as_good_as_plain_for_range(backend, grads)


def assert_as_good_as_plain_for_range(backend, grads: Tensor) -> None:
    values = grads.double()
    mean, sq_norms, projections, diagonal = backend.sample_gradient_stats(grads, None, True)
    tight = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(sq_norms, values.square().sum(1), **tight)
    expected, size = values @ mean.double(), values.abs() @ mean.double().abs()
    assert largest_error(projections, expected, size) <= 1e-6
    unit = torch.finfo(torch.float32)
    exact = values.square().mean(0)
    inside = (exact < unit.max) & (exact > unit.smallest_normal)
    torch.testing.assert_close(diagonal[inside].double(), exact[inside], **tight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [17, BLOCK + 3])
def test_nan_and_inf_pass_through(backend, bad, at):
    grads = torch.ones(9, BLOCK + 4)
    grads[2, at] = bad
    mean, sq_norms, projections, diagonal = backend.sample_gradient_stats(grads, None, True)
    touched = torch.tensor(bad, dtype=torch.float64)
    for result in (mean[at], sq_norms[2], projections[0], diagonal[at]):
        torch.testing.assert_close(result.double(), touched, equal_nan=True)
    gram = backend.sample_gram(grads)
    torch.testing.assert_close(gram[2, 2], touched, equal_nan=True)
    for result in (mean, sq_norms, diagonal, gram[0]):
        assert result.isfinite().sum() == result.numel() - 1


def test_directions_and_the_diagonal():
    grads, u = make(6, 40, torch.bfloat16, "contiguous", 0), make(2, 40, torch.bfloat16, "contiguous", 1)
    one, both = ck.sample_gradient_stats(grads, u[1]), ck.sample_gradient_stats(grads, u, diagonal=True)
    assert (one.projections.shape, both.projections.shape) == ((6,), (6, 2))
    torch.testing.assert_close(both.projections[:, 1], one.projections, rtol=0, atol=0)
    assert len(one) == 3
    mean, _, _, diagonal = both
    torch.testing.assert_close(mean, grads.float().mean(0))
    torch.testing.assert_close(diagonal, grads.float().square().mean(0))


def test_results_are_constants():
    grads = make(4, 10, torch.float32, "contiguous", 0).requires_grad_()
    results = [*ck.sample_gradient_stats(grads, grads[0], diagonal=True), ck.sample_gram(grads)]
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(
    ("grads", "direction", "error", "message"),
    [
        (torch.ones(3), None, ValueError, r"grads has shape \(3,\), expected \(N, P\)"),
        (torch.ones(0, 3), None, ValueError, r"grads has shape \(0, 3\), expected \(N, P\)"),
        (torch.ones(2, 3, dtype=torch.int32), None, TypeError, "grads is torch.int32, expected float32"),
        (torch.ones(2, 3), torch.ones(4), ValueError, r"direction has shape \(4,\), expected \(3,\) or \(K, 3\)"),
        (torch.ones(2, 3), torch.ones(1, 1, 3), ValueError, r"direction has shape \(1, 1, 3\)"),
        (torch.ones(2, 3), torch.ones(3).double(), TypeError, r"torch.float64.*direction.to\(torch.float32\)"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.int8), TypeError, "direction is torch.int8"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), ValueError, "direction is on meta and grads on cpu"),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_errors_name_the_argument(grads, direction, error, message):
    with pytest.raises(error, match=message):
        ck.sample_gradient_stats(grads, direction)
    if direction is None:
        with pytest.raises(error, match=message):
            ck.sample_gram(grads)


@needs_library
def test_operators_refuse_arguments_that_would_read_out_of_bounds():
    ops = torch.ops.crl_kernels
    for call in (
        lambda: ops.sample_gradient_stats(torch.ones(3), None, False),
        lambda: ops.sample_gradient_stats(torch.ones(2, 3), torch.ones(1, 2), False),
        lambda: ops.sample_gradient_stats(torch.ones(2, 3), torch.ones(1, 3).bfloat16(), False),
        lambda: ops.sample_gram(torch.ones(0, 3)),
        lambda: ops.sample_gram(torch.ones(2, 3, dtype=torch.int64)),
    ):
        with pytest.raises(RuntimeError, match="crl_kernels: "):
            call()


@pytest.mark.skipif(registry.INTERPRETED, reason="compiled code does not depend on the operators' backend")
def test_compile_fullgraph_equals_eager():
    grads = make(6, 50, torch.float32, "contiguous", 0)

    def both(grads: Tensor) -> tuple[Tensor, ...]:
        return *ck.sample_gradient_stats(grads, diagonal=True), *ck.sample_gradient_stats(grads, grads[:2]), \
            ck.sample_gram(grads)  # fmt: skip

    for result, expected in zip(torch.compile(both, fullgraph=True)(grads), both(grads), strict=True):
        assert torch.equal(result, expected)


@for_narrower_loops
def test_this_file_passes_with_narrower_loops(isa):
    assert_pass_with_narrower_loops(isa, __file__, "compiled")
