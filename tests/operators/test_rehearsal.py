"""The rehearsal of a GPU on a CPU (``helpers/device.py``): where tensors are, and what it refuses, as CUDA does."""

import pytest
import torch
from helpers import device

import crl_kernels

pytestmark = pytest.mark.skipif(
    device.name != "rehearsal", reason="runs in the process that tests/project/test_device.py starts"
)


def test_what_tests_create_is_on_the_device_and_what_others_create_is_not():
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert x.is_leaf
    for tensor in (x, x.double(), x[1:], torch.tensor([1.0]), torch.nn.Linear(2, 2).weight, x.cpu().to(x.device)):
        assert tensor.device == device.here()
    assert device.here() != torch.device("cpu")
    assert x.to(x.device) is x
    library = {"torch": torch}
    exec(compile("y = torch.zeros(3)", crl_kernels.__file__, "exec"), library)
    for tensor in (x.cpu(), x.to("cpu", torch.float64), torch.ones(3, device="cpu"), library["y"]):
        assert tensor.device == torch.device("cpu")


def test_operators_refuse_tensors_of_both():
    x, host = torch.ones(3, requires_grad=True), torch.ones(3, device="cpu")
    for call in (
        lambda: x + host,
        lambda: torch.cat([x, host]),
        lambda: torch.equal(x, host),
        lambda: torch._foreach_add([x], [host]),
        lambda: torch.ops.crl_kernels.low_rank_projections([x], [host], 1),
        lambda: torch.nn.Linear(3, 2)(host),
    ):
        with pytest.raises(RuntimeError, match="tensors of the device and of the host"):
            call()
    with pytest.raises(TypeError, match=r"use Tensor\.cpu"):
        x.detach().numpy()
    assert (x * torch.ones((), device="cpu")).device == x.device
    assert x.detach().cpu().numpy().sum() == 3
