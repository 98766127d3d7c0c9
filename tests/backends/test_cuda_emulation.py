"""The CUDA operators on a machine without a GPU: compiled for the host, threads as fibers, under the same tests, and
under tests of their own: tables on the device, vector accesses, two ways to compute a value and its gradient."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.backends import assert_pass_in_a_process
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from crl_kernels.backends import reference

TESTS = Path(__file__).parents[1]
COMPILER = shutil.which("g++")
LIBRARY = os.environ.get("CRL_TEST_LIBRARY")
OPERATORS = ("backends/test_operators.py", "backends/test_int8_blocks.py", "backends/test_launches.py")

needs_emulation = pytest.mark.skipif(LIBRARY is None, reason="CRL_TEST_LIBRARY is not set: runs within the first test")
ops = torch.ops.crl_kernels


def emulated(folder: Path, slow_float64: bool) -> Path:
    """The library, with the arithmetic of cards whose float64 is fast or slow."""
    target = folder / "emulated_cuda.so"
    includes = [f"-I{path}" for path in (TESTS / "backends/cuda_emulation", TESTS.parent / "csrc", *include_paths())]
    libraries = [f"-L{path}" for path in library_paths()]
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options.append(f"-DCRL_SLOW_FLOAT64={slow_float64:d}")
    source = str(TESTS / "backends/cuda_emulation/operators.cpp")
    command = [COMPILER, *options, *includes, source, *libraries, "-lc10", "-ltorch", "-ltorch_cpu", "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.skipif(LIBRARY is not None, reason="this is the run that the test starts")
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
@pytest.mark.parametrize(
    ("slow_float64", "names"),
    [
        (False, (*OPERATORS, "operators/test_derivatives.py", "backends/test_cuda_emulation.py")),
        (True, OPERATORS),
    ],
    ids=["fast-float64", "slow-float64"],
)
def test_operators_and_derivatives(slow_float64, names, tmp_path):
    library = emulated(tmp_path, slow_float64)
    files = [str(TESTS / name) for name in names]
    # Compilers see operators, not their kernels; plain PyTorch is tested where it is not a subprocess.
    left_out = "inside_compiled_code or recompilation or inductor or compiled_training_step or reference"
    if slow_float64:  # the arithmetic is another, and how tensors are walked is the same
        left_out += " or bitwise or tiny_and_empty"
    chosen = f"not ({left_out})"
    assert_pass_in_a_process(chosen, *files, CRL_KERNELS_BACKEND="reference", CRL_TEST_LIBRARY=str(library))


DEFAULTS = {"stream": 0, "capturing": 0, "cooperative_launch": 1, "cooperative_blocks": 1 << 20, "l2_bytes": 1 << 16}


class Device:
    """The emulated device: properties to set, events to count."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(LIBRARY)

    def _variable(self, name: str) -> ctypes.c_int64:
        return ctypes.c_int64.in_dll(self.library, f"emulated_{name}")

    def set(self, **properties: int) -> None:
        for name, value in properties.items():
            self._variable(name).value = value

    def count(self, call: Callable[[], object], *events: str) -> tuple[int, ...]:
        before = [self._variable(name).value for name in events]
        call()
        return tuple(self._variable(name).value - value for name, value in zip(events, before, strict=True))

    def launches(self, call: Callable[[], object]) -> int:
        return self.count(call, "launches")[0]


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.set(**DEFAULTS)


def parameters(lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator).to(dtype) for n in lengths]


# A pass and its finish are two launches. Writing a table is one more for each 500 words, and one for the index.
PASS = 2
TABLE = 2


@needs_emulation
def test_a_table_is_written_once_for_as_long_as_addresses_stay(device):
    theta, u = parameters([300, 5, 4000]), parameters([300, 5, 4000], seed=1)

    def project() -> None:
        expected = sum(t.double() @ d.double() for t, d in zip(theta, u, strict=True))
        torch.testing.assert_close(ops.low_rank_projections(theta, u, 1)[0], expected, rtol=1e-13, atol=0)

    assert device.launches(project) == PASS + TABLE
    assert device.launches(project) == PASS
    theta[1].mul_(2)  # new values at the same address
    assert device.launches(project) == PASS
    kept = theta[2]
    theta[2] = kept * 3  # the same tensor, elsewhere
    assert device.launches(project) == PASS + TABLE
    theta[2] = kept
    assert device.launches(project) == PASS
    theta[1] = theta[1].view(torch.bfloat16)[:5]  # the same address, another dtype
    assert device.launches(project) == PASS + TABLE
    many = parameters([3] * 700)
    assert device.launches(lambda: ops.low_rank_projections(many, many, 1)) == PASS + 6  # 2,101 words


@needs_emulation
def test_streams_do_not_share_tables(device):
    theta, u = parameters([100]), parameters([100], seed=1)
    for stream in (0, 1):
        device.set(stream=stream)
        assert device.launches(lambda: ops.low_rank_projections(theta, u, 1)) == PASS + TABLE
    for stream in (0, 1):
        device.set(stream=stream)
        assert device.launches(lambda: ops.low_rank_projections(theta, u, 1)) == PASS


@needs_emulation
def test_the_table_not_used_for_longest_is_dropped(device):
    device.set(stream=2)
    u = parameters([100])
    lists = [parameters([100]) for _ in range(65)]

    def launches(i: int) -> int:
        return device.launches(lambda: ops.low_rank_projections(lists[i], u, 1))

    assert [launches(i) for i in range(64)] == [PASS + TABLE] * 64
    assert launches(0) == PASS
    assert launches(64) == PASS + TABLE  # and 1 is dropped
    assert launches(0) == PASS
    assert launches(1) == PASS + TABLE


@needs_emulation
def test_a_captured_call_writes_its_own_table(device):
    """It has to be in the graph, and memory of the graph's pool belongs to the graph alone."""
    theta, u = parameters([100]), parameters([100], seed=1)
    device.set(stream=3)
    assert device.launches(lambda: ops.low_rank_projections(theta, u, 1)) == PASS + TABLE
    device.set(capturing=1)
    for _ in range(2):
        assert device.launches(lambda: ops.low_rank_projections(theta, u, 1)) == PASS + TABLE
    device.set(capturing=0)
    assert device.launches(lambda: ops.low_rank_projections(theta, u, 1)) == PASS
    device.set(capturing=1)
    moved = [theta[0].clone()]
    ops.low_rank_projections(moved, u, 1)
    device.set(capturing=0)
    assert device.launches(lambda: ops.low_rank_projections(moved, u, 1)) == PASS + TABLE


@needs_emulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sixteen_bytes_at_a_time_where_addresses_allow(device, dtype):
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lengths = [4096, 8, 2056, 1 << 14]
    units = sum(lengths) // 16 * dtype.itemsize
    state_units = sum(lengths) // 16 * state_dtype.itemsize
    theta, targets, u = (parameters(lengths, dtype, seed) for seed in range(3))
    state = [t.abs().to(state_dtype) for t in u]
    c = torch.ones((), dtype=torch.float64)
    events = ("units", "elements")
    assert device.count(lambda: ops.low_rank_projections(theta, u, 1), *events) == (2 * units, 0)
    assert device.count(lambda: ops.low_rank_accumulate_(targets, u, c), *events) == (3 * units, 0)
    assert device.count(lambda: ops.low_rank_combine(u, c, theta), *events) == (2 * units, 0)
    diagonal = (theta, state, state)
    assert device.count(lambda: ops.diagonal_quadratic(*diagonal), *events) == (units + 2 * state_units, 0)
    expected = (3 * units + 2 * state_units, 0)
    assert device.count(lambda: ops.diagonal_accumulate_(targets, *diagonal, c), *events) == expected
    expected = (2 * units + 2 * state_units, 0)
    assert device.count(lambda: ops.diagonal_gradient(*diagonal, c), *events) == expected
    assert device.count(lambda: ops.diagonal_shrink_(*diagonal, c), *events) == expected
    wide = [[t.abs().to(state_dtype) for t in theta] for _ in range(3)]
    adamw = (wide[0], targets, *wide[1:], torch.rand(len(theta), 8, dtype=torch.float64), None)
    read_and_written = 6 * state_units + units  # and a direction is read twice
    assert device.count(lambda: ops.low_rank_adamw_(*adamw, [], c[None][:0], False), *events) == (read_and_written, 0)
    expected = (read_and_written + 4 * units, 0)
    assert device.count(lambda: ops.low_rank_adamw_(*adamw, u + u, c.expand(2), True), *events) == expected
    expected = (read_and_written + 2 * state_units, 0)
    assert device.count(lambda: ops.diagonal_adamw_(*adamw, state, state, False), *events) == expected

    shifted = [torch.cat([t[:1], t])[1:] for t in theta]  # at addresses that are not divisible by 16
    read = device.count(lambda: ops.low_rank_projections(shifted, u, 1), *events)
    assert read == (units, sum(lengths))
    odd = [theta[0][:4095], *theta[1:]]  # now flat indices do not fit addresses, but for the first tensor
    odd_u = [u[0][:4095], *u[1:]]
    read = device.count(lambda: ops.low_rank_projections(odd, odd_u, 1), *events)
    assert read == (2 * 4088 * dtype.itemsize // 16, 2 * (sum(lengths) - 4096 + 7))


def int8_term(lengths: list[int], blocks: list[int], shift: int = 0) -> list[Tensor]:
    """At addresses that are ``shift`` more than a multiple of 16."""
    q = [torch.randint(-127, 128, (shift + n,), dtype=torch.int8)[shift:] for n in lengths]
    return [*q, *(torch.rand(n // length) for n, length in zip(lengths, blocks, strict=True))]


@needs_emulation
def test_int8_eight_bytes_at_a_time_where_blocks_and_addresses_allow(device):
    """And one scale; elsewhere each element and its scale."""
    events = ("octets", "elements")
    lengths, blocks = [4096, 2056, 320, 32], [128, 8, 64, 4]
    theta, targets, u = parameters(lengths), parameters(lengths), int8_term(lengths, blocks)
    whole, rest = sum(lengths[:3]) // 8, 2 * lengths[3]
    c = torch.ones((), dtype=torch.float64)
    expected = (whole, whole + rest)
    assert device.count(lambda: ops.low_rank_projections(theta, u, 1), *events) == expected
    assert device.count(lambda: ops.low_rank_accumulate_(targets, u, c), *events) == expected
    assert device.count(lambda: ops.low_rank_combine(u, c, theta), *events) == expected
    state = [[t.abs() for t in theta] for _ in range(4)]
    rows = torch.rand(len(theta), 8, dtype=torch.float64)
    four = tuple(4 * count for count in expected)  # two terms, twice
    assert device.count(lambda: ops.low_rank_adamw_(*state, rows, None, u + u, c.expand(2), False), *events) == four

    def octets(lengths: list[int], blocks: list[int], shift: int = 0) -> int:
        theta, u = parameters(lengths), int8_term(lengths, blocks, shift)
        return device.count(lambda: ops.low_rank_projections(theta, u, 1), "octets")[0]

    assert octets([4096, 64], [4096, 8]) == 520
    assert octets([4096, 64], [4096, 8], shift=8) == 520
    assert octets([4096, 64], [4096, 8], shift=4) == 0
    assert octets([4092, 64], [12, 8]) == 0  # the second begins within an octet
    assert octets([4091, 5, 64], [1, 5, 8]) == 8


@needs_emulation
def test_a_table_holds_the_addresses_of_scales(device):
    theta = parameters([256, 24])
    q = [torch.randint(-127, 128, (n,), dtype=torch.int8) for n in (256, 24)]
    scales = [torch.tensor([0.5, 3.0]), torch.tensor([1.0, 2.0, 7.0])]

    def project() -> None:
        values = [a * s.repeat_interleave(len(a) // len(s)) for a, s in zip(q, scales, strict=True)]
        expected = sum(t.double() @ u.double() for t, u in zip(theta, values, strict=True))
        torch.testing.assert_close(ops.low_rank_projections(theta, [*q, *scales], 1)[0], expected, rtol=1e-13, atol=0)

    device.set(stream=4)
    assert device.launches(project) == PASS + TABLE
    scales[0].mul_(2)  # new values at the same address
    assert device.launches(project) == PASS
    kept = scales[1]
    scales[1] = kept * 3
    assert device.launches(project) == PASS + TABLE
    whole = scales[1]
    scales[1] = whole[:1]  # another block at the same address
    assert device.launches(project) == PASS + TABLE
    scales[1] = kept
    assert device.launches(project) == PASS
    device.set(capturing=1)
    assert device.launches(project) == PASS + TABLE


@needs_emulation
@pytest.mark.parametrize(
    ("cooperative_launch", "cooperative_blocks", "l2_bytes", "num_terms"),
    [
        (1, 6, 1 << 30, 1),
        (1, 6, 1 << 30, 35),
        (0, 6, 1 << 30, 35),
        (1, 1, 1 << 30, 35),  # a process that has a part of the device
        (1, 6, 1 << 16, 3),
        (1, 6, 1 << 30, 513),
    ],
)
def test_value_and_gradient_with_and_without_a_cooperative_launch(
    device, cooperative_launch, cooperative_blocks, l2_bytes, num_terms
):
    device.set(cooperative_launch=cooperative_launch, cooperative_blocks=cooperative_blocks, l2_bytes=l2_bytes)
    cooperative = cooperative_launch and cooperative_blocks > 1 and num_terms <= 512 and l2_bytes == 1 << 30
    generator = torch.Generator().manual_seed(0)
    lengths = [1000, 1, 0, 33, 2048, 5] if num_terms > 3 else [30_000, 1, 0, 33, 2048, 5]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    theta, gradients = (
        [torch.randn(n, generator=generator).to(t) for n, t in zip(lengths, dtypes, strict=True)] for _ in range(2)
    )
    matrix = torch.randn(num_terms, sum(lengths), generator=generator) / sum(lengths) ** 0.5
    pieces = [piece for row in matrix for piece in row.split(lengths)]
    a, b = torch.rand(2, num_terms, dtype=torch.float64, generator=generator)
    c = torch.tensor(0.3, dtype=torch.float64)

    drift = matrix.double() @ torch.cat(theta).double() - b
    size = c / 2 * (a * (matrix.double().abs() @ torch.cat(theta).double().abs() + b).square()).sum()
    step = (c * a * drift) @ matrix.double()
    results = []
    for directions in (list(matrix), pieces, pieces):
        targets = [g.clone() for g in gradients]

        def call(u: list[Tensor] = directions, targets: list[Tensor] = targets) -> None:
            results.append((ops.low_rank_penalty_accumulate_(targets, theta, u, a, b, c), *targets))

        launches = device.count(call, "launches", "cooperative_launches")
        assert (launches[1] == 1) == bool(cooperative), launches
    for value, *targets in results:  # flat, in pieces, and once more
        assert torch.equal(value, results[0][0])
        assert abs(value - c / 2 * (a * drift.square()).sum()) <= 1e-13 * size
        for target, first, gradient, part in zip(targets, results[0][1:], gradients, step.split(lengths), strict=True):
            assert torch.equal(target, first)
            exact = gradient.double() + part
            assert bool(((target.double() - exact).abs() <= torch.finfo(target.dtype).eps * exact.abs() + 1e-7).all())


@needs_emulation
@pytest.mark.parametrize("num_terms", [31, 32, 33, 70])
def test_adamw_with_more_terms_than_a_warp_has_lanes(num_terms):
    generator = torch.Generator().manual_seed(0)
    lengths = [1000, 1, 0, 33, 2048, 5]
    state = [[t.abs() for t in parameters(lengths, seed=seed)] for seed in range(4)]
    matrix = torch.randn(num_terms, sum(lengths), generator=generator)
    c = torch.randn(num_terms, generator=generator, dtype=torch.float64)
    rows = torch.rand(len(lengths), 8, generator=generator, dtype=torch.float64)
    expected = [[t.clone() for t in tensors] for tensors in state]
    reference.low_rank_adamw_(*expected, rows, None, list(matrix), c, False)
    projections = ops.low_rank_adamw_(*state, rows, None, list(matrix), c, False)
    theta = torch.cat(state[0]).double()
    torch.testing.assert_close(projections, matrix.double() @ theta, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


@needs_emulation
def test_bitwise_the_same_flat_or_in_a_list_whatever_the_addresses(device):
    lengths = [7001, 1, 0, 33, 4096, 30_000, 17, 6553]
    flat, u, gradient = parameters([sum(lengths)] * 3)
    shifted = torch.cat([flat[:1], flat])[1:]
    one = torch.ones(1, dtype=torch.float64)
    for l2_bytes in (0, 1 << 30):
        device.set(l2_bytes=l2_bytes)
        results = []
        for theta, directions in (
            ([flat], [u]),
            (list(flat.split(lengths)), [u]),
            ([t.clone() for t in flat.split(lengths)], [t.clone() for t in u.split(lengths)]),
            ([shifted], [u]),
        ):
            targets = [t.clone() for t in gradient.split([t.numel() for t in theta])]
            value = ops.low_rank_penalty_accumulate_(targets, theta, directions, one, one, one[0])
            quadratic = ops.diagonal_accumulate_(targets, theta, directions, directions, one[0])
            moments = [[t.abs() for t in targets] for _ in range(2)]
            adamw = (targets, [t.clone() for t in targets], *moments)
            rows = one.expand(len(theta), 8) / 2
            moved = ops.low_rank_adamw_(*adamw, rows, None, directions, one, False)
            squares = ops.diagonal_adamw_(*adamw, rows, None, directions, directions, True)
            results.append(
                torch.cat([value[None], quadratic[None], moved, squares[None], *targets, *moments[0], *moments[1]])
            )
        for result in results[1:]:
            assert torch.equal(result, results[0])


@needs_emulation
def test_places_beyond_two_to_the_31(device):
    lengths = [2**31 + 5, 0, 3, 2**33, 1, 0]
    addresses = [1 << 46, 0, 1 << 20, 1 << 45, 1 << 30, 0]
    float64, float32, bfloat16, float16 = 16, 8, 4, 5  # DType of csrc/core/segments.h
    sizes = {float64: 8, float32: 4, bfloat16: 2, float16: 2}
    dtypes = [float32, float64, bfloat16, float64, float16, float32]
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    array = ctypes.c_int64 * len(lengths)
    for tile in (0, 2**31 // 2048 - 1, 2**31 // 2048, 2**32 // 2048 + 1, sum(lengths) // 2048):
        segments, octets = (ctypes.c_int64 * 256)(), (ctypes.c_int64 * 256)()
        device.library.emulated_places(
            ctypes.c_int64(len(lengths)),
            array(*lengths),
            array(*addresses),
            array(*dtypes),
            ctypes.c_int64(tile),
            segments,
            octets,
        )
        for thread in range(256):
            index = 2048 * tile + 8 * thread
            if index >= sum(lengths):
                assert segments[thread] == -1
                continue
            segment = max(i for i, begin in enumerate(begins) if begin <= index < begin + lengths[i])
            assert segments[thread] == segment
            assert octets[thread] == addresses[segment] + (index - begins[segment]) * sizes[dtypes[segment]]
