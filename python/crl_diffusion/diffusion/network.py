"""Label-conditioned networks: diffusers' UNet2DModel or an MLP, and the one way in which they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from crl_diffusion.config.networks import MODELS, MLPSize
from crl_diffusion.diffusion.mlp import ResidualMLP
from crl_diffusion.diffusion.noising import stream


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A new model for images of `shape` (C, S, S). Equal seeds give equal weights, whatever ran before."""
    preset = MODELS[name]
    c, size, _ = shape
    if isinstance(preset, MLPSize):
        with seeded(seed, "weights"):
            return ResidualMLP(shape, classes, preset)
    from diffusers import UNet2DModel  # takes seconds to import; an MLP does without

    attended = [level in (preset.attention or ()) for level in range(len(preset.channels))]
    with seeded(seed, "weights"):
        return cast(
            nn.Module,
            UNet2DModel(
                sample_size=size,
                in_channels=c,
                out_channels=c,
                block_out_channels=preset.channels,
                layers_per_block=preset.layers,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attended),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)),
                norm_num_groups=preset.groups,
                add_attention=preset.attention is not None,
                num_class_embeds=classes,
            ),
        )


def sizes(name: str, weights: Mapping[str, Tensor], image_size: int) -> tuple[tuple[int, int, int], int]:
    """The shape (C, S, S) and the number of classes that `build` was given for a model with these weights."""
    if isinstance(MODELS[name], MLPSize):
        channels = weights["first.weight"].shape[1] // image_size**2
        return (channels, image_size, image_size), len(weights["label_embedding.weight"])
    return (weights["conv_in.weight"].shape[1], image_size, image_size), len(weights["class_embedding.weight"])


@contextmanager
def seeded(seed: int, purpose: str, task: int = 0) -> Iterator[None]:
    """Initial weights come from PyTorch's global generator: here it has the stream of that name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, purpose, task).initial_seed())
        yield


def predict(model: Callable[..., Any], noised: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Predicted noise, (B, C, S, S), for noised images (B, C, S, S), timesteps (B,) and labels (B,); in the dtype of
    the images, also under autocast."""
    prediction: Tensor = model(noised, t, class_labels=label, return_dict=False)[0]
    return prediction.to(noised.dtype)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher: the model as it is now, which nothing trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)
