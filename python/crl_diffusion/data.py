"""Data sets in memory, and their class-incremental tasks.

Images are uint8 (N, C, S, S), 0 to 255, everywhere outside the network; `to_float` maps them to [-1, 1].
Every data set has a training part and a held-out test part; FIDs are computed against the latter only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crl_diffusion.method import OptionError, RunConfig, planned, task_classes


class Images(NamedTuple):
    """Images, uint8 (N, C, S, S), and their labels, int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def of(self, classes: Sequence[int]) -> Images:
        """Those of the given classes, in their original order."""
        kept = torch.isin(self.labels, torch.tensor(classes))
        return Images(self.pixels[kept], self.labels[kept])


@dataclass(frozen=True)
class Task:
    """Some classes and their images; `held_out` are those that evaluations compare with."""

    index: int
    classes: tuple[int, ...]
    train: Images
    validation: Images
    held_out: Images


@dataclass(frozen=True)
class Data:
    """A data set at one image size, and its first tasks."""

    name: str
    classes: int
    train: Images
    test: Images
    tasks: tuple[Task, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of one image."""
        _, c, h, w = self.train.pixels.shape
        return c, h, w


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0 .. 255 -> [-1, 1]."""
    return pixels.to(dtype) / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0 .. 255; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _digits(root: Path) -> tuple[Images, Images]:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16. Of each class every third image is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        held_out[torch.nonzero(labels == c).flatten()[2::3]] = True
    return Images(pixels[~held_out], labels[~held_out]), Images(pixels[held_out], labels[held_out])


def _torchvision(class_name: str, option: str) -> Callable[[Path], tuple[Images, Images]]:
    def load(root: Path) -> tuple[Images, Images]:
        from torchvision import datasets

        kind = getattr(datasets, class_name)
        try:
            parts = [kind(str(root), train=train, download=False) for train in (True, False)]
        except RuntimeError as error:
            raise OptionError(
                f"--data {option}: no such data under {str(root / class_name / 'raw')!r}; expected the files "
                "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte "
                f"there; point --data-root at the folder that holds {class_name}/raw, or download them once with: "
                f'python -c "from torchvision.datasets import {class_name} as D; D({str(root)!r}, download=True)"'
            ) from error
        train, test = (Images(part.data.unsqueeze(1), part.targets.long()) for part in parts)
        return train, test

    return load


class Preset(NamedTuple):
    """How a data set is read, the image sizes that it offers, and that every n-th training image can validate."""

    load: Callable[[Path], tuple[Images, Images]]
    sizes: tuple[int, ...]
    validation_every: int = 12


DATASETS: dict[str, Preset] = {
    "digits": Preset(_digits, (8,), validation_every=4),
    "mnist": Preset(_torchvision("MNIST", "mnist"), (16, 32)),
    "fashion_mnist": Preset(_torchvision("FashionMNIST", "fashion_mnist"), (16, 32)),
}


def _resize(images: Images, size: int) -> Images:
    """Smaller: the mean over areas. Larger: a black border, as the paper does for 28 -> 32."""
    side = images.pixels.shape[-1]
    if size < side:
        pixels = functional.interpolate(images.pixels.float(), size=(size, size), mode="area").round().to(torch.uint8)
        return Images(pixels, images.labels)
    before, after = (size - side) // 2, size - side - (size - side) // 2
    return Images(functional.pad(images.pixels, (before, after, before, after)), images.labels)


def _is_validation(labels: Tensor, every: int) -> Tensor:
    """Every n-th image of each class, (N,) bool."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        chosen[torch.nonzero(labels == c).flatten()[every - 1 :: every]] = True
    return chosen


def load(config: RunConfig, root: Path) -> Data:
    """Read a run's data set; `root` is only used by sets kept on disk.

    Validation images are taken from the training part, and only for runs that use them.
    """
    config = planned(config)
    preset = DATASETS[config.data]
    if config.image_size not in preset.sizes:
        offered = " or ".join(map(str, preset.sizes))
        raise OptionError(
            f"--image-size is {config.image_size}, but {config.data} comes in {offered} pixels; choose one of these"
        )
    train, test = (_resize(part, config.image_size) for part in preset.load(root))
    validation = Images(train.pixels[:0], train.labels[:0])
    if "validation" in (config.held_out, config.fisher_images):
        chosen = _is_validation(train.labels, preset.validation_every)
        validation = Images(train.pixels[chosen], train.labels[chosen])
        train = Images(train.pixels[~chosen], train.labels[~chosen])
    held_out = validation if config.held_out == "validation" else test
    split = tuple(Task(i, c, train.of(c), validation.of(c), held_out.of(c)) for i, c in enumerate(task_classes(config)))
    return Data(config.data, int(train.labels.max()) + 1, train, test, split)
