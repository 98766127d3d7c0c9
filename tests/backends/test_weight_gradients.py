"""Statistics of per-sample weight gradients of convolutions, on every backend that runs here, against float64 and plain
PyTorch."""

import itertools

import pytest
import torch
from helpers.backends import BACKENDS, DTYPES, EXAMPLES, largest_error, least_bound, needs_library, poison
from helpers.weight_gradients import ARGUMENTS, checked_statistics, images, output_sizes
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crl_kernels.backends import reference, registry
from crl_kernels.backends.reference import Convolution
from crl_kernels.per_sample.layer_gradients import ConvolutionGradient, LinearGradient, Wanted

if registry.INTERPRETED:
    from crl_kernels.backends.triton import weight_gradients

LAYOUTS = ["contiguous", "channels last", "sliced", "transposed", "expanded samples"]


def rows_of(input: Tensor, grad_output: Tensor, kernel, stride, padding, dilation, groups: int) -> Tensor:
    """(N, *weight), one sample after the other, by autograd's own function."""
    weight = (grad_output.shape[1], input.shape[1] // groups, *kernel)
    rows = [
        torch.nn.grad.conv2d_weight(a, weight, b, stride, padding, dilation, groups)
        for a, b in zip(input.split(1), grad_output.split(1), strict=True)
    ]
    return torch.stack(rows)


def statistics(rows: Tensor, directions: Tensor | None) -> list[Tensor]:
    """(sum, square norms, projections, Gram matrix, sum of squares)"""
    total, flat = rows.sum(0), rows.flatten(1)
    u = total.flatten()[None] if directions is None else directions.to(rows.dtype).flatten(1)
    return [total, flat.square().sum(1), flat @ u.T, flat @ flat.T, rows.square().sum(0)]


def assert_as_good_as_plain(results, input: Tensor, grad_output: Tensor, geometry, directions: Tensor | None) -> None:
    """Errors in units of the magnitudes that are added; 16-bit operands are float32's business.

    Plain PyTorch may be lucky where there are few elements, so the expected error of n terms in any order is allowed
    too: sqrt(n) roundings (Higham and Mary, doi 10.1137/18M1226312).
    """
    terms = max(1, grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3])
    allowed = least_bound(input.dtype) * terms**0.5
    low = torch.promote_types(input.dtype, torch.float32)
    exact = statistics(rows_of(input.double(), grad_output.double(), *geometry), directions)
    plain = statistics(rows_of(input.to(low), grad_output.to(low), *geometry), directions)
    size = statistics(
        rows_of(input.double().abs(), grad_output.double().abs(), *geometry),
        None if directions is None else directions.double().abs(),
    )
    for ours, theirs, truth, magnitude in zip(results, plain, exact, size, strict=True):
        if ours.numel() > 0:
            assert largest_error(ours, truth, magnitude) <= max(2 * largest_error(theirs, truth, magnitude), allowed)


pair = st.tuples(st.integers(1, 2), st.integers(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=2 * EXAMPLES)
@given(
    count=st.integers(0, 5),
    groups=st.sampled_from([1, 1, 2, 3]),
    channels=st.tuples(st.sampled_from([1, 2, 7, 8, 17]), st.sampled_from([1, 3, 16, 19])),
    size=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    kernel=st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3), (1, 4)]),
    stride=pair,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=pair,
    dtype=st.sampled_from(sorted(DTYPES)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    terms=st.sampled_from([None, None, 0, 1, 3]),
    gram=st.sampled_from([False, False, True]),
    squares=st.booleans(),
    seed=st.integers(0, 2**30),
)
@example(4, 1, (40, 33), (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), "bfloat16", ("contiguous",) * 2, None, False, True, 0)
@example(5, 1, (24, 20), (1, 70), (1, 1), (1, 1), (0, 0), (1, 1), "float16", ("transposed",) * 2, 3, False, False, 0)
@example(3, 6, (1, 1), (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), "float32", ("channels last",) * 2, None, False, True, 0)
@example(
    1, 1, (1, 1), (1, 1), (1, 4), (1, 2), (1, 2), (1, 1), "float32", ("contiguous", "sliced"), None, False, False, 0
)
@example(0, 1, (3, 5), (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), "float32", ("contiguous",) * 2, None, False, True, 0)
def test_statistics(
    backend,
    count,
    groups,
    channels,
    size,
    kernel,
    stride,
    padding,
    dilation,
    dtype,
    layouts,
    terms,
    gram,
    squares,
    seed,
):
    out = output_sizes(size, (kernel, stride, padding, dilation))
    assume(min(out) > 0)
    assume(count > 0 or backend is not reference)  # torch's unfold refuses an empty batch
    assume(count > 0 or (dtype != "float64" and not gram) or not registry.INTERPRETED)  # left to the reference
    c, o = (groups * number for number in channels)
    input = images((count, c, *size), DTYPES[dtype], layouts[0], seed)
    grad_output = images((count, o, *out), DTYPES[dtype], layouts[1], seed + 1)
    sums = reference.mean_dtype(input.dtype)
    weight = (o, c // groups, *kernel)
    directions = None
    if terms is not None:
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(terms, *weight, generator=generator, dtype=torch.float64).to(sums)
    geometry = (kernel, stride, padding, dilation, groups)
    results = checked_statistics(backend, input, grad_output, geometry[:4], groups, directions, gram, squares)
    if count == 0:
        assert not results[0].any()
        assert not results[4].any()
    else:
        assert_as_good_as_plain(results, input, grad_output, geometry, directions)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_bitwise_the_same_from_run_to_run(dtype):
    input, grad_output = images((9, 5, 6, 6), dtype, "contiguous", 0), images((9, 20, 6, 6), dtype, "contiguous", 1)
    results = []
    for _ in range(2):
        poison()
        results.append(
            torch.ops.crl_kernels.sample_weight_gradients(
                input, grad_output, [3, 3], [1, 1], [1, 1], [1, 1], 1, None, False, True
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not registry.INTERPRETED, reason="runs in the process that test_triton.py starts")
@pytest.mark.parametrize("programs", [1, 17, 1000])
def test_any_number_of_programs_and_tiles(monkeypatch, programs):
    """Runs of all samples, of two and of one; several tiles in each direction."""
    monkeypatch.setattr(weight_gradients, "PROGRAMS", programs)
    monkeypatch.setattr(weight_gradients, "OUT_CHANNELS", 16)
    monkeypatch.setattr(weight_gradients, "COLUMNS", 64)
    geometry = ((2, 2), (1, 1), (1, 0), (1, 1), 1)
    input, grad_output = (
        images((3, 40, 3, 4), torch.float32, "contiguous", 0),
        images((3, 20, 4, 3), torch.float32, "contiguous", 1),
    )
    results = torch.ops.crl_kernels.sample_weight_gradients(
        input, grad_output, *map(list, geometry[:4]), 1, None, False, True
    )
    assert_as_good_as_plain(results, input, grad_output, geometry, None)


@needs_library
@pytest.mark.parametrize("dimension", range(4))
def test_offsets_beyond_32_bits(dimension):
    """One stride puts the last elements beyond 2^31. Memory that is never touched costs nothing."""
    strides = [[75, 25, 5, 1], [25, 75, 5, 1], [15, 5, 30, 1], [15, 5, 1, 30]][dimension]
    strides[dimension] = -(-(2**31 + 5) // 2)
    memory = torch.empty(2**31 + 400, dtype=torch.bfloat16)
    values = images((3, 3, 5 if dimension != 2 else 3, 5 if dimension != 3 else 3), torch.bfloat16, "contiguous", 0)
    far = memory.as_strided(values.shape, strides).copy_(values)
    other = images((3, 4, *values.shape[2:]), torch.bfloat16, "contiguous", 1)
    geometry = [[3, 3], [1, 1], [1, 1], [1, 1], 1]
    operator = torch.ops.crl_kernels.sample_weight_gradients
    for near, moved in (((values, other), (far, other)), ((other, values), (other, far))):
        results = [operator(*images, *geometry, None, False, False) for images in (near, moved)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_library
@pytest.mark.parametrize(("gram", "squares"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_fake_kernel_matches(dtype, gram, squares):
    def run() -> tuple[Tensor, ...]:
        input, grad_output = torch.ones(3, 4, 5, 5, dtype=dtype), torch.ones(3, 6, 3, 3, dtype=dtype)
        return torch.ops.crl_kernels.sample_weight_gradients(
            input, grad_output, [3, 3], [1, 1], [0, 0], [1, 1], 1, None, gram, squares
        )

    with FakeTensorMode():
        fakes = run()
    actual, expected = ([(t.shape, t.dtype, t.stride(), t.device) for t in results] for results in (fakes, run()))
    assert actual == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("tokens", [0, 3, 9])
def test_16_bit_layers_give_float32_statistics(dtype, gram, tokens):
    """Products of 16-bit numbers are exact in float32, so only orders of sums may differ. 0 tokens: a convolution."""
    shapes = [(3, tokens, 6), (3, tokens, 5)] if tokens else [(3, 6, 5, 4), (3, 5, 5, 4)]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    u = torch.randn(2, 5, 6, *([] if tokens else [3, 3]), generator=generator)

    def gradient(a: Tensor, b: Tensor) -> LinearGradient | ConvolutionGradient:
        return LinearGradient(a, b) if tokens else ConvolutionGradient(Convolution(a, b, (3, 3), padding=(1, 1)))

    assert gradient(a, b).matrix().dtype == torch.float32
    for directions in (None, u):
        result, expected = (
            gradient(*x).statistics(Wanted(directions, gram, not tokens)) for x in ((a, b), (a.float(), b.float()))
        )
        assert result.sum.dtype == torch.float32
        for name in ("sum", "sq_norms", "projections", "gram", "squares"):
            ours, theirs = getattr(result, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": torch.ones(3, 4, 5)}, "an input and a grad_output of shape"),
        ({"input": torch.ones(3, 4, 5, 5)}, "an input and a grad_output of shape"),
        ({"input": torch.ones(2, 4, 5, 5).bfloat16()}, "one dtype"),
        ({"groups": 3}, "no multiple of groups"),
        ({"kernel_size": [3]}, "as pairs"),
        ({"kernel_size": [4, 3]}, "this convolution gives"),
        ({"dilation": [1, 2]}, "this convolution gives"),
        ({"padding": [-1, 0]}, "padding from 0"),
        ({"directions": torch.ones(2, 6, 4, 3)}, "directions have"),
    ],
    ids=lambda value: None,
)
def test_operators_refuse_arguments_that_would_read_out_of_bounds(changed, message):
    arguments = ARGUMENTS | {"gram": False, "squares": False}  # Triton leaves Gram matrices to the reference
    torch.ops.crl_kernels.sample_weight_gradients(*arguments.values())
    with pytest.raises(RuntimeError, match=f"crl_kernels: .*{message}"):
        torch.ops.crl_kernels.sample_weight_gradients(*(arguments | changed).values())
