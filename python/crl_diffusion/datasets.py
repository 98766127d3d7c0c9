"""Data sets as they lie on disk: what each consists of, how it is read, and what is said when it is missing or damaged.

A reader takes the data root and an image size and returns a `Source`. Small sets are read into memory; folders of image
files and the archives of downsampled ImageNet are decoded once and mapped, see `cache.py`.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crl_diffusion import cache
from crl_diffusion.images import Images, rank_in_class, resize
from crl_diffusion.method import OptionError

DECODED_AT_ONCE, ARCHIVED_AT_ONCE = 512, 10_000  # image files; images of an archive
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_SIDE, IMAGENET_CLASSES, IMAGENET_BATCHES = 32, 1000, 10


class Source(NamedTuple):
    """A data set at one image size. `name` tells variants apart whose images, and so whose FIDs, differ."""

    name: str
    classes: int
    train: Images
    test: Images


class Preset(NamedTuple):
    """How a data set is read, the image sizes that it offers, and that every n-th training image can validate."""

    read: Callable[[Path, int], Source]  # data root, image size
    sizes: tuple[int, ...]  # none: any
    validation_every: int = 12


def _in_memory(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], size: int) -> Source:
    """From the pixels, uint8 (N, C, S, S), and labels of both parts; ten classes."""
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    return Source(
        name, 10, Images(resize(train_pixels, size), train_labels), Images(resize(test_pixels, size), test_labels)
    )


def _digits(root: Path, size: int) -> Source:
    """scikit-learn's 1,797 digits of 8x8 pixels, 0 to 16. Of each class every third image is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = rank_in_class(labels) % 3 == 2
    return _in_memory("digits", (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out]), size)


def _mnist(class_name: str, option: str) -> Callable[[Path, int], Source]:
    """MNIST, or a set in its format, through torchvision."""
    needed = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]

    def read(root: Path, size: int) -> Source:
        from torchvision import datasets

        folder = root / class_name / "raw"
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise OptionError(
                f"--data {option}: no such data under {str(folder)!r}; expected the files {_listed(needed)} there, of "
                f"which {_listed(missing)} {_are(missing)} missing; point --data-root at the folder that holds "
                f"{class_name}/raw, or download them once with: "
                f'python -c "from torchvision.datasets import {class_name} as D; D({str(root)!r}, download=True)"'
            )
        try:
            kind = getattr(datasets, class_name)
            parts = [kind(str(root), train=train, download=False) for train in (True, False)]
            train, test = ((part.data.unsqueeze(1), part.targets.long()) for part in parts)
            for pixels, labels in (train, test):
                if len(pixels) != len(labels) or pixels.shape[1:] != (1, 28, 28) or not 0 <= _highest(labels) < 10:
                    raise ValueError(f"{len(pixels)} images, {len(labels)} labels")
        except (AssertionError, EOFError, IndexError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise OptionError(
                f"--data {option}: the files in {str(folder)!r} are damaged ({error}); delete the folder "
                f"{str(root / class_name)!r} and download them anew with: "
                f'python -c "from torchvision.datasets import {class_name} as D; D({str(root)!r}, download=True)"'
            ) from error
        return _in_memory(option, train, test, size)

    return read


def _cifar10(root: Path, size: int) -> Source:
    """CIFAR-10 through torchvision, or, named cifar10-jpeg, a JPEG copy of it. JPEG changes the images: FIDs to the
    copy are not FIDs to CIFAR-10."""
    archive, copy = root / "cifar-10-batches-py", root / "cifar10_jpeg"
    if archive.is_dir():
        train, test = _cifar10_batches(root, archive)
        return _in_memory("cifar10", train, test, size)
    if copy.is_dir():
        tree = _Tree(copy, "--data cifar10")
        if tree.classes != CIFAR10_CLASSES:
            raise OptionError(
                f"--data cifar10: the folders in {str(copy / 'train')!r} are {_listed(tree.classes)}; expected "
                f"{_listed(CIFAR10_CLASSES)}"
            )
        return tree.read("cifar10-jpeg", size)
    raise OptionError(
        f"--data cifar10: no such data under {str(root)!r}; expected the folder cifar-10-batches-py with the files "
        "data_batch_1 to data_batch_5, test_batch and batches.meta in it, or, as a JPEG copy, cifar10_jpeg/train/CLASS/"
        f"*.jpg and cifar10_jpeg/test/CLASS/*.jpg with the classes {_listed(CIFAR10_CLASSES)}; point --data-root at "
        "the folder that holds one of them, or download the first once with: "
        f'python -c "from torchvision.datasets import CIFAR10 as D; D({str(root)!r}, download=True)"'
    )


def _cifar10_batches(root: Path, archive: Path) -> list[tuple[Tensor, Tensor]]:
    from torchvision import datasets

    kind = datasets.CIFAR10
    needed = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    missing = [name for name in needed if not (archive / name).is_file()]
    anew = (
        f"delete the folder {str(archive)!r} and download it anew with: "
        f'python -c "from torchvision.datasets import CIFAR10 as D; D({str(root)!r}, download=True)"'
    )
    if missing:
        raise OptionError(f"--data cifar10: {_listed(missing)} {_are(missing)} missing in {str(archive)!r}; {anew}")
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # a checksum differs
        raise OptionError(f"--data cifar10: files in {str(archive)!r} are damaged ({error}); {anew}") from error
    return [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    ]


def _imagenet32(root: Path, size: int) -> Source:
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
                    f"--data imagenet32: {_listed(missing)} {_are(missing)} missing under {str(root)!r}; unpack the "
                    "official archives again, completely"
                )
            decode = partial(_archives, {"train": files[:-1], "test": files[-1:]}, size)
            return Source(
                "imagenet32", IMAGENET_CLASSES, *cache.decoded("imagenet32", root, list(map(str, files)), size, decode)
            )
    for tree in (root / "imagenet32", root / "imagenet"):
        if (tree / "train").is_dir():
            return _Tree(tree, "--data imagenet32").read("imagenet32-tree", size)
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


def _folder(root: Path, size: int) -> Source:
    """Any tree of image files; its name tells its files apart from other trees', wherever they lie."""
    if not (root / "train").is_dir():
        raise OptionError(
            f"--data folder: there is no folder 'train' in {str(root)!r}; expected image files train/CLASS/* and "
            f"test/CLASS/* there, or val instead of test; point --data-root at the folder that holds both"
        )
    tree = _Tree(root, "--data folder")
    files = [file for part in tree.parts.values() for file, _ in part]
    return tree.read(f"folder-{root.resolve().name}-{cache.digest(root, files, with_times=False)[:8]}", size)


class _Tree:
    """train/CLASS/* and test/CLASS/*, or val/CLASS/*: image files whose classes are numbered in alphabetical order."""

    def __init__(self, root: Path, option: str) -> None:
        self.root, self.option = root, option
        held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
        if held_out is None:
            raise OptionError(
                f"{option}: there is no folder 'test' or 'val' in {str(root)!r}; expected held-out images there, in "
                "folders named as those in 'train'"
            )
        found = {part: self._list(root / name) for part, name in (("train", "train"), ("test", held_out))}
        (self.classes, train), (others, test) = found["train"], found["test"]
        if self.classes != others:
            differ = sorted(set(self.classes) ^ set(others))
            raise OptionError(
                f"{option}: 'train' and {held_out!r} in {str(root)!r} must hold the same classes, but only one of them "
                f"has {_listed(differ)}"
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
                f"{self.option}: there are no images of {_listed([names[c] for c in empty])} in {str(folder)!r}; "
                f"expected files that end in {', '.join(IMG_EXTENSIONS)}: add some, or delete the empty folders"
            )
        return tuple(names), files

    def read(self, name: str, size: int) -> Source:
        files = [file for part in self.parts.values() for file, _ in part]
        return Source(
            name, len(self.classes), *cache.decoded(name, self.root, files, size, partial(self._decode, size))
        )

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


def _highest(labels: Tensor) -> int:
    return int(labels.max()) if len(labels) else -1


def _listed(names: Sequence[str]) -> str:
    """At most twelve of them, in words."""
    shown = list(names[:12]) + ([f"{len(names) - 12} more"] if len(names) > 12 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


DATASETS: dict[str, Preset] = {
    "digits": Preset(_digits, (8,), validation_every=4),
    "mnist": Preset(_mnist("MNIST", "mnist"), (16, 32)),
    "fashion_mnist": Preset(_mnist("FashionMNIST", "fashion_mnist"), (16, 32)),
    "cifar10": Preset(_cifar10, (16, 32)),
    "imagenet32": Preset(_imagenet32, (16, 32)),
    "folder": Preset(_folder, ()),
}
