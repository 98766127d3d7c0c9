"""Images as rows of a storage that many views share: an index makes a view, `take` copies a batch.

Images are uint8 (N, C, S, S), 0 to 255, everywhere outside the network; `to_float` maps them to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

RESIZED_AT_ONCE = 1000  # images; as float32 of 3 x 32 x 32 pixels, 12 MB


@dataclass(frozen=True)
class Images:
    """N images and their labels, int64 (N,).

    `storage` is uint8 (M, C, S, S), in memory or mapped from a file; image i is storage[rows[i]], or storage[i] where
    rows is None.
    """

    storage: Tensor
    labels: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S) of one image."""
        _, c, h, w = self.storage.shape
        return c, h, w

    @property
    def pixels(self) -> Tensor:
        """All images, uint8 (N, C, S, S); if `rows` is given, a copy in memory. To read a few, use `take`."""
        return self.storage if self.rows is None else self.storage[self.rows]

    def __getitem__(self, index: Tensor) -> Images:
        """A view of the images with these indices (K,) or this mask (N,); no pixels are copied."""
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        return Images(self.storage, self.labels[index], rows[index])

    def take(self, index: Tensor) -> Images:
        """The images with these indices (K,), read into memory."""
        rows = index if self.rows is None else self.rows[index]
        return Images(self.storage[rows], self.labels[index])

    def of_classes(self, classes: Sequence[int]) -> Images:
        """A view of the images of these classes, in their original order."""
        highest = max([*classes, int(self.labels.max()) if len(self) else 0])
        wanted = torch.zeros(highest + 1, dtype=torch.bool)
        wanted[list(classes)] = True
        return self[wanted[self.labels]]

    def batches(self, n: int) -> Iterator[Images]:
        """All images in order, at most n at a time in memory."""
        for index in torch.arange(len(self)).split(n):
            yield self.take(index)


def join(parts: Sequence[Images]) -> Images:
    """Concatenate images. Views of one storage stay a view; others are copied."""
    labels, storage = torch.cat([part.labels for part in parts]), parts[0].storage
    if any(part.storage is not storage for part in parts):
        return Images(torch.cat([part.pixels for part in parts]), labels)
    rows = [torch.arange(len(part)) if part.rows is None else part.rows for part in parts]
    return Images(storage, labels, torch.cat(rows))


def rank_in_class(labels: Tensor) -> Tensor:
    """For each image, the number of earlier images of its class, int64 (N,)."""
    if not len(labels):
        return torch.zeros_like(labels)
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[order] = torch.arange(len(labels)) - starts[labels[order]]
    return rank


def resize(pixels: Tensor, size: int) -> Tensor:
    """Resize square images to size x size pixels. Smaller images are means over areas; larger ones get a black border,
    as the rank-1 paper does for 28 -> 32."""
    side = pixels.shape[-1]
    if size == side:
        return pixels
    if size < side:
        small = torch.empty(*pixels.shape[:2], size, size, dtype=torch.uint8)
        for part, into in zip(pixels.split(RESIZED_AT_ONCE), small.split(RESIZED_AT_ONCE), strict=True):
            into.copy_(functional.interpolate(part.float(), size=(size, size), mode="area").round())
        return small
    before, after = (size - side) // 2, size - side - (size - side) // 2
    return functional.pad(pixels, (before, after, before, after))


def to_float(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 0 .. 255 -> [-1, 1]."""
    return pixels.to(dtype) / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0 .. 255; values outside are clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
