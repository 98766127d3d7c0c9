"""Which images of a folder without a test part are held out: one in five of each class, by a hash of their names.

The choice depends on nothing but the names in a class and which files are the same: neither on a seed nor on the order
of files, so all runs hold out the same images. Files with the same content, and links to one file, are one image: they
come to the same part, also if they lie in two classes.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from crl_diffusion.errors import OptionError, in_words
from crl_diffusion.files import file_digest

HELD_OUT = 5  # one image in so many
LEAST_HELD_OUT = 2  # a covariance needs two images
Entry = tuple[str, int]  # path of an image, number of its class


def split(files: Sequence[Entry], folder: str, classes: Sequence[str], option: str) -> tuple[list[Entry], list[Entry]]:
    """The images to train on and those to hold out, both in their original order. OptionError if a class is too small
    for both parts."""
    images = same_images([file for file, _ in files])
    of_class: list[dict[int, bytes]] = [{} for _ in classes]  # the smallest hash of each image's names
    for (file, label), image in zip(files, images, strict=True):
        key = _hash(os.path.relpath(file, folder))
        of_class[label][image] = min(key, of_class[label].get(image, key))
    held_out: dict[int, bool] = {}
    for keys in of_class:
        wanted = max(LEAST_HELD_OUT, round(len(keys) / HELD_OUT)) - sum(held_out.get(image, False) for image in keys)
        for image in sorted(keys, key=lambda image: keys[image]):
            if image not in held_out:
                held_out[image] = wanted > 0
                wanted -= 1
    parts = [[entry for entry, image in zip(files, images, strict=True) if held_out[image] == test] for test in (0, 1)]
    for part, least in zip(parts, (1, LEAST_HELD_OUT), strict=True):
        counts = Counter(label for _, label in part)
        if small := [name for label, name in enumerate(classes) if counts[label] < least]:
            raise OptionError(
                f"{option}: there are too few images of {in_words(small)} in {folder!r}: without a folder 'test' each "
                f"class needs {1 + LEAST_HELD_OUT} different ones, {LEAST_HELD_OUT} of them to hold out; add some, or "
                "move these folders elsewhere"
            )
    return parts[0], parts[1]


def same_images(files: Sequence[str]) -> list[int]:
    """A number for each file; files have the same one if they are one file, or equal byte by byte."""
    numbers: dict[object, int] = {}
    identities: list[object] = []  # the file itself, whatever paths lead to it
    by_size: dict[int, set[object]] = defaultdict(set)
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            identities.append(file)
            continue
        identities.append((status.st_dev, status.st_ino))
        by_size[status.st_size].add(identities[-1])
    sizes = {identity: size for size, found in by_size.items() if len(found) > 1 for identity in found}
    contents: dict[object, object] = {}
    for file, identity in zip(files, identities, strict=True):
        if identity in sizes and identity not in contents:
            contents[identity] = _content(file) or identity
    return [numbers.setdefault(contents.get(identity, identity), len(numbers)) for identity in identities]


def _content(file: str) -> str | None:
    """sha256 of a file's content; None if it cannot be read."""
    try:
        return file_digest(file)
    except OSError:
        return None


def _hash(name: str) -> bytes:
    """The same on every system, whichever form of Unicode its names have, and in every locale."""
    in_utf8 = os.fsencode(name).decode("utf-8", "surrogateescape")
    composed = unicodedata.normalize("NFC", in_utf8.replace(os.sep, "/"))
    return hashlib.sha256(composed.encode("utf-8", "replace")).digest()
