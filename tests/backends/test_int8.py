"""int8 with blockwise scales: blocks within rows, exact values, and the same bits when they are stored again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crl_kernels.backends.int8 import Int8Vector, dequantised, quantised, scales_shape, stored_values

SHAPES = [(), (1,), (7,), (0,), (3, 0), (0, 5), (4, 3), (5, 128), (2, 129), (3, 131), (2, 3, 1000), (8, 64, 3, 3)]


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ((), 1),
        ((9,), 1),
        ((4, 3), 3),
        ((5, 128), 128),
        ((2, 129), 43),
        ((3, 131), 1),
        ((8, 64, 3, 3), 96),
        ((2, 768), 128),
    ],
)
def test_a_block_is_the_longest_part_of_a_row_that_divides_it(shape, length):
    rows, blocks = scales_shape(torch.Size(shape))
    assert rows == (shape[0] if shape else 1)
    assert rows * blocks * length == math.prod(shape)


def random(shape, seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Elements whose sizes differ by factors up to a million, a few of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-6, 1, shape, generator=generator) * scale
    return torch.where(torch.rand(shape, generator=generator) < 0.1, 0.0, values).to(dtype)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.sampled_from(SHAPES),
    scale=st.sampled_from([1e-45, 1e-38, 1e-36, 1e-20, 1e-3, 1.0, 3e38]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**30),
)
def test_values_are_near_exact_and_stored_again_without_a_change(shape, scale, dtype, seed):
    u = random(shape, seed, scale, dtype).clamp(-3e38, 3e38)
    q, scales = quantised(u)
    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (torch.int8, u.shape, torch.float32, scales_shape(u.shape))
    values = dequantised(q, scales)
    blocks = values.reshape(*scales.shape, -1) if u.numel() else values.reshape(*scales.shape, 0)
    exact = q.reshape(blocks.shape).double() * scales.double()[..., None]
    assert torch.equal(blocks.double(), exact)
    # Half a step of the block; a block below 127 times the smallest normal number is 0.
    bound = torch.where(scales == 0, 127 * torch.finfo(torch.float32).tiny, 0.5 * scales.double() * (1 + 2**-20))
    assert bool(((u.double().reshape(blocks.shape) - exact).abs() <= bound[..., None]).all())
    assert bool(
        (q.reshape(blocks.shape).abs().amax(-1) == torch.where(scales == 0, 0, 127)).all() if u.numel() else True
    )
    again, same_scales = quantised(values)
    assert torch.equal(again, q)
    assert torch.equal(same_scales, scales)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_what_int8_cannot_hold_is_seen_in_the_scales(bad):
    u = torch.ones(3, 8, dtype=torch.float64)
    u[1, 2] = bad
    _, scales = quantised(u)
    assert torch.isfinite(127 * scales).flatten().tolist() == [True, False, True]


def test_vectors_along_parameters():
    shapes = [torch.Size(shape) for shape in SHAPES]
    rows = torch.stack(
        [
            torch.cat([random(s, 10 * k + i, 1.0, torch.float32).flatten() for i, s in enumerate(shapes)])
            for k in range(3)
        ]
    )
    stored = Int8Vector.of(rows, shapes)
    assert stored.q.shape == rows.shape
    values = stored.floats(shapes)
    assert torch.equal(values, stored_values(rows, shapes, torch.int8))
    for k, row in enumerate(rows):
        alone = Int8Vector.of(row, shapes)
        assert torch.equal(alone.q, stored.q[k])
        parts = row.split([shape.numel() for shape in shapes])
        expected = [
            dequantised(*quantised(part.view(shape))).flatten() for part, shape in zip(parts, shapes, strict=True)
        ]
        assert torch.equal(values[k], torch.cat(expected))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(stored_values(rows, shapes, dtype), rows.to(dtype))


def test_rows_are_stored_by_themselves():
    """So a shard's rows, and the rows of a parameter before it has grown, have the same bits as in the whole."""
    u = random((6, 40), 0, 1.0, torch.float32)
    q, scales = quantised(u)
    for rows in (slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 6)):
        part, part_scales = quantised(u[rows])
        assert torch.equal(part, q[rows])
        assert torch.equal(part_scales, scales[rows])
