"""One image file to pixels: which formats are read, the right way up, transparency on white, how large it may be."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from crl_diffusion.data.images import resize

if TYPE_CHECKING:
    from PIL import Image

RULES = 2  # of this file; part of the key of decoded copies. 1: orientation and transparency were ignored
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".jfif", ".heic", ".heif", ".avif"),
)
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # MPO: a JPEG of some cameras
ANIMATED = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
LARGEST = 2**26  # pixels, 8192 x 8192: 256 MiB, as Pillow keeps them, and three times that with transparency
LARGE = 2**24  # pixels; larger images are decoded by one thread, one at a time
BANDED = 2**20  # pixels of a square; of larger ones, one row of means is computed at a time


class Picture(NamedTuple):
    pixels: Tensor  # uint8 (1, 3, S, S)
    animated: bool  # the file has several frames or pages, of which this is the first


class Unreadable(Exception):
    """An image file that cannot be read; the text says why."""


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that can be read here: HEIF needs the package pillow-heif, AVIF a Pillow that has it."""
    from PIL import Image

    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_square(file: str, size: int) -> Picture:
    """The largest square in the middle, scaled to `size`: each pixel the mean of the area that it covers or, where the
    square is smaller than that, bicubic interpolation. Unreadable says why a file has no pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats()) as opened:
            if opened.width * opened.height > LARGE:
                return _thread_of_large_images(os.getpid()).submit(_decode, opened, size).result()
            return _decode(opened, size)
    except UnidentifiedImageError:
        raise Unreadable(_unidentified(file)) from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {LARGEST:,} pixels: save it smaller") from None
    except OSError as error:
        raise Unreadable(error.strerror or _one_line(error)) from error
    except Unreadable:
        raise
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise Unreadable(_one_line(error) or type(error).__name__) from error


@cache
def _thread_of_large_images(process: int) -> ThreadPoolExecutor:
    """One thread: each thread of a process keeps the memory that it has freed, so that others would take as much."""
    return ThreadPoolExecutor(1)


def _decode(image: Image.Image, size: int) -> Picture:
    _limit(image, size)
    return Picture(_square(_on_white(_upright(image)), size), _is_animated(image))


def _limit(image: Image.Image, size: int) -> None:
    """Unreadable if an image has too many bits or pixels. A JPEG that is too large is decoded at a half, a quarter or
    an eighth of its size."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which Pillow cuts off at 255
        raise Unreadable(f"Pillow's mode {image.mode}: save it with 8 bits a channel")
    width, height = image.size
    if width * height > LARGEST:
        side = min(width, height)
        image.draft(None, (max(1, width * size // side), max(1, height * size // side)))  # only JPEG has an effect
    if image.width * image.height > LARGEST:
        raise Unreadable(f"{width:,} x {height:,} pixels, more than {LARGEST:,} in all: save it smaller")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say. ImageOps.exif_transpose would also write new EXIF data, and fail at damaged ones."""
    from PIL import ExifTags
    from PIL.Image import Transpose

    image.load()  # a PNG may have its EXIF data behind its pixels; TIFF and HEIF are turned by that
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data
        return image
    turned = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turned is None else image.transpose(turned)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, composited on white where the image has an alpha channel, a transparent colour or a palette with alpha."""
    from PIL import Image

    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _square(image: Image.Image, size: int) -> Tensor:
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2

    def rows(first: int, end: int) -> Tensor:
        """Some rows of the square, uint8 (1, 3, rows, side)."""
        part = image.crop((left, top + first, left + side, top + end))
        return torch.from_numpy(np.array(part)).permute(2, 0, 1).unsqueeze(0)

    if side**2 > BANDED and side >= size:  # as floats, an image takes four times its bytes
        means = torch.empty(1, 3, size, size)
        for i in range(size):
            band = rows(i * side // size, -(-(i + 1) * side // size))
            means[:, :, i : i + 1] = functional.interpolate(band.float(), size=(1, size), mode="area")
        return means.round().byte()
    if side < size:
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        left, top, side = 0, 0, size
    # Not Pillow's mean over areas: it rounds twice, after columns and after rows, halves upwards both times.
    return resize(rows(0, side), size)


def _is_animated(image: Image.Image) -> bool:
    try:
        return image.format in ANIMATED and getattr(image, "is_animated", False)
    except Exception:  # the second frame is damaged; the first was read
        return True


def _unidentified(file: str) -> str:
    """Why Pillow does not know a file's format, from its first bytes."""
    with open(file, "rb") as opened:
        head = opened.read(12)
    if not head:
        return "the file is empty"
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1") and "HEIF" not in formats():
        return "HEIF: pip install pillow-heif"
    if brand == b"avif" and "AVIF" not in formats():
        return "AVIF: pip install --upgrade pillow"
    return "no image, or in another format than JPEG, PNG, WebP, GIF, TIFF, BMP, PPM, HEIF and AVIF"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
