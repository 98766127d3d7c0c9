"""Directions in int8 give, bit for bit, what float32 directions of the same values give: wherever blocks and tensors
begin and end, on every backend that runs here."""

import itertools

import pytest
import torch
from helpers.backends import CHUNK, needs_library, poison
from torch import Tensor

from crl_kernels.backends import registry

pytestmark = needs_library
ops = torch.ops.crl_kernels

# Lists of (elements, elements of a block).
BLOCKS = {
    "one element": [(1, 1)],
    "nothing": [(0, 1), (0, 1)],
    "whole octets": [(CHUNK, 128), (8, 8), (2 * CHUNK, 64), (96 * 5, 96)],
    "vectors beside matrices": [(27 * 64, 27), (64, 1), (128 * 40, 128), (40, 1), (0, 1), (2048, 16)],
    "odd lengths before whole octets": [(3, 3), (CHUNK, 128), (127 * 5, 127), (128 * 9, 128), (5, 1), (88 * 8, 88)],
    "blocks that end within octets": [(27 * 200, 27), (100 * 30, 100), (12 * 50, 12), (3 * 900, 3), (7 * 128, 7)],
    "tensors that end at chunks": [(2047, 89), (1, 1), (CHUNK + 1, 17), (CHUNK - 1, 117), (2048, 32), (2 * CHUNK, 128)],
    "one block": [(127, 127), (128, 128), (CHUNK + 8, CHUNK + 8), (125, 125)],
}
# How pieces are stored: term by term, and within a term segment by segment, over and over.
MIXES = {
    "int8": ["int8"],
    "float32 in between": ["int8", "float32", "int8", "int8"],
    "many dtypes": ["int8", "bfloat16", "int8", "float16", "int8", "float64", "float32"],
    "no int8": ["float32", "bfloat16"],
}
# An interpreted chunk takes a second: the simplest lists and the most mixed.
CASES = [("int8", False), ("many dtypes", True)] if registry.INTERPRETED else [*itertools.product(MIXES, (False, True))]


def scales_of(count: int, generator: torch.Generator) -> Tensor:
    """Of 16 significant bits; every seventh is zero."""
    scales = torch.rand(count, generator=generator) * 10.0 ** torch.randint(-6, 3, (count,), generator=generator)
    scales = (scales.view(torch.int32) & ~255).view(torch.float32)
    scales[3::7] = 0
    return scales


def unaligned(tensor: Tensor, by: int) -> Tensor:
    """The same elements, at an address that begins ``by`` elements after a boundary."""
    return torch.cat([tensor.new_zeros(by), tensor.flatten()])[by:].view(tensor.shape)


def terms_of(
    blocks: list[tuple[int, int]], num_terms: int, mix: list[str], generator: torch.Generator, by: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """(directions of which some are int8, the same values without int8)"""
    directions, plain = [], []
    for k in range(num_terms):
        pieces, scales = [], []
        for i, (n, length) in enumerate(blocks):
            kind = mix[(k * (len(blocks) + 1) + i) % len(mix)]
            scales.append(torch.empty(0))
            if kind != "int8":
                pieces.append(torch.randn(n, generator=generator).to(getattr(torch, kind)))
                plain.append(pieces[-1])
                continue
            q = torch.randint(-127, 128, (n,), generator=generator, dtype=torch.int8)
            pieces.append(unaligned(q, by))
            if n > 0:
                scales[-1] = unaligned(scales_of(n // length, generator), by)
            plain.append(q * scales[-1].repeat_interleave(length))
        directions += [*pieces, *scales]
    return directions, plain


def results(params: list[Tensor], directions: list[Tensor], num_terms: int, mixed: bool) -> list[Tensor]:
    """What every low-rank operator returns and writes."""
    generator = torch.Generator().manual_seed(1)
    c, b = torch.randn(2, num_terms, generator=generator, dtype=torch.float64)

    def like(values: Tensor, p: Tensor) -> Tensor:  # in the parameter's memory order
        return torch.empty_like(p, dtype=values.dtype).copy_(values)

    targets = [[like(torch.randn(p.shape, generator=generator).to(p.dtype), p) for p in params] for _ in range(2)]
    poison()
    parts = [ops.low_rank_projections(params, directions, num_terms)]
    parts += ops.low_rank_combine(directions, c, params)
    ops.low_rank_accumulate_(targets[0], directions, c)
    parts.append(ops.low_rank_penalty_accumulate_(targets[1], params, directions, c.abs(), b, c[0])[None])
    for decoupled in (False, True):
        wide = [torch.float64 if mixed and i % 3 == 2 else torch.float32 for i in range(len(params))]
        theta, m, v = (
            [like(torch.rand(p.shape, generator=generator, dtype=d), p) for p, d in zip(params, wide, strict=True)]
            for _ in range(3)
        )
        grads = [like(torch.randn(p.shape, generator=generator, dtype=d), p) for p, d in zip(params, wide, strict=True)]
        rows = torch.rand(len(params), 8, generator=generator, dtype=torch.float64)
        parts += [ops.low_rank_adamw_(theta, grads, m, v, rows, None, directions, c, decoupled), *theta, *m, *v]
    return [*parts, *targets[0], *targets[1]]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        # Signs of zeros count, and NaN is NaN.
        assert torch.equal(a.nan_to_num(1e30).view(torch.uint8), e.nan_to_num(1e30).view(torch.uint8))


@pytest.mark.parametrize(("mix", "mixed"), CASES)
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_the_same_bits_as_float32(blocks, mix, mixed):
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16] if mixed else [torch.float32]
    params = [
        torch.randn(n, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        for i, (n, _) in enumerate(blocks)
    ]
    for num_terms in (2,) if registry.INTERPRETED else (1, 5):
        directions, plain = terms_of(blocks, num_terms, MIXES[mix], generator)
        expected = results(params, plain, num_terms, mixed)
        for _ in range(1 if registry.INTERPRETED else 2):  # again: threads take turns in another order
            assert_same_bits(results(params, directions, num_terms, mixed), expected)


@pytest.mark.parametrize("by", [1, 4, 8])
def test_the_same_bits_at_any_address(by):
    generator = torch.Generator().manual_seed(by)
    blocks = [*BLOCKS["whole octets"][:2], *BLOCKS["vectors beside matrices"][:3]]
    params = [unaligned(torch.randn(n, generator=generator), by % 2) for n, _ in blocks]
    directions, plain = terms_of(blocks, 2, MIXES["int8"], generator, by)
    assert_same_bits(results(params, directions, 2, False), results(params, plain, 2, False))


def test_the_same_bits_where_terms_have_other_blocks():
    """No history makes such terms, and operators take them."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator) for n in (CHUNK, 24)]
    several = [
        terms_of([(CHUNK, one), (24, other)], 1, MIXES["int8"], generator) for one, other in ((128, 8), (64, 8), (1, 3))
    ]
    directions, plain = ([tensor for pair in several for tensor in pair[i]] for i in range(2))
    assert_same_bits(results(params, directions, 3, False), results(params, plain, 3, False))


@pytest.mark.parametrize("num_terms", [33] if registry.INTERPRETED else [31, 33, 70])
def test_the_same_bits_for_more_terms_than_a_warp_has_lanes(num_terms):
    generator = torch.Generator().manual_seed(0)
    blocks = [(128 * 30, 128), (27 * 8, 27), (40, 1)]
    params = [torch.randn(n, generator=generator) for n, _ in blocks]
    directions, plain = terms_of(blocks, num_terms, MIXES["int8"], generator)
    assert_same_bits(results(params, directions, num_terms, False), results(params, plain, num_terms, False))


def test_scales_that_are_not_finite_stay_in_their_blocks():
    generator = torch.Generator().manual_seed(0)
    blocks = [(128 * 4, 128), (27 * 4, 27)]
    for bad in (float("nan"), float("inf")):
        directions, _ = terms_of(blocks, 1, MIXES["int8"], generator)
        for scales in directions[2:]:
            scales[1] = bad
        plain = [
            q * s.repeat_interleave(length)
            for q, s, (_, length) in zip(directions[:2], directions[2:], blocks, strict=True)
        ]
        like = [torch.empty(n) for n, _ in blocks]
        one = torch.ones(1, dtype=torch.float64)
        combined, expected = (ops.low_rank_combine(u, one, like) for u in (directions, plain))
        torch.testing.assert_close(combined, expected, rtol=0, atol=0, equal_nan=True)
        assert all(0 < int((~t.isfinite()).sum()) <= length for t, (_, length) in zip(combined, blocks, strict=True))


def test_a_scalar_and_other_memory_orders():
    """A parameter with an int8 direction is read in row-major order, whatever its memory's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (6, 8, 3, 3), (16, 24), (5, 4, 2, 2)]
    blocks = [(1, 1), (6 * 72, 72), (16 * 24, 24), (80, 16)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[1] = params[1].to(memory_format=torch.channels_last)
    params[2] = params[2].t().contiguous().t()
    flat, plain = terms_of(blocks, 2, MIXES["float32 in between"], generator)
    directions = [t.view(shapes[i % 8]) if i % 8 < 4 else t for i, t in enumerate(flat)]
    plain = [t.view(shapes[i % 4]) for i, t in enumerate(plain)]
    row_major = [p.contiguous() for p in params]
    for actual, expected in zip(
        results(params, directions, 2, False), results(row_major, plain, 2, False), strict=True
    ):
        assert torch.equal(actual, expected)
