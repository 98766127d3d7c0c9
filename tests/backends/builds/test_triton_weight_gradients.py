"""The Triton kernels for per-sample weight gradients, as their operator launches them, compile for the GPUs they are
meant for, run on tensor cores, read 16 bytes at a time and do not spill: no GPU is needed to see that."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.triton_targets import (
    STACK,
    TARGETS,
    needs_linker,
    registers_and_stack,
    triton,
)  # skips where kernels are interpreted

from crl_kernels.backends.triton.weight_gradients import compiler_fails

# The operator with a driver that says which GPU there is but launches nothing: each launch is bound, specialised and
# compiled as on that GPU, and its binary kept. The sizes are those of a UNet at 16 x 16 pixels: its 3 x 3 convolutions,
# the first one, and projections of 64 tokens, adjacent by pixel or by channel, with so many samples that a program has
# several.
LAUNCHES = """
import json
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

folder, target = Path(sys.argv[1]), GPUTarget(*json.loads(sys.argv[2]))
if target.backend == "hip":
    torch.version.hip = "7.0"


class Driver:
    get_current_target = staticmethod(lambda: target)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


driver.set_active(Driver())

from crl_kernels.backends.triton import reductions, weight_gradients, weight_gradients_kernels

launches = []


class Compiled:
    def __init__(self, kernel):
        self.kernel, self.__name__ = kernel, kernel.__name__

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            asm = self.kernel.warmup(*arguments, grid=grid, **constants).asm
            for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
                if kind in asm:
                    data = asm[kind]
                    path = folder / f"{len(launches)}.{kind}"
                    path.write_bytes(data) if isinstance(data, bytes) else path.write_text(data)
            launches.append({"kernel": self.__name__, "case": case} | constants)

        return launch


for module in (reductions, weight_gradients_kernels):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Compiled(getattr(module, name)))


def image(channels, height, width, tokens):
    if tokens:
        return torch.empty(samples, height * width, channels, dtype=dtype).transpose(1, 2).unsqueeze(2)
    return torch.empty(samples, channels, height, width, dtype=dtype)


sizes = {
    "convolution": (96, (128, 256), (16, 16), 3),
    "first": (600, (3, 128), (16, 16), 3),
    "pixels": (96, (256, 256), (1, 64), 1),
    "tokens": (96, (256, 256), (1, 64), 1),
}
for name in json.loads(sys.argv[3]):
    for kind in json.loads(sys.argv[4]):
        for squares, terms in ((False, None), (True, None), (False, 2)):
            dtype, (samples, (c, o), (h, w), k) = getattr(torch, name), sizes[kind]
            case = f"{name}, {kind}"
            a, b = (image(channels, h, w, kind == "tokens") for channels in (c, o))
            u = None if terms is None else torch.empty(terms, o, c, k, k)
            weight_gradients.sample_weight_gradients(
                a, b, [k, k], [1, 1], [k // 2, k // 2], [1, 1], 1, u, False, squares
            )
print(json.dumps(launches))
"""


def launches_of(folder: Path, target: str, dtypes: list[str], kinds: list[str]) -> list[dict]:
    gpu = TARGETS[target]
    facts = json.dumps([gpu.backend, gpu.arch, gpu.warp_size])
    command = [sys.executable, "-c", LAUNCHES, str(folder), facts, json.dumps(dtypes), json.dumps(kinds)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def sm_90(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("sm_90")
    return folder, launches_of(folder, "sm_90", ["float32", "bfloat16"], ["convolution", "first", "pixels", "tokens"])


def test_sm_90_does_not_spill_and_two_programs_share_a_multiprocessor(sm_90):
    """But for float32 with directions and squares at once, which spills 16 bytes."""
    folder, launches = sm_90
    for i, launch in enumerate(launches):
        registers, stack = registers_and_stack(folder / f"{i}.cubin")
        assert stack <= STACK, launch
        if launch["kernel"] == "weight_gradient_kernel":
            assert 2 * registers * 32 * launch["num_warps"] <= 65536


def test_sm_90_runs_on_tensor_cores_and_reads_16_bytes_at_a_time(sm_90):
    """Copies to shared memory, of which one thread makes as many as cover a block of pixels of both operands, for each
    stage that is filled before the loop and in it. A first convolution's 3 channels cannot be read so."""
    folder, launches = sm_90
    seen = set()
    for i, launch in enumerate(launches):
        if launch["kernel"] != "weight_gradient_kernel":
            continue
        ptx = (folder / f"{i}.ptx").read_text()
        assert "wgmma.mma_async" in ptx, launch
        if "first" in launch["case"]:
            continue
        size = 4 if launch["case"].startswith("float32") else 2
        elements = (launch["BLOCK_O"] + launch["BLOCK_J"]) * launch["BLOCK_P"]
        wide = elements * size // (16 * 32 * launch["num_warps"])
        copies = re.findall(r"\bcp\.async\.\w+\.shared\.global\S* \[[^;]*?\], (0x\w+)", ptx)
        assert set(copies) == {"0x10"}, launch
        assert len(copies) == launch["num_stages"] * wide
        if launch["PROJECT"]:
            assert re.search(r"\bld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64)\b", ptx), launch
        seen.add((launch["PROJECT"], launch["SUMS"]))
    assert seen == {(False, True), (True, False), (True, True)}


def test_where_the_compiler_fails():
    """It ends the process, so it must not be called."""
    assert compiler_fails("3.6.0", (10, 0))
    assert compiler_fails("3.7.1+git", (10, 3))
    assert not compiler_fails("3.8.0", (10, 0))
    assert not compiler_fails("3.6.0", (9, 0))


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_compiles_for_other_gpus(target, tmp_path):
    needs_linker(target)
    if target == "sm_100" and compiler_fails(triton.__version__, (10, 0)):
        pytest.skip(f"Triton {triton.__version__} cannot compile this for {target}: the reference runs there")
    launches = launches_of(tmp_path, target, ["float32", "float16"], ["convolution", "first"])
    kind = "hsaco" if target == "gfx942" else "cubin"
    assert all((tmp_path / f"{i}.{kind}").stat().st_size > 0 for i in range(len(launches)))
    for i, launch in enumerate(launches):
        if target == "gfx942" and launch["kernel"] == "weight_gradient_kernel":
            code = (tmp_path / f"{i}.amdgcn").read_text()
            assert "v_mfma" in code, launch
            assert re.search(r"\.vgpr_spill_count: 0\b", code), launch
            assert re.search(r"(buffer|global)_load_dwordx4", code), launch
