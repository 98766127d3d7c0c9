"""The segment table and the flat view: pieces, owners and addresses, for lengths that exist and for made-up ones."""

from itertools import pairwise

import numpy as np
import pytest
from helpers.loops import DTYPES
from hypothesis import given
from hypothesis import strategies as st

CHUNK = 4096

near_chunks = st.builds(lambda chunks, step: max(0, chunks * CHUNK + step), st.integers(0, 3), st.integers(-1, 1))
real = st.lists(st.one_of(st.just(0), st.integers(0, 5), near_chunks), max_size=40)
far = st.builds(lambda base, step: base + step, st.sampled_from([2**31, 2**32, 2**40, 2**44]), st.integers(-3, 3))
made_up = st.lists(st.one_of(st.just(0), st.integers(0, 5), near_chunks, far), max_size=12).map(lambda x: [*x, 2**40])


def begins_of(lengths: list[int]) -> list[int]:
    begins = [0]
    for length in lengths:
        begins.append(begins[-1] + length)
    return begins


def pieces_of(begins: list[int], chunk: int) -> list[tuple[int, int, int]]:
    """The definition: what each segment shares with the chunk, where that is not empty."""
    shares = [
        (segment, max(begin, chunk * CHUNK), min(end, (chunk + 1) * CHUNK))
        for segment, (begin, end) in enumerate(pairwise(begins))
    ]
    return [share for share in shares if share[1] < share[2]]


def owner_of(begins: list[int], index: int) -> int:
    [owner] = [s for s, (begin, end) in enumerate(pairwise(begins)) if begin <= index < end]
    return owner


def neighbourhood(begins: list[int]) -> list[int]:
    """The flat indices that lie within two elements of a segment's or a chunk's edge, where segments meet."""
    edges = {edge for begin in begins for edge in (begin, begin // CHUNK * CHUNK, (begin // CHUNK + 1) * CHUNK)}
    return sorted({index for edge in edges for index in range(edge - 2, edge + 3) if 0 <= index < begins[-1]})


def check_sizes(table, begins: list[int]) -> None:
    assert table.segments() == len(begins) - 1
    assert table.numel() == begins[-1]
    assert table.chunks() == -(-begins[-1] // CHUNK)
    assert [table.begin(segment) for segment in range(table.segments())] == begins[:-1]
    assert [table.end(segment) for segment in range(table.segments())] == begins[1:]


def check_addresses(core, lengths: list[int], dtypes: list[str], origins: list[int]) -> None:
    """Element i of a list is element i - begin of its tensor; of a flat tensor, it is element i."""
    begins = begins_of(lengths)
    table = core.SegmentTable(lengths)
    tensors = [(origin, np.dtype(DTYPES[dtype])) for origin, dtype in zip(origins, dtypes, strict=True)]
    by_segment = core.FlatView(table, tensors)
    flat_origin, flat_dtype = tensors[0]
    flat = core.FlatView(table, [(flat_origin, flat_dtype)])
    for index in neighbourhood(begins):
        segment = owner_of(begins, index)
        origin, dtype = tensors[segment]
        assert by_segment.address(segment, index) == origin + (index - begins[segment]) * dtype.itemsize
        assert flat.address(segment, index) == flat_origin + index * flat_dtype.itemsize


def test_chunk_size_is_the_one_these_tests_are_written_for(core):
    assert core.CHUNK == CHUNK


@given(lengths=real)
def test_pieces_tile_the_vector_in_order(core, lengths):
    begins = begins_of(lengths)
    table = core.SegmentTable(lengths)
    check_sizes(table, begins)
    covered = 0
    for chunk in range(table.chunks()):
        pieces = table.pieces(chunk)
        assert pieces == pieces_of(begins, chunk)
        for _, begin, end in pieces:
            assert begin == covered
            covered = end
        assert covered == min((chunk + 1) * CHUNK, begins[-1])
    assert covered == begins[-1]
    assert table.pieces(table.chunks()) == []


@given(lengths=real)
def test_find_skips_empty_segments(core, lengths):
    begins = begins_of(lengths)
    table = core.SegmentTable(lengths)
    for index in neighbourhood(begins):
        assert table.find(index) == owner_of(begins, index)


def test_many_empty_segments(core):
    lengths = [0] * 3000 + [CHUNK] + [0] * 3000 + [1] + [0] * 3000
    table = core.SegmentTable(lengths)
    assert table.pieces(0) == [(3000, 0, CHUNK)]
    assert table.pieces(1) == [(6001, CHUNK, CHUNK + 1)]
    assert table.find(CHUNK) == 6001


@given(lengths=made_up)
def test_made_up_lengths_beyond_32_bits(core, lengths):
    begins = begins_of(lengths)
    table = core.SegmentTable(lengths)
    check_sizes(table, begins)
    for index in neighbourhood(begins):
        assert table.find(index) == owner_of(begins, index)
        assert table.pieces(index // CHUNK) == pieces_of(begins, index // CHUNK)
    assert table.pieces(table.chunks()) == []


@given(data=st.data(), lengths=st.one_of(real, made_up).filter(lambda lengths: len(lengths) > 1))
def test_addresses(core, data, lengths):
    count = len(lengths)
    dtypes = data.draw(st.lists(st.sampled_from(sorted(DTYPES)), min_size=count, max_size=count))
    # Tensors lie anywhere, below those before them too: where element 0 would be may be below address 0.
    origins = data.draw(st.lists(st.integers(0, 2**44).map(lambda x: 8 * x), min_size=count, max_size=count))
    check_addresses(core, lengths, dtypes, origins)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_vector(core, dtype):
    """Byte offsets are signed 64-bit numbers, so a vector may have 2^63 / itemsize - 1 elements: every address of a
    64-bit machine and more."""
    numel = 2**63 // np.dtype(DTYPES[dtype]).itemsize - 1
    lengths = [1, 2**33 + 5, 0, numel - 2**33 - 7, 1]
    begins = begins_of(lengths)
    assert begins[-1] == numel
    table = core.SegmentTable(lengths)
    check_sizes(table, begins)
    assert table.find(numel - 1) == 4
    assert table.pieces(table.chunks() - 1) == pieces_of(begins, table.chunks() - 1)
    check_addresses(core, lengths, [dtype] * 5, [4096, 8192, 16, 2**46, 2**47 - 8])
