"""The CUDA compiler's machine code: no spilled registers, 16-byte accesses, memory as the limit. Needs no GPU."""

import sys

import pytest
import torch

from benchmarks.static_gpu.__main__ import KERNELS, compile_for, table, terms_of, way
from benchmarks.static_gpu.machine_code import Function, cuobjdump, nvcc
from benchmarks.static_gpu.prediction import ARCHITECTURES as COUNTED
from benchmarks.static_gpu.prediction import OCTET

ARCHITECTURES = (  # with fast float64, and with slow
    "90",
    "86",
    *(pytest.param(architecture, marks=pytest.mark.slow) for architecture in ("75", "80", "89", "100", "120")),
)
# Kernels that stream over the parameters, and whether they write such a stream.
STREAMING = {
    "projections_kernel": False,
    "combine_kernel": True,
    "penalty_kernel": True,
    "quadratic_kernel": False,
    "quadratic_gradient_kernel": True,
    "shrink_kernel": True,
    "low_rank_adamw_kernel": True,
    "diagonal_adamw_kernel": True,
}
pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="needs nvcc, on PATH or in $CUDA_HOME/bin"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs the headers of a CUDA build of torch"),
    pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton"),
    pytest.mark.skipif(sys.platform != "linux", reason="compiles with Linux's options"),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> tuple[str, list[Function], list[Function]]:
    """An architecture, the kernels that are shipped, and those for a fixed number of terms."""
    return request.param, *compile_for(request.param, tmp_path_factory.mktemp("machine_code"))


def test_no_spills_and_16_byte_accesses(kernels):
    _, shipped, _ = kernels
    assert [function.name for function in shipped if function.spilled_bytes] == []
    seen = set()
    for function in shipped:
        # The exact name, with its length before it: quadratic_kernel is not quadratic_gradient_kernel.
        name = next((name for name in STREAMING if f"{len(name)}{name}" in function.name), None)
        if name is None:
            continue
        seen.add(name)
        moves = {i.opcode.partition(".")[0] for i in function.code if i.moves_unit}
        expected = {"LDG", "STG"} if STREAMING[name] else {"LDG"}
        if name == "combine_kernel" and "Lb1ENS_8Int8View" in function.name:
            expected = {"STG"}  # reads nothing but int8 directions
        assert moves == expected, function.name
    assert seen == set(STREAMING)


def test_int8_octets_are_loaded_at_once(kernels):
    """No byte alone, but on the way of octets that begin anywhere."""
    int8 = [function for function in kernels[1] if "Int8View" in function.name]
    assert len(int8) == 16  # float32 and float64 of four kernels, of one more variant of one, of three of another
    for function in int8:
        # One for each place where a term is used: octets that do not lie in a block are read by a loop.
        bytes_ = [i for i in function.code if i.opcode.startswith("LDG") and ".S8" in i.opcode]
        assert 0 < len(bytes_) < 16, function.name


def limit_of(kernel: str, terms: str, card: str) -> float:
    """The most that arithmetic may take, as a share of memory's time, if all of a card's bandwidth is used."""
    if terms.startswith("10 of 16 bits"):
        return 1.15 if card == "B200" else 0.85
    if terms.startswith("10 of 8 bits"):  # half of the bytes, and about as many instructions
        return 1.8 if card == "B200" else 1.25
    if terms.startswith("1 of 8 bits") and card == "B200":
        return 1.05
    return 0.8


def test_arithmetic_is_not_the_limit(kernels):
    rows = table(*kernels)
    assert len(rows) == 16
    shares = {
        (row["kernel"], row["terms"], name): card["share_of_memory_time"]
        for row in rows
        for name, card in row["cards"].items()
    }
    over = {key: share for key, share in shares.items() if not 0.03 < share <= limit_of(*key)}
    assert over == {}
    assert [row["kernel"] for row in rows if row["blocks"] < 2] == []


def test_a_thread_requests_all_streams_and_two_terms_before_it_waits(kernels):
    architecture, shipped, fixed = kernels
    for kernel in KERNELS:
        for terms in terms_of(kernel):
            if terms and terms.bytes == 1:
                continue  # not counted
            of_terms = min(terms.number, 2) * terms.bytes if terms else 0
            requested = way(kernel, shipped, fixed, COUNTED[architecture], terms).bytes_requested
            assert requested == OCTET * (kernel.read * 4 + of_terms), (kernel.label, terms)
