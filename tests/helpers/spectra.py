"""Gradients whose Fisher is known, and the spectrum of their Gram matrix."""

import torch
from torch import Tensor

from crl_kernels.diagnostics.spectrum import GROUPS, Spectrum, spectrum_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(g: Tensor, **options) -> Spectrum:
    """Of gradients (N, P), with their group diagonals."""
    groups = torch.stack([part.square().mean(0) for part in g.chunk(GROUPS)])
    return spectrum_of(g @ g.T, groups @ groups.T, **options)
