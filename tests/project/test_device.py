"""``pytest --device``: a GPU that is not there, and the rehearsal that stands in for one on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# What a rehearsal must refuse, and what it must not: run in a process, because its mode lasts as long as the process.
REHEARSAL = """
import pytest, torch
import crl_kernels
from helpers import device

def test_what_tests_create_is_on_the_device_and_what_others_create_is_not():
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert x.is_leaf
    for tensor in (x, x.double(), x[1:], torch.tensor([1.0]), torch.nn.Linear(2, 2).weight, x.cpu().to(x.device)):
        assert tensor.device == device.here() != torch.device("cpu")
    assert x.to(x.device) is x
    library = {"torch": torch}
    exec(compile("y = torch.zeros(3)", crl_kernels.__file__, "exec"), library)
    for tensor in (x.cpu(), x.to("cpu", torch.float64), torch.ones(3, device="cpu"), library["y"]):
        assert tensor.device == torch.device("cpu")

def test_what_cuda_refuses():
    x, host = torch.ones(3, requires_grad=True), torch.ones(3, device="cpu")
    for call in (
        lambda: x + host,
        lambda: torch.cat([x, host]),
        lambda: torch.equal(x, host),
        lambda: torch._foreach_add([x], [host]),
        lambda: torch.ops.crl_kernels.low_rank_projections([x], [host], 1),
        lambda: torch.autograd.grad(torch.nn.Linear(3, 2)(host).sum(), x),
    ):
        with pytest.raises(RuntimeError, match="tensors of the device and of the host"):
            call()
    with pytest.raises(TypeError, match="use Tensor.cpu"):
        x.detach().numpy()
    assert (x * torch.ones((), device="cpu")).device == x.device
    assert x.detach().cpu().numpy().sum() == 3
"""


def run(*arguments: str, folder: Path = TESTS) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(words, cwd=folder.parent, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error_of_one_line():
    process = run("--device", "cuda")
    assert (process.returncode, process.stdout, process.stderr.strip()) == (
        pytest.ExitCode.USAGE_ERROR,
        "",
        "ERROR: --device cuda: torch finds no GPU",
    )


def test_a_rehearsal_refuses_what_cuda_refuses(tmp_path):
    """The file counts as a test's because it is in the folder of the tests that a process loads."""
    file = TESTS / "fisher/test_of_a_rehearsal.py"
    file.write_text(REHEARSAL)
    try:
        process = run("--device", "rehearsal", str(file))
    finally:
        file.unlink()
    assert process.returncode == 0, process.stdout + process.stderr
    assert "2 passed" in process.stdout
