"""Reader of downsampled ImageNet: archives of arrays or of pickled batches."""

from __future__ import annotations

import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from crl_diffusion.data import cache
from crl_diffusion.data.dataset import Dataset
from crl_diffusion.data.folder import standard_tree
from crl_diffusion.data.images import resize
from crl_diffusion.errors import OptionError, in_words, is_or_are

ARCHIVED_AT_ONCE = 10_000  # images of an archive
IMAGENET_SIDE, IMAGENET_CLASSES, IMAGENET_BATCHES = 32, 1000, 10


def read_imagenet32(root: Path, size: int) -> Dataset:
    """ImageNet-1k at 32 pixels: the official archives of downsampled images, pickled or npz, or a tree of image files.

    The archives number the classes 1 to 1000 in an order of their own (1 is n02119789, a kit fox), which is kept; a
    tree's classes are in alphabetical order (n01440764, a tench, is first). The official images are the whole
    photograph squeezed into a square, those of a tree are cropped. So the two are different data, and the tree is named
    imagenet32-tree.
    """
    for suffix in ("", ".npz"):
        train = [f"train_data_batch_{i}{suffix}" for i in range(1, IMAGENET_BATCHES + 1)]
        test = [f"val_data{suffix}"]
        kind = "_npz" if suffix else ""
        folders = [(root / f"Imagenet32_train{kind}", root / f"Imagenet32_val{kind}"), (root / "imagenet32",) * 2]
        for train_folder, test_folder in folders:
            files = [train_folder / name for name in train] + [test_folder / name for name in test]
            missing = [str(file.relative_to(root)) for file in files if not file.is_file()]
            if len(missing) == len(files):
                continue
            if missing:
                raise OptionError(
                    f"--data imagenet32: {in_words(missing)} {is_or_are(missing)} missing under {str(root)!r}; unpack "
                    "the official archives again, completely"
                )
            decode = partial(_archives, {"train": files[:-1], "test": files[-1:]}, size)
            copy = cache.decoded("imagenet32", root, list(map(str, files)), size, decode)
            return Dataset("imagenet32", IMAGENET_CLASSES, copy.train, copy.test)
    for tree in (root / "imagenet32", root / "imagenet"):
        if (tree / "train").is_dir():
            return standard_tree(tree, "--data imagenet32").read("imagenet32-tree", size)
    raise OptionError(
        f"--data imagenet32: no such data under {str(root)!r}; expected Imagenet32_train/train_data_batch_1 to _10 and "
        "Imagenet32_val/val_data, or Imagenet32_train_npz/train_data_batch_1.npz to _10.npz and Imagenet32_val_npz/"
        "val_data.npz, or image files imagenet32/train/CLASS/* and imagenet32/val/CLASS/*; the first two are the "
        "downsampled image data (32x32) of https://image-net.org/download-images, which asks for an account: unpack "
        "each archive into a folder of its name, and point --data-root at the folder that holds them"
    )


def _archives(parts: dict[str, list[Path]], size: int, part: str) -> cache.Chunks:
    """The images of the official batches, one batch in memory at a time; labels from 1 become labels from 0.

    Each batch is put into the order of its labels, so that a task's images lie together: what a task reads of the
    mapped copy is then its own 200 MB, not pages from all over 4 GB. Images of one class keep their order.
    """
    for file in parts[part]:
        try:
            entry = _npz(file) if file.suffix == ".npz" else _unpickled(file)
            data, labels = np.asarray(entry["data"]), np.asarray(entry["labels"])
            wanted = 3 * IMAGENET_SIDE**2
            if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != wanted:
                raise ValueError(f"data is {data.dtype} {data.shape}, expected uint8 (N, {wanted})")
            if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
                raise ValueError(f"labels are {labels.dtype} {labels.shape}, expected integers ({len(data)},)")
            if not len(data) or labels.min() < 1 or labels.max() > IMAGENET_CLASSES:
                span = f"{labels.min()} to {labels.max()}" if len(data) else "none"
                raise ValueError(f"labels are {span}, expected 1 to {IMAGENET_CLASSES}")
        except _DAMAGE as error:
            raise OptionError(
                f"--data imagenet32: {str(file)!r} is damaged or is not in the official format, a dictionary with data "
                f"and labels ({type(error).__name__}: {error}); unpack it again from the official archive"
            ) from error
        pixels = torch.from_numpy(data).view(-1, 3, IMAGENET_SIDE, IMAGENET_SIDE)
        numbers = torch.from_numpy(labels.astype(np.int64) - 1)
        for index in numbers.argsort(stable=True).split(ARCHIVED_AT_ONCE):
            yield resize(pixels[index], size), numbers[index]


_DAMAGE = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,  # an absurd length in a damaged pickle
    OSError,
    TypeError,
    UnicodeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def _npz(file: Path) -> dict[str, Any]:
    with np.load(file, allow_pickle=False) as entry:
        return {name: entry[name] for name in ("data", "labels")}


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists, strings, numbers and numpy arrays; a pickle that calls anything else is refused, since
    it could run any code."""

    names = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")
    modules = ("numpy", "numpy.core.multiarray", "numpy.core.numeric", "_codecs")

    def find_class(self, module: str, name: str) -> Any:
        if name in self.names and module.replace("numpy._core", "numpy.core") in self.modules:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(file: Path) -> dict[str, Any]:
    opened: IO[bytes]
    with open(file, "rb") as opened:
        entry = _ArraysOnly(opened, encoding="latin1").load()
    if not isinstance(entry, dict):
        raise ValueError(f"it holds a {type(entry).__name__}")
    return entry
