"""The Triton operators on Triton's interpreter, which needs no GPU, and the tables of addresses that they read.

TRITON_INTERPRET is read when Triton is imported, so the first test starts a process of its own for this file and for
those that test every backend.
"""

import importlib.util
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.backends import assert_pass_in_a_process

from crl_kernels.backends import registry

TESTS = Path(__file__).parents[1]
TESTED = (
    "backends/test_triton.py",
    "backends/test_operators.py",
    "backends/test_int8_blocks.py",
    "operators/test_derivatives.py",
    "backends/test_sample_matrix.py",
    "backends/test_weight_gradients.py",
)

needs_interpreter = pytest.mark.skipif(
    not registry.INTERPRETED, reason="runs in the process that test_operators_and_derivatives starts"
)

if registry.INTERPRETED:
    import triton.language as tl

    from crl_kernels.backends.triton import chunks, operands, operators, tables

    @chunks.kernel
    def addresses_kernel(
        begins: tl.tensor,
        firsts: tl.tensor,
        numel: tl.tensor,
        chunk: tl.tensor,
        entries: tl.tensor,
        stride: tl.tensor,
        result: tl.tensor,
        CODE: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """The addresses that a program would read, one for each lane and one for the chunk; 0 beyond the end."""
        in_one_segment, first, segment, start, inside = chunks.locate(begins, firsts, numel, chunk.to(tl.int64), BLOCK)
        lanes = chunks.elements(tl.load(entries + segment * stride), start, CODE, False, BLOCK).to(tl.int64)
        block = chunks.elements(tl.load(entries + first * stride), start, CODE, True, BLOCK).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        tl.store(result + lane, tl.where(inside, lanes, 0))
        tl.store(result + BLOCK + lane, tl.where(in_one_segment, block, 0))


@pytest.mark.skipif(registry.INTERPRETED, reason="this is the run that the test below starts")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("slow_float64", "names"), [("0", TESTED), ("1", TESTED[:3])], ids=["fast-float64", "slow-float64"]
)
def test_operators_and_derivatives(slow_float64, names):
    """These files without the tests that are slow here; the bitwise test of lists is below, on less data.

    Compilers see operators, not their kernels, so compiled code is tested where it is not interpreted.
    """
    files = [str(TESTS / name) for name in names]
    slow = "written_tensors_are_bitwise or drift_is_exact or any_number_of_threads or (gradcheck and rank1)"
    compiled = "inside_compiled_code or recompilation or inductor or compiled_training_step"
    selected = f"not (reference or {slow} or {compiled})"
    variables = {"CRL_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1", "CRL_TEST_SLOW_FLOAT64": slow_float64}
    assert_pass_in_a_process(selected, *files, **variables)


@needs_interpreter
def test_bitwise_the_same_flat_or_in_a_list(monkeypatch):
    """Sums and written tensors, for chunks of 128; pieces begin at any address."""
    monkeypatch.setattr(chunks, "BLOCK", 128)
    generator = torch.Generator().manual_seed(0)
    lengths = [300, 1, 0, 33, 128, 1000, 17, 257]
    flat, u, s = torch.randn(3, sum(lengths), generator=generator)
    one = torch.tensor(1.3, dtype=torch.float64)
    ones = one.expand(2)

    def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [piece.clone() for piece in tensor.split(lengths)]

    def flat_only(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    results = []
    for cut, cut_state in ((flat_only, flat_only), (pieces, flat_only), (pieces, pieces)):
        theta, directions, state = cut(flat), [*cut_state(u), *cut_state(s)], (cut_state(s.abs()), cut_state(u))
        targets = [tensor.clone() for tensor in theta]
        parts = [
            operators.low_rank_projections(theta, directions, 2),
            operators.diagonal_quadratic(theta, *state)[None],
            operators.low_rank_penalty_accumulate_(targets, theta, directions, ones, ones, one)[None],
            operators.diagonal_accumulate_(targets, theta, *state, one)[None],
        ]
        operators.diagonal_shrink_(targets, *state, one)
        moments = [[tensor.abs() for tensor in theta] for _ in range(2)]
        adamw = (targets, theta, *moments, one.expand(len(theta), 8) / 2, None)
        parts += [
            operators.low_rank_adamw_(*adamw, directions, ones, False),
            operators.diagonal_adamw_(*adamw, *state, True)[None],
            *moments[0],
            *moments[1],
        ]
        results.append(torch.cat([*parts, *targets]))
    for result in results[1:]:
        assert torch.equal(result, results[0])


def expected_addresses(lengths, pointers, size, chunk, block):
    """In Python's integers: the address of each element of a chunk."""
    begins = [0, *accumulate(lengths)]
    for index in range(chunk * block, (chunk + 1) * block):
        segment = next((i for i, n in enumerate(lengths) if begins[i] <= index < begins[i] + n), None)
        yield 0 if segment is None else pointers[segment] + size * (index - begins[segment])


@needs_interpreter
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)])
@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        ([2**31 - 3, 0, 2, 1, 5 * 2**33 + 7, 0, 40, 0], [0, 2**16 - 1, 2**16, 2**18, -2, -1]),
        ([2**40 + 1], [0, 2**16, 2**25 - 1, -1]),
        ([0, 0, 5, 2**15, 2**15 - 5, 9], [0, 1, 2]),
    ],
)
def test_tables_of_lengths_beyond_32_bits(lengths, chunks, dtype, size):
    """Nothing is read: the addresses that programs would read, for made-up tensors at made-up addresses."""
    block = 2**15
    pointers = [2**47 - 2**44 - 16 * i for i in range(len(lengths))]
    place = tables.Place(torch.device("cpu"), 0, False)
    view = tables.write_view(tuple(lengths), 1, tuple(lengths), (dtype,) * len(lengths), tuple(pointers), place)
    begins, firsts = tables.write_segments(tuple(lengths), block, place)
    assert len(firsts) == -(-sum(lengths) // block) + 1
    code = tables.DTYPES[dtype][0]
    for chunk in (c % (len(firsts) - 1) for c in chunks):
        result = torch.empty(2, block, dtype=torch.int64)
        addresses_kernel[(1,)](
            begins, firsts, sum(lengths), chunk, view.entries, view.stride, result, CODE=code, BLOCK=block
        )
        expected = list(expected_addresses(lengths, pointers, size, chunk, block))
        assert result[0].tolist() == expected
        if result[1].any():  # read as a block
            assert result[1].tolist() == expected
    assert view.dtypes == 1 << code


@needs_interpreter
def test_an_unchanged_list_costs_no_copy_and_tables_are_bounded():
    params = [torch.randn(5), torch.randn(3)]
    first, again = operands.Flat(params), operands.Flat(params)
    assert first._firsts is again._firsts
    assert first.view(params).entries is again.view(params).entries
    for other in ([params[0], torch.randn(3)], [params[0].to(torch.bfloat16), params[1]]):
        assert first.view(other).entries is not first.view(params).entries
    for length in range(2 * tables.TABLES):
        operands.Flat([torch.empty(length)]).view([torch.empty(length)])
    assert tables.cached_view.cache_info().currsize <= tables.TABLES
    assert tables.cached_segments.cache_info().currsize <= tables.TABLES


@needs_interpreter
def test_tables_that_are_written_by_kernels_hold_the_same_words():
    """A CUDA-graph capture writes tables so, in place of a copy."""
    words = [2**62 + 1, -(2**60) - 7, 0, 3] * 50
    captured, copied = (tables.Place(torch.device("cpu"), 0, capturing).upload(words) for capturing in (True, False))
    assert captured.tolist() == words
    assert torch.equal(captured, copied)


@pytest.mark.skipif(registry.INTERPRETED, reason="the interpreter's GPU is chosen for all of its tests")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("gpu", "slow"),
    [
        *[((8, 0), False), ((8, 6), True), ((9, 0), False), ((10, 0), False), ((10, 3), True), ((12, 0), True)],
        *[("gfx900", True), ("gfx906", False), ("gfx90a:sramecc+:xnack-", False), ("gfx90c", True)],
        *[("gfx942:sramecc+:xnack-", False), ("gfx950", False), ("gfx1100", True)],
    ],
    ids=str,
)
def test_which_gpus_have_slow_float64(gpu, slow, monkeypatch):
    from crl_kernels.backends.triton import float64_arithmetic

    monkeypatch.setattr(torch.version, "hip", "7.0" if isinstance(gpu, str) else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=gpu))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: gpu)
    assert float64_arithmetic.slow_float64.__wrapped__(torch.device("cuda", 0)) is slow
