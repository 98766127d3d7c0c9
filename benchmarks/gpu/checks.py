"""What a stage requires: a GPU, the chosen backend, and results within their error bounds."""

import torch
from torch import Tensor


class NeedsGpu(Exception):
    """What a stage cannot do on this machine."""


def require_backend(device: str) -> dict[str, str]:
    """The implementation of each operator, which must be that of the chosen backend."""
    from crl_kernels import _ops
    from crl_kernels.backends import registry

    runs = {name: registry.implementation(device, name) for name in _ops.NAMES}
    wanted = {"cuda": "CUDA", "triton": "Triton"}.get(registry.CHOICE)
    expected = {name: "Triton" if name in registry.TRITON_ON_GPUS else wanted for name in runs}
    if others := {name: actual for name, actual in runs.items() if wanted and actual != expected[name]}:
        raise AssertionError(f"expected {wanted}, and Triton for what CUDA leaves out; found {others}")
    return runs


def poison(device: str) -> None:
    """Fills freed memory with NaN, which shows up where a kernel reads memory that it did not write."""
    for size in (64, 4096, 65536, 1 << 20):
        torch.full((size,), float("nan"), device=device)


def flat64(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def require_sum(name: str, actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """Allows a float64 sum an error of a few roundings of the sum of magnitudes."""
    if not bool(((actual.cpu() - expected).abs() <= 1e-13 * magnitude).all()):
        raise AssertionError(f"{name}: {actual.tolist()}, expected {expected.tolist()}")


def require_rounded(
    name: str, actual: list[Tensor], expected: Tensor, magnitude: Tensor, slack: Tensor | None = None
) -> None:
    """Each element is the float64 result, rounded to its dtype; ``slack`` is the error of that result itself."""
    lengths = [t.numel() for t in actual]
    slack = torch.zeros_like(magnitude) if slack is None else slack
    parts = [x.split(lengths) for x in (expected, magnitude, slack)]
    for t, e, m, s in zip(actual, *parts, strict=True):
        bound = (torch.finfo(t.dtype).eps + 2**-50) * m + s + torch.finfo(t.dtype).smallest_normal
        wrong = (t.cpu().double().flatten() - e).abs() > bound
        if bool(wrong.any()) or bool(t.isnan().any()):
            raise AssertionError(f"{name}: {int(wrong.sum())} of {t.numel()} {t.dtype} elements are wrong")


def require_close(name: str, actual: Tensor, expected: Tensor, size: Tensor, bound: float) -> float:
    """The largest error in units of ``size``, the magnitudes that were added; all on one device, in float64."""
    error = float(((actual.double() - expected).abs() / size.clamp(min=1e-300)).max()) if actual.numel() else 0.0
    if not error <= bound:  # NaN does not pass either
        raise AssertionError(f"{name}: an error of {error:.1e} of the magnitudes, allowed are {bound:.1e}")
    return error
