"""Models that per-sample gradients are measured on: noise prediction, loss_i = mean over pixels of the
squared error, images of 1 x 28 x 28.

    unet         1,036,737 parameters: GroupNorm, attention at 7 x 7, timestep and class embeddings, channels 32/64/128
    diffusers    diffusers' UNet2DModel as the reference trainer builds "small": 2,530,625 parameters, 64/128
    transformer  1,024,144 parameters: patches of 4 x 4, nn.MultiheadAttention, LayerNorm, a learned position
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.problem import Unavailable

CLASSES = 10
TIMESTEPS = 1000
SIZE = 28


def sinusoids(t: Tensor, width: int) -> Tensor:
    """(N, width): cosines and sines of t, (N,), at frequencies from 1 down to 1/10000."""
    frequency = torch.exp(torch.arange(width // 2, device=t.device) * (-9.21 / (width // 2)))
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Condition(nn.Module):
    """(N, width): a timestep's and a class's embeddings, added."""

    def __init__(self, frequencies: int, width: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES, width)

    def forward(self, t: Tensor, label: Tensor) -> Tensor:
        frequencies = sinusoids(t, self.frequencies).to(self.label.weight.dtype)
        return self.time(frequencies) + self.label(label)


class Residual(nn.Module):
    """Two normed 3 x 3 convolutions with the condition between them, beside a 1 x 1 one where the width changes."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, before), nn.Conv2d(before, after, 3, padding=1)
        self.condition = nn.Linear(condition, after)
        self.norm2, self.conv2 = nn.GroupNorm(8, after), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.condition(F.silu(condition))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over pixels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.GroupNorm(8, width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2]).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Three resolutions, one residual block at each on the way down and on the way up, attention at the lowest."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        a, b, c = widths
        condition = 4 * a
        self.condition = Condition(a, condition)
        self.first = nn.Conv2d(1, a, 3, padding=1)
        self.down1, self.shrink1 = Residual(a, a, condition), nn.Conv2d(a, a, 3, stride=2, padding=1)
        self.down2, self.shrink2 = Residual(a, b, condition), nn.Conv2d(b, b, 3, stride=2, padding=1)
        self.low1, self.attention, self.low2 = Residual(b, c, condition), Attention(c, 4), Residual(c, c, condition)
        self.grow2, self.up2 = nn.Conv2d(c, b, 3, padding=1), Residual(2 * b, b, condition)
        self.grow1, self.up1 = nn.Conv2d(b, a, 3, padding=1), Residual(2 * a, a, condition)
        self.norm, self.last = nn.GroupNorm(8, a), nn.Conv2d(a, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = self.condition(t, label)
        high = self.down1(self.first(x), condition)
        middle = self.down2(self.shrink1(high), condition)
        low = self.low2(self.attention(self.low1(self.shrink2(middle), condition)), condition)
        middle = self.up2(torch.cat([self.grow2(F.interpolate(low, scale_factor=2.0)), middle], dim=1), condition)
        high = self.up1(torch.cat([self.grow1(F.interpolate(middle, scale_factor=2.0)), high], dim=1), condition)
        return self.last(F.silu(self.norm(high)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches as tokens, a learned position for each, and the condition added to all of them."""

    def __init__(self, width: int = 128, depth: int = 5, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.condition = Condition(width // 4, width)
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.pixels = nn.LayerNorm(width), nn.Linear(width, patch * patch)
        self.fold = nn.Fold((SIZE, SIZE), patch, stride=patch)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position + self.condition(t, label)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.fold(self.pixels(self.norm(tokens)).transpose(1, 2))


class Diffusers(nn.Module):
    """The reference trainer's model, called as the others are."""

    def __init__(self, preset: str, shape: tuple[int, int, int] = (1, SIZE, SIZE)) -> None:
        super().__init__()
        try:
            from crl_diffusion.model import build
        except ModuleNotFoundError as error:
            raise Unavailable(f"not installed: {error}") from error
        self.unet = build(preset, shape, CLASSES, seed=0)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=label, return_dict=False)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "diffusers": lambda: Diffusers("small"),
    "transformer": Transformer,
}
# For tests: every kind of layer that the others have, in a few thousand parameters.
TINY: dict[str, Callable[[], nn.Module]] = {
    "unet-tiny": lambda: UNet((8, 8, 16)),
    "transformer-tiny": lambda: Transformer(16, 1, 2),
}
