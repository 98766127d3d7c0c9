"""Sizes of the networks, without torch: for checks and lists."""

from __future__ import annotations

from dataclasses import dataclass

from crl_diffusion.config.settings import RunConfig
from crl_diffusion.errors import OptionError


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


def require_size(config: RunConfig) -> None:
    """Refuse images that the model's resolutions do not halve evenly."""
    size, halvings = config.image_size, len(MODELS[config.model].channels) - 1
    if size % 2**halvings:
        raise OptionError(
            f"--image-size is {size}, and --model {config.model} halves images {halvings} time(s); choose a multiple "
            f"of {2**halvings}, or another model"
        )
