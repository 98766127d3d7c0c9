"""What an extractor of features is."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

PART = 1000  # images that go through a classifier at a time


def digest(*tensors: Tensor) -> str:
    """sha256 of the tensors' bytes, in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class Extractor(nn.Module):
    """(N, C, S, S) float32 in [-1, 1], on the CPU -> features (N, num_features), on the CPU.

    `name` stands beside every FID. `keep` says that the name determines the features, so that statistics of real
    images may be kept on disk under it; `part` is how many images it is given at a time.
    """

    num_features: int
    name = "untrained"
    keep = True
    part = PART

    def about(self) -> str:
        """What there is to say of it in one line."""
        return f"feature extractor {self.name}: {self.num_features} features"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
