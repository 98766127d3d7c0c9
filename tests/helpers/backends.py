"""What the tests of every backend share: the backends, hostile lists of tensors, bounds, runs with narrower loops."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from crl_kernels.backends import reference, registry
from crl_kernels.backends.memory_order import FlatOrder
from helpers import device

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Half a unit in the last place, relative: what one rounding to the dtype may cost.
ROUNDING = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CHUNK = 4096
EXAMPLES = 20 if registry.INTERPRETED else 5 if device.name == "rehearsal" else 60
MANY = 70 if registry.INTERPRETED else 700  # tensors in a chunk, which a program visits one after another

needs_cpu_library = pytest.mark.skipif(not registry.CPU.loaded, reason=f"no C++ kernels: {registry.CPU.reason}")
cpp_loops = pytest.mark.cpu("of the C++ loops")

needs_library = pytest.mark.skipif(
    device.type_() == "cpu"
    and not registry.CPU.loaded
    and not registry.INTERPRETED
    and "CRL_TEST_LIBRARY" not in os.environ,
    reason=f"no C++ kernels: {registry.CPU.reason}",
)


class Dispatched:
    """The operators as torch dispatches them: those of the compiled library."""

    def __getattr__(self, name: str):
        return getattr(torch.ops.crl_kernels, name)


BACKENDS = [
    pytest.param(Dispatched(), id="compiled", marks=needs_library),
    pytest.param(reference, id="reference"),
]

length = st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
layout = st.sampled_from(["contiguous", "offset", "strided", "transposed", "channels_last", "expanded"])
FORMS = ["flat", "row", "list", "list like the parameters"]  # of a direction, a Fisher or an anchor
form = st.sampled_from(FORMS)
direction_form = st.sampled_from([*FORMS, "int8", "int8 beside others"])
lists = st.lists(st.tuples(length, st.sampled_from(sorted(DTYPES)), layout), min_size=1, max_size=6)


def poison() -> None:
    """Fills freed memory with NaN, so that a kernel which reads what it did not write is seen."""
    for size in (64, 4096, 65536, 1 << 20):
        torch.full((size,), float("nan"))


def make(numel: int, dtype: torch.dtype, kind: str, generator: torch.Generator) -> Tensor:
    """A tensor of ``numel`` elements with the named memory layout."""

    def fresh(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind == "offset":
        return fresh(numel + 1)[1:]
    if kind == "strided":
        return fresh(2 * numel)[::2]
    if kind == "transposed" and numel % 3 == 0:
        return fresh(3, numel // 3).t()
    if kind == "expanded" and numel % 2 == 0:
        return fresh(numel // 2, 1).expand(numel // 2, 2)
    for channels, size in ((3, 2), (2, 2), (7, 3)):
        if kind == "channels_last" and numel % (channels * size**2) == 0:
            shape = numel // (channels * size**2), channels, size, size
            return fresh(*shape).to(memory_format=torch.channels_last)
    return fresh(numel)


def in_other_orders(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """The same values, each tensor in an order of memory of its own: its own, row-major, reversed, or with gaps."""
    orders = (
        lambda tensor: tensor,
        lambda tensor: tensor.contiguous(),
        lambda tensor: (
            tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
        ),
        lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    )
    choice = torch.randint(len(orders), (len(tensors),), generator=torch.Generator().manual_seed(seed))
    return [orders[i](tensor) for i, tensor in zip(choice.tolist(), tensors, strict=True)]


def random_lists(case, seed: int, count: int = 1, writable: bool = False) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    fix = (lambda kind: "strided" if kind == "expanded" else kind) if writable else (lambda kind: kind)
    return [[make(n, DTYPES[dtype], fix(kind), generator) for n, dtype, kind in case] for _ in range(count)]


def flat64(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def directions_like(params: list[Tensor], num_terms: int, dtype: torch.dtype, form: str, seed: int):
    """(arguments for the operator, (K, P) float64)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_terms, sum(p.numel() for p in params), generator=generator).to(dtype)
    if form == "flat":
        return list(matrix), matrix.double()
    if form.startswith("int8"):
        return int8_directions(params, num_terms, None if form == "int8" else dtype, seed)
    lengths = [p.numel() for p in params]
    pieces = [piece.reshape(p.shape) for row in matrix for piece, p in zip(row.split(lengths), params, strict=True)]
    if form == "row":
        terms = [pieces[k * len(params) : (k + 1) * len(params)] for k in range(num_terms)]
        return [FlatOrder(params).flatten(term)[None] for term in terms], matrix.double()
    if form == "list like the parameters":
        pieces = [
            torch.empty_like(p, dtype=dtype).copy_(piece) for piece, p in zip(pieces, params * num_terms, strict=True)
        ]
    return pieces, matrix.double()


def int8_directions(params: list[Tensor], num_terms: int, other_dtype: torch.dtype | None, seed: int):
    """The same for directions in int8: blocks of any lengths and, given another dtype, about half of the tensors in it.

    Tensors have the parameters' shapes and orders of memory of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    directions, matrix = [], torch.zeros(num_terms, sum(p.numel() for p in params), dtype=torch.float64)
    for row in matrix:
        pieces, scales = [], []
        for parameter, target in zip(params, row.split([p.numel() for p in params]), strict=True):
            numel = parameter.numel()
            if other_dtype is not None and torch.rand((), generator=generator) < 0.5:
                pieces.append(torch.randn(parameter.shape, generator=generator).to(other_dtype))
                scales.append(torch.zeros(0))
                target.copy_(pieces[-1].flatten())
                continue
            lengths = [length for length in range(1, 129) if numel and numel % length == 0] or [1]
            length = lengths[int(torch.randint(len(lengths), (), generator=generator))]
            q = torch.randint(-127, 128, parameter.shape, generator=generator, dtype=torch.int8)
            scale = torch.randint(2**15, 2**16, (numel // length,), generator=generator) * 2.0**-22
            target.copy_((q.reshape(-1, length) * scale[:, None].double()).flatten())
            pieces.append(q)
            scales.append(torch.stack([scale, scale], 1)[:, 0] if seed % 3 == 0 else scale)
        directions += in_other_orders(pieces, seed) + scales
    return directions, matrix


def assert_sum_close(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """A float64 sum may be off by a few roundings of the sum of magnitudes."""
    assert bool(((actual - expected).abs() <= 1e-13 * magnitude).all()), (actual, expected)


def assert_rounded_once(actual: list[Tensor], expected: Tensor, magnitude: Tensor) -> None:
    """Each element is the float64 result, rounded to its dtype: to half an ulp of the terms that were added."""
    lengths = [t.numel() for t in actual]
    for t, e, m in zip(actual, expected.split(lengths), magnitude.split(lengths), strict=True):
        # 2x: float64 -> float32 -> half rounds twice. 8x: the expected value has float64 roundings of its own.
        bound = (2 * ROUNDING[t.dtype] + 8 * ROUNDING[torch.float64]) * m + torch.finfo(t.dtype).smallest_normal
        assert bool(((t.double().flatten() - e).abs() <= bound).all())


# What the loops of csrc/cpu/loops_*.cpp need of a processor, by its flags in /proc/cpuinfo.
INSTRUCTION_SETS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
needs_x86_linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="asks /proc/cpuinfo of an x86-64 Linux"
)


def runs_here(isa: str) -> bool:
    flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return INSTRUCTION_SETS[isa] <= set(flags[1].split())


def assert_pass_in_a_process(selected: str, *files: str, **environment: str) -> None:
    """Runs what is selected of test files in a process with these environment variables."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--device", "cpu", "-q", "-p", "no:cacheprovider", "-k", selected, *files],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def for_narrower_loops(test: Callable) -> Callable:
    """A test for each set of loops that is not this processor's fastest, ``isa``; it starts a process with that set."""
    for mark in (
        pytest.mark.parametrize("isa", ["baseline", "avx2"]),
        pytest.mark.skipif(
            "CRL_KERNELS_ISA" in os.environ,
            reason="this process has narrower loops already: it is the run that this test starts",
        ),
        needs_x86_linux,
        needs_cpu_library,
        cpp_loops,
    ):
        test = mark(test)
    return test


def assert_pass_with_narrower_loops(isa: str, file: str, selected: str) -> None:
    """Runs what is selected of a test file in a process with another set of loops than the fastest."""
    if not runs_here("avx2" if isa == "baseline" else "avx512"):
        pytest.skip(f"{isa} is the fastest set that this processor runs: the other tests use it")
    assert_pass_in_a_process(selected, file, CRL_KERNELS_ISA=isa)


@contextmanager
def threads(count: int) -> Iterator[None]:
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def largest_error(actual: Tensor, expected: Tensor, size: Tensor) -> float:
    """The largest error, in units of the magnitudes that were added."""
    return ((actual.double() - expected).abs() / size.clamp(min=1e-300)).max().item() if actual.numel() else 0.0


def least_bound(dtype: torch.dtype) -> float:
    """What is left where plain PyTorch happens to be exact, as for one row: a unit in the last place of the mean.
    Beside float64 gradients the float64 truth is itself a rounded sum."""
    return 1e-14 if dtype == torch.float64 else 2.0**-23
