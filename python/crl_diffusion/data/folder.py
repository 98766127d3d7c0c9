"""Reader of a folder of images with one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crl_diffusion.data import cache
from crl_diffusion.data.dataset import Dataset
from crl_diffusion.data.images import resize
from crl_diffusion.errors import OptionError

DECODED_AT_ONCE = 512  # image files


def read_folder(root: Path, size: int) -> Dataset:
    """Any tree of image files. The name of the data set has a digest of the files, so different trees differ in it."""
    if not (root / "train").is_dir():
        raise OptionError(
            f"--data folder: there is no folder 'train' in {str(root)!r}; expected image files train/CLASS/* and "
            f"test/CLASS/* there, or val instead of test; point --data-root at the folder that holds both"
        )
    tree = ImageTree(root, "--data folder")
    files = [file for part in tree.parts.values() for file, _ in part]
    return tree.read(f"folder-{root.resolve().name}-{cache.digest(root, files, with_times=False)[:8]}", size)


class ImageTree:
    """train/CLASS/* and test/CLASS/*, or val/CLASS/*: image files whose classes are numbered in alphabetical order."""

    def __init__(self, root: Path, option: str) -> None:
        self.root, self.option = root, option
        held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
        if held_out is None:
            raise OptionError(
                f"{option}: there is no folder 'test' or 'val' in {str(root)!r}; expected held-out images there, in "
                "folders named as those in 'train'"
            )
        self.classes, train = self._list(root / "train")
        test_classes, test = self._list(root / held_out)
        if self.classes != test_classes:
            differ = sorted(set(self.classes) ^ set(test_classes))
            raise OptionError(
                f"{option}: 'train' and {held_out!r} in {str(root)!r} must hold the same classes, but only one of them "
                f"has {in_words(differ)}"
            )
        self.parts = {"train": train, "test": test}

    def _list(self, folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
        from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

        try:
            names, numbers = find_classes(str(folder))
            files = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        except FileNotFoundError:
            raise OptionError(
                f"{self.option}: {str(folder)!r} holds no folders; expected one for each class, with its images in it"
            ) from None
        empty = sorted(set(range(len(names))) - {label for _, label in files})
        if empty:
            raise OptionError(
                f"{self.option}: there are no images of {in_words([names[c] for c in empty])} in {str(folder)!r}; "
                f"expected files that end in {', '.join(IMG_EXTENSIONS)}: add some, or delete the empty folders"
            )
        return tuple(names), files

    def read(self, name: str, size: int) -> Dataset:
        files = [file for part in self.parts.values() for file, _ in part]
        train, test = cache.decoded(name, self.root, files, size, partial(self._decode, size))
        return Dataset(name, len(self.classes), train, test, self.classes)

    def _decode(self, size: int, part: str) -> cache.Chunks:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without the interpreter's lock
            for chunk in _chunks(self.parts[part], DECODED_AT_ONCE):
                pixels = list(threads.map(lambda entry: self._square(entry[0], size), chunk))
                yield torch.cat(pixels), torch.tensor([label for _, label in chunk])

    def _square(self, file: str, size: int) -> Tensor:
        """The largest square in the middle, (1, 3, S, S): each pixel the mean of the area that it covers or, where the
        square is smaller than that, bicubic interpolation."""
        from PIL import Image

        try:
            with Image.open(file) as opened:
                if opened.mode.startswith(("I", "F")):  # 16 or 32 bits, which Pillow cuts off at 255
                    raise ValueError(f"Pillow's mode {opened.mode}: save it with 8 bits a channel")
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise OptionError(
                f"{self.option}: the image {file!r} cannot be read ({error}); replace it, or delete it"
            ) from error
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side < size:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        # Not Pillow's mean over areas: it rounds twice, after columns and after rows, halves upwards both times.
        return resize(torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0), size)


def _chunks(items: Sequence[Any], n: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, n)):
        yield chunk


def in_words(names: Sequence[str]) -> str:
    """The first twelve names and the number of the others: "a, b and c"."""
    words = list(names[:12]) + ([f"{len(names) - 12} more"] if len(names) > 12 else [])
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
