"""Readers of MNIST, FashionMNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crl_diffusion.data.dataset import Dataset, in_memory
from crl_diffusion.data.folder import standard_tree
from crl_diffusion.errors import OptionError, in_words, is_or_are

FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_mnist(class_name: str, option: str, class_names: tuple[str, ...] = ()) -> Callable[[Path, int], Dataset]:
    """MNIST, or a set in its format, through torchvision."""
    needed = [f"{part}-{array}-ubyte" for part in ("train", "t10k") for array in ("images-idx3", "labels-idx1")]

    def read(root: Path, size: int) -> Dataset:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        folder = root / class_name / "raw"
        missing = [name for name in needed if not (folder / name).is_file()]
        if missing:
            raise OptionError(
                f"--data {option}: no such data under {str(folder)!r}; expected the files {in_words(needed)} there, of "
                f"which {in_words(missing)} {is_or_are(missing)} missing; point --data-root at the folder that holds "
                f"{class_name}/raw, or download them once with: "
                f'python -c "from torchvision.datasets import {class_name} as D; D({str(root)!r}, download=True)"'
            )
        download = (
            f"delete the folder {str(root / class_name)!r} and download them anew with: "
            f'python -c "from torchvision.datasets import {class_name} as D; D({str(root)!r}, download=True)"'
        )
        arrays = []
        for name in needed:
            try:
                arrays.append((read_image_file if "images" in name else read_label_file)(str(folder / name)))
            except OSError as error:
                raise OptionError(
                    f"--data {option}: {str(folder / name)!r} cannot be read ({error.strerror}); make it readable, or "
                    f"{download}"
                ) from error
            except (AssertionError, EOFError, IndexError, RuntimeError, TypeError, ValueError) as error:
                why = str(error) or "not in the format of its name"
                raise OptionError(f"--data {option}: {str(folder / name)!r} is damaged ({why}); {download}") from error
        train, test = ((images.unsqueeze(1), labels.long()) for images, labels in (arrays[:2], arrays[2:]))
        for pixels, labels in (train, test):
            if len(pixels) != len(labels) or pixels.shape[1:] != (1, 28, 28) or not 0 <= _largest(labels) < 10:
                raise OptionError(
                    f"--data {option}: the files in {str(folder)!r} are damaged ({len(pixels)} images, {len(labels)} "
                    f"labels); {download}"
                )
        return in_memory(option, train, test, size)._replace(class_names=class_names)

    return read


def _largest(labels: Tensor) -> int:
    return int(labels.max()) if len(labels) else -1


def read_cifar10(root: Path, size: int) -> Dataset:
    """CIFAR-10 through torchvision, or, named cifar10-jpeg, a JPEG copy of it. JPEG changes the images: FIDs to the
    copy are not FIDs to CIFAR-10."""
    archive, copy = root / "cifar-10-batches-py", root / "cifar10_jpeg"
    if archive.is_dir():
        train, test = _cifar10_batches(root, archive)
        return in_memory("cifar10", train, test, size)._replace(class_names=CIFAR10_CLASSES)
    if copy.is_dir():
        tree = standard_tree(copy, "--data cifar10")
        if tree.classes != CIFAR10_CLASSES:
            raise OptionError(
                f"--data cifar10: the folders in {str(copy / 'train')!r} are {in_words(tree.classes)}; expected "
                f"{in_words(CIFAR10_CLASSES)}"
            )
        return tree.read("cifar10-jpeg", size)
    raise OptionError(
        f"--data cifar10: no such data under {str(root)!r}; expected the folder cifar-10-batches-py with the files "
        "data_batch_1 to data_batch_5, test_batch and batches.meta in it, or, as a JPEG copy, cifar10_jpeg/train/CLASS/"
        f"*.jpg and cifar10_jpeg/test/CLASS/*.jpg with the classes {in_words(CIFAR10_CLASSES)}; point --data-root at "
        "the folder that holds one of them, or download the first once with: "
        f'python -c "from torchvision.datasets import CIFAR10 as D; D({str(root)!r}, download=True)"'
    )


def _cifar10_batches(root: Path, archive: Path) -> list[tuple[Tensor, Tensor]]:
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = datasets.CIFAR10
    needed = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    missing = [name for name in needed if not (archive / name).is_file()]
    remedy = (
        f"delete the folder {str(archive)!r} and download it anew with: "
        f'python -c "from torchvision.datasets import CIFAR10 as D; D({str(root)!r}, download=True)"'
    )
    if missing:
        raise OptionError(
            f"--data cifar10: {in_words(missing)} {is_or_are(missing)} missing in {str(archive)!r}; {remedy}"
        )
    try:
        parts = [kind(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError as error:  # a checksum differs
        sums = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
        wrong = [name for name, md5 in sums if not check_integrity(str(archive / name), md5)]
        raise OptionError(
            f"--data cifar10: {in_words(wrong)} in {str(archive)!r} {is_or_are(wrong)} damaged; {remedy}"
        ) from error
    return [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
    ]
