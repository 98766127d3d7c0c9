"""Sizes of the networks, without torch: for checks and for `crl-diffusion list`."""

from __future__ import annotations

from dataclasses import dataclass

from crl_diffusion.config.settings import RunConfig
from crl_diffusion.errors import OptionError


@dataclass(frozen=True)
class MLPSize:
    """Sizes of one residual multilayer perceptron (MLP), which reads all pixels at once."""

    width: int  # of every hidden layer
    blocks: int  # residual blocks, each with two layers


@dataclass(frozen=True)
class UNetSize:
    """Sizes of one UNet. Each level halves the resolution of the one before; level 0 is the highest."""

    channels: tuple[int, ...]  # of each level
    layers: int  # residual blocks in each level
    groups: int  # of the group norms
    attention: tuple[int, ...] | None  # levels with self-attention, besides the middle block; None: no attention at all


# The small networks have no attention: on one CPU thread and 8 to 16 pixels it costs more time than it gains quality.
MODELS: dict[str, UNetSize | MLPSize] = {
    "mlp": MLPSize(112, 3),
    "mini": UNetSize((16, 32), 1, 8, None),
    "tiny": UNetSize((24, 48), 1, 8, None),
    "small": UNetSize((64, 128), 1, 16, None),
    "paper": UNetSize((128, 256, 256, 256), 2, 32, (1,)),  # 35.7 M, as google/ddpm-cifar10-32
}


def require_size(config: RunConfig) -> None:
    """OptionError unless the image size of a resolved configuration can be halved once for each level of the model."""
    size, model = config.image_size, MODELS[config.model]
    halvings = len(model.channels) - 1 if isinstance(model, UNetSize) else 0
    if size % 2**halvings:
        raise OptionError(
            f"--image-size is {size}, and --model {config.model} halves images {halvings} time(s); choose a multiple "
            f"of {2**halvings}, or another model"
        )
