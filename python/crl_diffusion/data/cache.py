"""Decoded copies on disk of data sets that are too large, or too slow to decode, for every run: made once, then mapped.

A copy is a folder <name>-<size>px-<key> in a folder .crl-diffusion beside the files that it was made from or, if
that cannot be written to, in the user's cache folder. It holds, for the parts train and test, <part>.pixels, uint8
(N, 3, S, S), and <part>.labels, int64 (N,), raw and in the machine's byte order, and about.json. The key is a digest
of the names, sizes and times of modification of all files that it was made from and of how they were read, so a changed
data set or another reader gets a new copy; old ones may be deleted.

One process at a time writes the folder under another name, syncs it and renames it: a copy under its final name is
complete. Pixels are mapped into memory, privately: processes share them, only the pages in use are read, and nothing
can change the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crl_diffusion.data.images import Images
from crl_diffusion.errors import OptionError
from crl_diffusion.files import locked, sync_folder, write_json

FORMAT = 1  # of the copies; part of the key
COPIES = ".crl-diffusion"
PARTS = ("train", "test")
PROGRESS_EVERY = 30.0  # seconds between two lines about a copy that is being made

Chunks = Iterator[tuple[Tensor, Tensor]]  # pixels, uint8 (n, 3, S, S); labels, int64 (n,)


class Decoded(NamedTuple):
    """The training and the test part of a data set, mapped, and what its reader has found out while it decoded them."""

    train: Images
    test: Images
    findings: dict[str, Any]


def digest(root: Path, files: Sequence[str], with_times: bool) -> str:
    """Digest of the names in `root`, the sizes and, if asked for, the times of files; their contents are not read."""
    # Strings, since ImageNet has 1.3 million files: with Path objects a listing took five times as long.
    sha256, prefix = hashlib.sha256(), os.path.join(root, "")
    for file in files:
        try:
            status = os.stat(file)
            length, time_ns = status.st_size, status.st_mtime_ns if with_times else 0
        except OSError:  # the reader says so
            length, time_ns = -1, 0
        sha256.update(os.fsencode(file.removeprefix(prefix)) + f"\0{length}\0{time_ns}\n".encode())
    return sha256.hexdigest()


def decoded(
    name: str,
    root: Path,
    files: Sequence[str],
    size: int,
    decode: Callable[[str], Chunks],
    way: str = "",
    findings: Callable[[], dict[str, Any]] = dict,
) -> Decoded:
    """A data set, mapped from its decoded copy; `decode(part)` is only called if there is none yet, and `findings()`
    when both parts are decoded. What it returns is kept in about.json. `way` names what else than the files decides the
    pixels."""
    listing = f"{FORMAT} {sys.byteorder} {root.resolve()} {digest(root, files, with_times=True)}{way}"
    key = hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]
    folder = home(root) / f"{name}-{size}px-{key}"
    made_earlier = root / COPIES / folder.name  # readable, even where nothing can be added
    if made_earlier.is_dir():
        folder = made_earlier
    if not folder.is_dir():
        try:
            _make(folder, name, size, decode, findings)
        except OSError as error:
            raise OptionError(
                f"the decoded copy of {name} cannot be written to {str(folder.parent)!r} ({error}); it takes "
                f"{3 * size**2:,} bytes an image: make room there, or name a folder that can be written to in the "
                "environment variable XDG_CACHE_HOME, and give the same command again"
            ) from error
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        train, test = (_mapped(folder / part, about["images"][part], size) for part in PARTS)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise OptionError(
            f"the decoded copy {str(folder)!r} is damaged ({error}); delete it, and it is made anew"
        ) from error
    return Decoded(train, test, about.get("findings", {}))


def home(root: Path) -> Path:
    """The folder of all copies: beside the original files or, if that is read-only, in the user's cache folder."""
    inside = root / COPIES
    if os.access(inside if inside.is_dir() else root, os.W_OK):
        return inside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crl-diffusion"


def _make(
    folder: Path, name: str, size: int, decode: Callable[[str], Chunks], findings: Callable[[], dict[str, Any]]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".lock"):
        if folder.is_dir():  # another process was faster
            return
        print(f"decoding {name} at {size} pixels, once, into {folder}", file=sys.stderr, flush=True)
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        counts = {part: _write(unfinished / part, decode(part)) for part in PARTS}
        try:
            about = {"name": name, "size": size, "images": counts, "findings": findings()}
        except OptionError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        write_json(unfinished / "about.json", about)
        sync_folder(unfinished)
        os.rename(unfinished, folder)
        sync_folder(folder.parent)


def _write(part: Path, chunks: Chunks) -> int:
    """Append chunks as they come, so that no more than one is in memory. Returns the number of images."""
    count, reported = 0, time.monotonic()
    with open(part.with_suffix(".pixels"), "wb") as pixels_file, open(part.with_suffix(".labels"), "wb") as labels_file:
        for pixels, labels in chunks:
            pixels_file.write(pixels.contiguous().numpy().data)
            labels_file.write(labels.contiguous().numpy().data)
            count += len(labels)
            if time.monotonic() - reported > PROGRESS_EVERY:
                print(f"{count:,} {part.name} images decoded", file=sys.stderr, flush=True)
                reported = time.monotonic()
        for file in (pixels_file, labels_file):
            file.flush()
            os.fsync(file.fileno())
    return count


def _mapped(part: Path, count: int, size: int) -> Images:
    for suffix, wanted in ((".pixels", count * 3 * size**2), (".labels", count * 8)):
        file = part.with_suffix(suffix)
        if file.stat().st_size != wanted:
            raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, expected {wanted:,}")
    if not count:  # the system maps no empty file
        return Images(torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    # shared=False maps the file privately and read-only on disk: a stray write would not reach it.
    pixels = torch.from_file(
        str(part.with_suffix(".pixels")), shared=False, size=count * 3 * size**2, dtype=torch.uint8
    )
    labels = torch.from_file(str(part.with_suffix(".labels")), shared=False, size=count, dtype=torch.int64)
    return Images(pixels.view(count, 3, size, size), labels.clone())
