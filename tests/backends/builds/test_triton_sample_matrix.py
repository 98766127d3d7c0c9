"""The Triton kernels over a matrix of per-sample gradients compile for the GPUs they are meant for, read 16 bytes at a
time and do not spill: no GPU is needed to see that."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from helpers.triton_targets import (
    STACK,
    TARGETS,
    needs_linker,
    registers_and_stack,
)  # skips where kernels are interpreted
from triton import compile as compile_kernel
from triton.compiler import ASTSource

from crl_kernels.backends.triton import chunks, sample_matrix, sample_matrix_kernels

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
ALIGNED = ("grads", "stride", "num_columns", "directions", "mean", "squares")  # as torch allocates them
dtype = pytest.mark.parametrize("dtype", NAMES, ids=str)
# On the mean, with the diagonal, and on 16 directions.
USES = [
    {"ON_MEAN": True, "SUMS": True, "DIAGONAL": False, "TERMS": 1},
    {"ON_MEAN": True, "SUMS": True, "DIAGONAL": True, "TERMS": 1},
    {"ON_MEAN": False, "SUMS": True, "DIAGONAL": True, "TERMS": sample_matrix.TERMS},
]


def compiled(kernel, constants, dtype, target: str, num_warps: int):
    wide = "*fp64" if dtype == torch.float64 else "*fp32"
    types = dict.fromkeys(("num_rows", "num_columns", "num_terms", "programs"), "i32")
    types |= {"grads": f"*{NAMES[dtype]}", "stride": "i64"} | dict.fromkeys(("directions", "mean", "squares"), wide)
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp64") for a in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in ALIGNED}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return compile_kernel(source, target=TARGETS[target], options={"num_warps": num_warps})


def stats(use, rows: int, dtype, target: str):
    constants = use | sample_matrix.stats_constants(rows)
    return compiled(sample_matrix_kernels.stats_kernel, constants, dtype, target, chunks.NUM_WARPS)


def gram(rows: int, dtype, target: str):
    constants = sample_matrix.gram_constants(rows, dtype, target == "gfx942")
    return compiled(sample_matrix_kernels.gram_kernel, constants, dtype, target, sample_matrix.gram_warps(constants))


def stack_bytes(binary, tmp_path) -> int:
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    return registers_and_stack(path)[1]


@dtype
@pytest.mark.parametrize("rows", [8, 64, 256, 300])
def test_sm_90_reads_the_matrix_16_bytes_at_a_time_and_does_not_spill(rows, dtype, tmp_path):
    for use in USES:
        binary = stats(use, rows, dtype, "sm_90")
        wide = re.findall(r"\bld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64)\b", binary.asm["ptx"])
        tile = sample_matrix.TILE * dtype.itemsize // (16 * 32 * chunks.NUM_WARPS)
        assert len(wide) >= tile * (1 if rows <= sample_matrix.ROWS else 2)
        assert stack_bytes(binary, tmp_path) <= STACK


@dtype
def test_the_gram_matrix_runs_on_tensor_cores(dtype, tmp_path):
    binary = gram(64, dtype, "sm_90")
    assert re.search(r"\b(?:wgmma\.mma_async|mma)\.sync", binary.asm["ptx"])
    assert stack_bytes(binary, tmp_path) == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_compiles_for_other_gpus(target):
    needs_linker(target)
    binaries = [gram(64, dtype, target) for dtype in NAMES]
    binaries += [stats(USES[0], rows, dtype, target) for rows in (8, 64, 300) for dtype in NAMES]
    assert all(binary.asm["hsaco" if target == "gfx942" else "cubin"] for binary in binaries)
