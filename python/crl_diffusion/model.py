"""Label-conditioned UNets: presets of diffusers' UNet2DModel, and the one way in which they are called."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from crl_diffusion.diffusion import stream
from crl_diffusion.method import OptionError, RunConfig, planned


@dataclass(frozen=True)
class UNetPreset:
    """Widths of the resolutions, residual blocks at each, channels a group of the norms, and the resolutions, 0 being
    the highest, with self-attention beside the middle block's; None means none at all."""

    channels: tuple[int, ...]
    layers: int
    groups: int
    attention: tuple[int, ...] | None


# No attention in the small ones: on one CPU thread and 8 to 16 pixels it costs more time than it gives quality.
MODELS: dict[str, UNetPreset] = {
    "mini": UNetPreset((16, 32), 1, 8, None),
    "tiny": UNetPreset((24, 48), 1, 8, None),
    "small": UNetPreset((64, 128), 1, 16, None),
    "paper": UNetPreset((128, 256, 256, 256), 2, 32, (1,)),  # 35.7 M, as google/ddpm-cifar10-32
}


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A new model for images of `shape` (C, S, S). Equal seeds give equal weights, whatever ran before."""
    preset = MODELS[name]
    c, size, _ = shape
    attended = [level in (preset.attention or ()) for level in range(len(preset.channels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "weights").initial_seed())
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


def require_size(config: RunConfig) -> None:
    """Refuse images that the model's resolutions do not halve evenly."""
    size, halvings = planned(config).image_size, len(MODELS[config.model].channels) - 1
    if size % 2**halvings:
        raise OptionError(
            f"--image-size is {size}, and --model {config.model} halves images {halvings} time(s); choose a multiple "
            f"of {2**halvings}, or another model"
        )


def predict(model: nn.Module, noised: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Predicted noise, (B, C, S, S), for noised images (B, C, S, S), timesteps (B,) and labels (B,); in the dtype of
    the images, also under autocast."""
    prediction: Tensor = model(noised, t, class_labels=label, return_dict=False)[0]
    return prediction.to(noised.dtype)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher: the model as it is now, which nothing trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)
