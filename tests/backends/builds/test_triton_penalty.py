"""Every Triton kernel compiles for the GPUs it is meant for, reads and writes 16 bytes at a time and does not spill: no
GPU is needed to see that."""

import re
import subprocess
import sys

import pytest
from helpers.triton_targets import (
    SLOW_FLOAT64,
    STACK,
    TARGETS,
    needs_linker,
    registers_and_stack,
    triton,
)  # skips where kernels are interpreted
from triton.compiler import ASTSource

from crl_kernels.backends.triton import adamw_kernels, chunks, penalty_kernels, reductions

F32, F64, BF16, F16, INT8 = 1, 2, 4, 8, 16  # bits of DTYPES
KERNELS = vars(penalty_kernels) | vars(adamw_kernels) | vars(reductions)
BYTES = {F32: 4, F64: 8, BF16: 2, F16: 2}  # of elements that are read 16 bytes at a time

# Views that a kernel reads, and those that it writes too: constants that hold their dtypes.
READS = {
    "projections_kernel": ("PARAMS", "DIRECTIONS"),
    "combine_kernel": ("TARGETS", "DIRECTIONS"),
    "quadratic_kernel": ("PARAMS", "STATE", "STATE"),
    "gradient_kernel": ("PARAMS", "PARAMS", "STATE", "STATE"),
    "shrink_kernel": ("PARAMS", "STATE", "STATE"),
    "low_rank_adamw_kernel": ("PARAMS", "GRADIENTS", "PARAMS", "PARAMS", "ROUNDINGS", "DIRECTIONS", "DIRECTIONS"),
    "diagonal_adamw_kernel": ("PARAMS", "GRADIENTS", "PARAMS", "PARAMS", "ROUNDINGS", "STATE", "STATE"),
}
WRITES = {
    "combine_kernel": ("TARGETS",),
    "gradient_kernel": ("PARAMS",),
    "shrink_kernel": ("PARAMS",),
    "low_rank_adamw_kernel": ("PARAMS",) * 3 + ("ROUNDINGS",),
    "diagonal_adamw_kernel": ("PARAMS",) * 3 + ("ROUNDINGS",),
}
SUMS = [name for name in READS if name not in ("combine_kernel", "shrink_kernel")]
TYPES = {
    "firsts": "*i32",
    "numel": "i64",
    "count": "i32",
    "num_terms": "i32",
    "pieces": "i32",
    "found_inf": "*fp32",
}
TABLES = (
    *("begins", "parameters", "targets", "directions", "fisher", "anchor"),
    *("gradients", "exp_avgs", "exp_avg_sqs", "roundings"),
)


def low_rank(values: int, directions: int):
    yield "projections_kernel", {"PARAMS": values, "DIRECTIONS": directions}
    for overwrite in (False, True):
        yield "combine_kernel", {"TARGETS": values, "DIRECTIONS": directions, "OVERWRITE": overwrite}


def diagonal(values: int, state: int):
    yield "quadratic_kernel", {"PARAMS": values, "STATE": state}
    for overwrite in (False, True):
        yield "gradient_kernel", {"PARAMS": values, "STATE": state, "OVERWRITE": overwrite}
    yield "shrink_kernel", {"PARAMS": values, "STATE": state}


def adamw(values: int, gradients: int, directions: int, state: int, roundings: int = 0):
    for decoupled in (False, True):
        constants = {"PARAMS": values, "GRADIENTS": gradients, "ROUNDINGS": roundings, "DECOUPLED": decoupled}
        yield "low_rank_adamw_kernel", constants | {"DIRECTIONS": directions}
        yield "diagonal_adamw_kernel", constants | {"STATE": state}


USUAL = [*low_rank(F32, F32), *low_rank(F32, BF16), *low_rank(BF16, BF16), *diagonal(F32, F32), *diagonal(BF16, F32)]
USUAL += [*adamw(F32, F32, F32, F32), *adamw(F32, BF16, BF16, F32), *adamw(F32, BF16, BF16, F32, BF16)]
QUANTISED = [*low_rank(F32, INT8), *low_rank(BF16, INT8)]
QUANTISED += [case for gradients in (F32, BF16) for case in adamw(F32, gradients, INT8, F32) if "DIRECTIONS" in case[1]]
USUAL += QUANTISED
ALL = F32 | F64 | BF16 | F16
MIXED = [*low_rank(F32, F32 | INT8), *low_rank(F32 | BF16, BF16), *low_rank(F16, F64), *diagonal(F32 | BF16 | F64, F64)]
MIXED += [*adamw(F32 | F64, F32 | BF16 | F64, F64, F64)]
WIDEST = [
    *adamw(F64, F64, F64, F64),
    *adamw(F32 | F64, ALL, ALL, F64),
    *low_rank(F64, F64),
    *low_rank(ALL, ALL),
    *low_rank(ALL, ALL | INT8),
    *low_rank(F64, INT8),
    *adamw(F32 | F64, ALL, ALL | INT8, F64),
    *adamw(F32 | F64, ALL, ALL | INT8, F64, ALL),
    *diagonal(F64, F64),
    *diagonal(ALL, F64),
]


def name_of(case) -> str:
    kernel, constants = case
    return "-".join([kernel, *(f"{name}={value}" for name, value in constants.items())])


def compiled(kernel: str, constants: dict[str, int], target: str):
    function = KERNELS[kernel]
    pairs = chunks.pairs(constants, target in SLOW_FLOAT64)
    constants = constants | {"PAIRS": pairs, "BLOCK": chunks.block(kernel)}

    def type_of(parameter: str) -> str:
        if parameter in constants:
            return "constexpr"
        if parameter.endswith("_stride"):
            return "i32"
        return TYPES.get(parameter, "*i64" if parameter in TABLES else "*fp64")

    options = {"num_warps": chunks.NUM_WARPS, "enable_fp_fusion": not pairs}
    if TARGETS[target].backend == "cuda":
        options["maxnreg"] = chunks.registers(kernel, constants)
    source = ASTSource(function, {name: type_of(name) for name in function.arg_names}, constexprs=constants)
    return triton.compile(source, target=TARGETS[target], options=options)


def wide_accesses(block: int, constants: dict[str, int], views: tuple[str, ...], threads: int) -> int:
    """How many 16-byte accesses of one thread cover a chunk of these views, one for each dtype in a view; none where a
    thread has fewer bytes of it."""
    dtypes = [bit for view in views for bit in BYTES if constants[view] & bit]
    return sum(block * BYTES[bit] // (16 * threads) for bit in dtypes)


@pytest.mark.parametrize("case", [*USUAL, *MIXED], ids=name_of)
def test_sm_90_reads_and_writes_16_bytes_at_a_time(case):
    kernel, constants = case
    ptx = compiled(kernel, constants, "sm_90").asm["ptx"]
    reads, writes = READS[kernel], WRITES.get(kernel, ())
    if constants.get("OVERWRITE"):
        reads = reads[1:]
    threads = 32 * chunks.NUM_WARPS
    for access, views in (("ld", reads), ("st", writes)):
        wide = re.findall(rf"\b{access}\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64)\b", ptx)
        assert len(wide) == wide_accesses(chunks.block(kernel), constants, views, threads)


@pytest.mark.parametrize("case", QUANTISED, ids=name_of)
def test_int8_elements_are_read_four_at_a_time_where_blocks_allow(case):
    """And one at a time on the other way, at blocks and tensors that begin anywhere."""
    kernel, constants = case
    ptx = compiled(kernel, constants, "sm_90").asm["ptx"]
    elements = chunks.block(kernel) // (32 * chunks.NUM_WARPS) * READS[kernel].count("DIRECTIONS")
    assert len(re.findall(r"\bld\.global\S*\.[bsu]8\b", ptx)) == elements


def layout_of_sum(case, target: str) -> str:
    """Which elements a thread adds before threads add theirs."""
    ir = compiled(*case, target).asm["ttgir"]
    (name,) = set(re.findall(r"\(tensor<\d+xf\d\d, (#\w+)>(?:, tensor<\d+xf32, #\w+>)?\) -> ", ir))
    return re.search(rf"^{name} = (.*)$", ir, re.MULTILINE)[1]


@pytest.mark.parametrize("target", ["sm_90", "sm_86"])
@pytest.mark.parametrize("values", [F32, BF16, F16, F64, ALL])
def test_sums_of_int8_directions_are_in_the_order_of_float32(values, target):
    for kernel in ("projections_kernel", "low_rank_adamw_kernel"):
        constants = {"PARAMS": values}
        if kernel == "low_rank_adamw_kernel":
            constants = {"PARAMS": values & (F32 | F64), "GRADIENTS": values, "ROUNDINGS": 0, "DECOUPLED": False}
        if constants["PARAMS"]:
            int8, float32 = ((kernel, constants | {"DIRECTIONS": bit}) for bit in (INT8, F32))
            assert layout_of_sum(int8, target) == layout_of_sum(float32, target)


def assert_does_not_spill(case, target, tmp_path):
    """In the binary that runs: spilled registers would be on the stack."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled(*case, target).asm["cubin"])
    registers, stack = registers_and_stack(binary)
    assert stack <= STACK
    assert registers <= chunks.registers(case[0], case[1] | {"PAIRS": chunks.pairs(case[1], target in SLOW_FLOAT64)})


@pytest.mark.parametrize("case", [*USUAL, *MIXED, *WIDEST], ids=name_of)
def test_sm_90_does_not_spill(case, tmp_path):
    assert_does_not_spill(case, "sm_90", tmp_path)


@pytest.mark.parametrize("case", USUAL, ids=name_of)
def test_gpus_with_slow_float64_use_little_of_it(case, tmp_path):
    """For coefficients, results, and sums that float32's exponents cannot hold: not for each element."""
    assert_does_not_spill(case, "sm_86", tmp_path)
    ptx = compiled(*case, "sm_86").asm["ptx"]
    elements = chunks.block(case[0]) // (32 * chunks.NUM_WARPS)  # of a thread
    wide = len(re.findall(r"\b(?:add|sub|mul|fma|div)\.\S*f64", ptx))
    sums = case[0] in SUMS and not case[1].get("OVERWRITE")  # have a second way, in float64
    assert wide < (8 * elements if sums else elements)
    assert "mul.rn.f32" in ptx
    assert not re.search(r"\bmul\.f32", ptx)  # would be fused with sums


@pytest.mark.parametrize("case", [case for case in [*USUAL, *MIXED] if "adamw" in case[0]], ids=name_of)
def test_roots_and_quotients_are_correctly_rounded(case):
    ptx = compiled(*case, "sm_90").asm["ptx"]
    assert "sqrt.rn.f" in ptx
    assert "div.rn.f" in ptx
    assert not re.search(r"\.approx|div\.full", ptx)


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_compiles_for_other_gpus(target):
    needs_linker(target)
    for kernel, constants in [*USUAL[:4], *diagonal(BF16, F32), *MIXED[:2], MIXED[-2]]:
        asm = compiled(kernel, constants, target).asm
        assert asm["hsaco" if target == "gfx942" else "cubin"]
        if target == "gfx942":
            assert "buffer_load_dwordx4" in asm["amdgcn"] or "global_load_dwordx4" in asm["amdgcn"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_second_stage_compiles(target):
    needs_linker(target)
    for function in (reductions.finish_kernel, penalty_kernels.force_kernel):
        types = {name: TYPES.get(name, "*fp64") for name in function.arg_names} | {"LANES": "constexpr"}
        source = ASTSource(function, types, constexprs={"LANES": 2048})
        asm = triton.compile(source, target=TARGETS[target], options={"num_warps": chunks.NUM_WARPS}).asm
        assert asm["hsaco" if target == "gfx942" else "cubin"]


@pytest.mark.parametrize("kernel", [*READS, "finish_kernel", "force_kernel"])
def test_a_list_and_a_flat_tensor_run_the_same_binary(kernel):
    """No value or alignment of an argument is specialised on: another binary might add lanes in another order."""
    parameters = KERNELS[kernel].params
    assert [p.name for p in parameters if not p.is_constexpr and not p.do_not_specialize] == []


# Every operator with a driver that says which GPU there is but launches nothing: each launch is bound, specialised and
# compiled as on that GPU. A kernel's parameters must not be called `params`, for example, as Triton's launcher has a
# variable of that name. The same calls for a flat tensor, for a list, and for a list at other alignments.
LAUNCHES = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if sys.argv[1] == "hip":
    torch.version.hip, target = "7.0", GPUTarget("hip", "gfx942", 64)
else:
    target = GPUTarget("cuda", 90, 32)


class Driver:
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


driver.set_active(Driver())

from crl_kernels.backends.triton import adamw_kernels, operators, penalty_kernels, reductions

binaries = {}


class Compiled:
    def __init__(self, kernel):
        self.kernel, self.__name__ = kernel, kernel.__name__

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            binary = self.kernel.warmup(*arguments, grid=grid, **constants)
            binaries.setdefault(self.__name__, set()).add(binary.hash)

        return launch


for module in (penalty_kernels, adamw_kernels, reductions):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiled(getattr(module, name)))

flat, u = torch.randn(2, 5000)
one, c = torch.ones((), dtype=torch.float64), torch.ones(3, dtype=torch.float64)[1:2]
for params in ([flat], list(flat.split([3000, 1, 1999])), [torch.randn(4097)[1:], torch.randn(904)]):
    targets = [torch.zeros_like(p) for p in params]
    operators.low_rank_projections(params, [u], 1)
    operators.low_rank_combine([u], c, params)
    operators.low_rank_accumulate_(targets, [u], c)
    operators.low_rank_penalty_accumulate_(targets, params, [u], c, c, one)
    operators.diagonal_quadratic(params, [u], [u])
    operators.diagonal_gradient(params, [u], [u], one)
    operators.diagonal_accumulate_(targets, params, [u], [u], one)
    operators.diagonal_shrink_(params, [u], [u], one)
    adamw = (params, targets, targets, targets, torch.ones(len(params), 8, dtype=torch.float64))
    operators.low_rank_adamw_(*adamw, None, [u], c, False)
    operators.low_rank_adamw_(*adamw, torch.ones(()), [u], c, False)
    operators.diagonal_adamw_(*adamw, None, [u], [u], False)
print(*sorted(f"{name}={len(hashes)}" for name, hashes in binaries.items()))
"""


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_operators_bind_and_compile_what_they_launch(backend):
    needs_linker(backend)
    run = subprocess.run([sys.executable, "-c", LAUNCHES, backend], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    overwriting = {"combine_kernel", "gradient_kernel"}  # have one binary for targets that are only written
    names = [*READS, "finish_kernel", "force_kernel"]
    assert run.stdout.split() == sorted(f"{name}={1 + (name in overwriting)}" for name in names)
