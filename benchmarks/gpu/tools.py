"""NVIDIA's tools on every operator, and the trainer's comparison that needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ..common import command
from . import needs

SANITIZERS = ("memcheck", "racecheck", "synccheck")
METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed")


def every_operator(device: str, small: bool) -> dict[str, Any]:
    """Calls each operator once, with one launch and with three, on lists that begin and end anywhere."""
    ops = torch.ops.crl_kernels

    def tensors(lengths: list[int], dtype: torch.dtype = torch.float32, shift: int = 1) -> list[torch.Tensor]:
        return [(8 * torch.rand(n + shift, device=device)).to(dtype)[shift:] for n in lengths]

    def low_rank(lengths: list[int], u: list[torch.Tensor], terms: int) -> None:
        params, c = tensors(lengths, torch.bfloat16), torch.rand(terms, dtype=torch.float64, device=device)
        ops.low_rank_projections(params, u, terms)
        ops.low_rank_combine(u, c, params)
        ops.low_rank_accumulate_(tensors(lengths), u, c)
        ops.low_rank_penalty_accumulate_(tensors(lengths, torch.bfloat16), params, u, c, c, c[0])
        rows = torch.rand(len(lengths), 8, dtype=torch.float64, device=device)
        ops.low_rank_adamw_(*(tensors(lengths) for _ in range(4)), rows, None, u, c, False)

    # int8 in blocks of whole octets, and in blocks and tensors that begin anywhere.
    for blocks, shift in (({4096: 128, 64: 8}, 0), ({2050: 5, 15: 3, 4097: 17, 1: 1}, 1)):
        scales = [torch.rand(n // length, device=device) for n, length in blocks.items()]
        low_rank([*blocks], 5 * (tensors([*blocks], torch.int8, shift) + scales), 5)
    lengths = [1, 15, 2049, 0, 4097]
    for terms in (1, 3, 600):  # more terms than one launch takes
        low_rank(lengths, list(torch.randn(terms, sum(lengths), device=device)), terms)
        c, rows = (torch.rand(*shape, dtype=torch.float64, device=device) for shape in ((1,), (len(lengths), 8)))
        params, s, m = tensors(lengths, torch.bfloat16), tensors(lengths), tensors(lengths)
        ops.diagonal_quadratic(params, s, m)
        ops.diagonal_gradient(params, s, m, c[0])
        ops.diagonal_accumulate_(tensors(lengths, torch.bfloat16), params, s, m, c[0])
        ops.diagonal_shrink_(params, s, m, c[0])
        ops.diagonal_adamw_(*(tensors(lengths) for _ in range(4)), rows, None, s, m, False)
    grads = torch.rand(33, 2051, device=device)
    ops.sample_gradient_stats(grads, None, True)
    ops.sample_gram(grads)
    images, outputs = torch.rand(3, 6, 9, 7, device=device), torch.rand(3, 10, 9, 7, device=device)
    ops.sample_weight_gradients(images, outputs, [3, 3], [1, 1], [1, 1], [1, 1], 1, None, False, True)
    if device == "cuda":
        torch.cuda.synchronize()
    return {}


def under(tool: list[str]) -> subprocess.CompletedProcess[str]:
    """``every_operator`` in a process under a tool, whose output is this process's too."""
    words = [*tool, sys.executable, "-m", "benchmarks.gpu", "--stage", "every_operator"]
    process = subprocess.run(words, cwd=command.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(process.stdout)
    return process


def sanitizers(device: str, small: bool) -> dict[str, Any]:
    """compute-sanitizer: access out of bounds, races in shared memory, barriers that not all threads reach."""
    if small:
        every_operator(device, small)
        raise needs.Needs("compute-sanitizer and a GPU; without them its script ran through")
    tool = needs.program("compute-sanitizer")
    # torch's caching allocator would hide a read beyond a tensor's end.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    runs = {name: under([tool, "--tool", name, "--error-exitcode", "9"]) for name in SANITIZERS}
    summaries = {name: [x for x in run.stdout.splitlines() if "SUMMARY" in x] for name, run in runs.items()}
    return {"summaries": summaries, "failures": [name for name, run in runs.items() if run.returncode != 0]}


def ncu(device: str, small: bool) -> dict[str, Any]:
    """Time and memory traffic of each kernel of this library, by hardware counters."""
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--metrics", ",".join(METRICS)]
    process = under([needs.program("ncu"), *options, "--kernel-name", "regex:_kernel"])
    return {"failures": [f"exit status {process.returncode}"] if process.returncode else []}


def regime(device: str, small: bool) -> dict[str, Any]:
    """``crl-diffusion compare --preset regime-mnist-gpu``; the folder takes the run up again where time has run out."""
    needs.packages("diffusers", "tyro", "torchmetrics", "torchvision", "sklearn")
    folder = Path(os.environ.get("CRL_GPU_RESULTS") or "runs") / "regime-mnist-gpu"
    words = ["-m", "crl_diffusion", "compare", "--preset", "regime-mnist-gpu", "--out", str(folder)]
    process = subprocess.run([sys.executable, *words])
    return {"folder": folder.name, "failures": [f"exit status {process.returncode}"] if process.returncode else []}
