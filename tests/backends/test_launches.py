"""Which implementation runs, and the penalty's operator on both sides of what changes its launches: the number of terms
that one cooperative launch takes, and the size of L2, beyond which three launches replace it."""

import pytest
import torch
from helpers import device
from helpers.backends import BACKENDS, assert_rounded_once, assert_sum_close, flat64, poison
from torch import Tensor

from crl_kernels.backends import registry
from crl_kernels.operators import definitions

needs_gpu = pytest.mark.skipif(device.type_() != "cuda", reason="needs a GPU")


@needs_gpu
def test_the_chosen_backend_runs_every_operator():
    runs = {name: registry.implementation("cuda", name) for name in definitions.NAMES}
    assert registry.CHOICE in ("auto", "cuda", "triton")
    wanted = "Triton" if registry.CHOICE == "triton" else "CUDA"
    assert runs == {name: "Triton" if name in registry.TRITON_ON_GPUS else wanted for name in definitions.NAMES}


def lengths_of(numel: int) -> list[int]:
    """Of tensors that begin anywhere."""
    return [numel // 3 + 1, 0, 1, 17, numel // 2 - 18, numel - numel // 3 - numel // 2 - 1]


def assert_penalty(backend, numel: int, terms: int, dtype: torch.dtype, flat: bool) -> None:
    """The value, and the gradient in parameters of two dtypes; and bitwise the same once more."""
    generator = torch.Generator().manual_seed(numel + terms)
    lengths = lengths_of(numel)
    kinds = [torch.float32, torch.bfloat16] * 3

    def tensors() -> list[Tensor]:
        return [torch.randn(n, generator=generator).to(kind) for n, kind in zip(lengths, kinds, strict=True)]

    params, targets = tensors(), tensors()
    rows = [(torch.randn(numel, generator=generator) / numel**0.5).to(dtype) for _ in range(terms)]
    u = rows if flat else [piece for row in rows for piece in row.split(lengths)]
    a, b = torch.rand(2, terms, generator=generator, dtype=torch.float64)
    lam = torch.tensor(1.7, dtype=torch.float64)
    theta, before = flat64(params), flat64(targets)
    again = [t.clone() for t in targets]
    poison()
    value = backend.low_rank_penalty_accumulate_(targets, params, u, a, b, lam)

    step, size, exact, magnitude = torch.zeros_like(theta), torch.zeros_like(theta), 0.0, 0.0
    for row, curvature, anchor in zip(rows, a, b, strict=True):  # one at a time: all of them in float64 need 8 GB
        drift, largest = row.double() @ theta - anchor, row.double().abs() @ theta.abs() + anchor.abs()
        exact, magnitude = exact + curvature * drift.square(), magnitude + curvature * largest.square()
        step += lam * curvature * drift * row.double()
        size += lam * curvature * largest * row.double().abs()
    assert_sum_close(value, lam / 2 * exact, lam / 2 * magnitude)
    assert_rounded_once(targets, before + step, before.abs() + size)
    assert torch.equal(backend.low_rank_penalty_accumulate_(again, params, u, a, b, lam), value)
    assert all(map(torch.equal, again, targets))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "pieces"])
@pytest.mark.parametrize("terms", [1, 3, 33, 600])
def test_few_and_many_terms(backend, terms, flat):
    assert_penalty(backend, 9_001, terms, torch.float32, flat)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [1, 3, 33, 600])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_directions_that_just_fit_in_l2_and_just_do_not(terms, dtype, beyond):
    """The CUDA kernels read them twice from L2 in one launch, or take three launches."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    assert_penalty(torch.ops.crl_kernels, l2 // (terms * dtype.itemsize) + beyond, terms, dtype, flat=False)
