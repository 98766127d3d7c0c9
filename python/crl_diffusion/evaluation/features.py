"""The interface of feature extractors, and digests of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

PART = 1000  # images that go through a classifier at a time


def digest(*tensors: Tensor) -> str:
    """sha256 of the tensors' bytes, in hexadecimal."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


class Extractor(nn.Module):
    """(N, C, S, S) float32 in [-1, 1], on the CPU -> features (N, num_features), on the CPU.

    `name` stands beside every FID. `keep`: the name determines the features, so statistics of real images may be stored
    under it. `part` is the largest number of images in one call.
    """

    num_features: int
    name = "untrained"
    keep = True
    part = PART

    def about(self) -> str:
        """One line about the extractor."""
        return f"feature extractor {self.name}: {self.num_features} features"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
