"""A label-conditioned residual multilayer perceptron (MLP) for small images, called as diffusers' UNet2DModel is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crl_diffusion.config.networks import MLPSize
from crl_diffusion.diffusion.noising import TIMESTEPS


def sinusoids(width: int) -> Tensor:
    """(T, width): sines, then cosines, of timesteps times frequencies from 1 down to 1/10,000, in geometric steps."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2 - 1))
    angles = torch.arange(TIMESTEPS)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """hidden + second(silu(first(norm(hidden + embedding))))"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        change: Tensor = self.second(nn.functional.silu(self.first(self.norm(hidden + embedding))))
        return hidden + change


class ResidualMLP(nn.Module):
    """Predicts the noise of an image of `shape` (C, S, S), from the image, its timestep and its label.

    The image, as one vector, passes residual blocks that each see an embedding of timestep and label. The input is
    added to the output with a factor that depends on that embedding: hidden layers are narrower than an image of 16
    pixels, and would lose most of its noise.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, size: MLPSize) -> None:
        super().__init__()
        pixels, width = math.prod(shape), size.width
        self.register_buffer("sinusoids", sinusoids(width), persistent=False)
        self.time_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(classes, width)
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, pixels)
        self.factor = nn.Linear(width, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Images (B, C, S, S), timesteps (B,), labels (B,) -> the predicted noise, (B, C, S, S), in a tuple."""
        x = sample.flatten(1)
        embedding = self.time_embedding(self.sinusoids[timestep]) + self.label_embedding(class_labels)
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        noise: Tensor = self.last(self.norm(hidden)) + self.factor(embedding) * x
        return (noise.view_as(sample),)
