"""Decoded copies on disk of data sets that are too large, or too slow to decode, for every run: made once, then mapped.

A copy is a folder <name>-<size>px-<key> in a folder .crl-diffusion beside the files that it was made from or, if
that cannot be written to, in the user's cache folder. It holds, for the parts train and test, <part>.pixels, uint8
(N, 3, S, S), and <part>.labels, int64 (N,), raw and in the machine's byte order, and about.json. The key is a digest
of the names, sizes and times of modification of all files that it was made from and of how they were read, so a changed
data set or another reader gets a new copy; old ones may be deleted.

about.json has the SHA-256 digest of each file, taken from what was written. A file of up to `CHECKED` bytes is read and
checked whenever the copy is opened. A larger one, such as ImageNet's 4 GB of pixels, is checked if it is no longer the
file that was written, by its time of modification: what a disk changes in it by itself is not noticed. Copies of
earlier versions have no digests and are not checked.

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
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from crl_diffusion.data.images import Images
from crl_diffusion.errors import OptionError
from crl_diffusion.files import Row, file_digest, locked, refusal_of, sync_folder, write_json

FORMAT = 1  # of the copies; part of the key
COPIES = ".crl-diffusion"
PARTS = ("train", "test")
CHECKED = 2**28  # bytes of a file that is checked at each start, in a quarter of a second
PROGRESS_EVERY = 30.0  # seconds between two lines about a copy that is being made

Chunks = Iterator[tuple[Tensor, Tensor]]  # pixels, uint8 (n, 3, S, S); labels, int64 (n,)


class Decoded(NamedTuple):
    """The training and the test part of a data set, mapped, and what its reader has found out while it decoded them."""

    folder: Path  # of the copy
    train: Images
    test: Images
    findings: Any  # as JSON gives them back


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
    folder = root / COPIES / f"{name}-{size}px-{key}"
    if not os.path.isdir(folder):  # where it can be read even if nothing can be added
        folder = home(root) / folder.name
    if not os.path.isdir(folder):
        try:
            _make(folder, name, size, decode, findings)
        except OSError as error:
            raise OptionError(
                f"the decoded copy of {name} cannot be written to {str(folder.parent)!r} ({error}); it takes "
                f"{3 * size**2:,} bytes an image: make room there, or name a folder that can be written to in the "
                "environment variable XDG_CACHE_HOME, and give the same command again"
            ) from error
    try:
        about = _read_about(folder)
        written = about.get("files", {})
        train, test = (_mapped(folder / part, about["images"][part], size, written) for part in PARTS)
    except PermissionError as error:
        raise OptionError(
            f"the decoded copy {str(folder)!r} cannot be read ({error.strerror}); make its files readable for all who "
            "use these data, or delete it, and it is made anew"
        ) from error
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    return Decoded(folder, train, test, about.get("findings", {}))


def damaged(folder: Path, why: object) -> OptionError:
    return OptionError(f"the decoded copy {str(folder)!r} is damaged ({why}); delete it, and it is made anew")


def home(root: Path) -> Path:
    """The folder of all copies: beside the original files or, if that is read-only, in the user's cache folder."""
    inside = root / COPIES
    if refusal_of(inside if inside.is_dir() else root) is None:
        return inside
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crl-diffusion"
    except RuntimeError:  # a user without a home folder
        raise OptionError(
            f"{str(root)!r} cannot be written to, and there is no home folder for the decoded copy; name a folder in "
            "the environment variable XDG_CACHE_HOME"
        ) from None


def _make(
    folder: Path, name: str, size: int, decode: Callable[[str], Chunks], findings: Callable[[], dict[str, Any]]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / ".lock"):
        if folder.is_dir():  # another process was faster
            return
        _say(f"decoding {name} at {size} pixels, once, into {folder}")
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            counts, written = {}, {}
            for part in PARTS:
                counts[part], of_part = _write(unfinished / part, decode(part))
                written |= of_part
            about = {"name": name, "size": size, "images": counts, "findings": findings(), "files": written}
            write_json(unfinished / "about.json", about)
        except (OptionError, OSError):
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        sync_folder(unfinished)
        os.rename(unfinished, folder)
        sync_folder(folder.parent)


def _say(line: str) -> None:
    with suppress(OSError):  # a stderr that takes no more is no failure of the copy
        print(line, file=sys.stderr, flush=True)


def _write(part: Path, chunks: Chunks) -> tuple[int, dict[str, Row]]:
    """Append chunks as they come, so that no more than one is in memory. Returns the number of images and, by its name,
    how each file is known again."""
    count, reported, written = 0, time.monotonic(), {}
    with open(part.with_suffix(".pixels"), "wb") as pixels_file, open(part.with_suffix(".labels"), "wb") as labels_file:
        files = [(pixels_file, hashlib.sha256()), (labels_file, hashlib.sha256())]
        for chunk in chunks:
            for (file, sha256), values in zip(files, chunk, strict=True):
                content = values.flatten().numpy().data
                file.write(content)
                sha256.update(content)
            count += len(chunk[1])
            if time.monotonic() - reported > PROGRESS_EVERY:
                _say(f"{count:,} {part.name} images decoded")
                reported = time.monotonic()
        for file, sha256 in files:
            file.flush()
            os.fsync(file.fileno())
            time_ns = os.fstat(file.fileno()).st_mtime_ns
            written[Path(file.name).name] = {"sha256": sha256.hexdigest(), "mtime_ns": time_ns}
    return count, written


def _read_about(folder: Path) -> Row:
    """about.json, with a number of images for each part and, but for copies of earlier versions, an entry for each
    file. ValueError if it is not so."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"about.json: {error}") from None
    images = about.get("images") if isinstance(about, dict) else None
    if not isinstance(images, dict) or not all(type(images.get(part)) is int for part in PARTS):
        raise ValueError("about.json does not say how many images there are")
    files = about.get("files", {})
    names = [f"{part}{suffix}" for part in PARTS for suffix in (".pixels", ".labels")] if files != {} else []
    if not isinstance(files, dict) or not all(isinstance(files.get(name), dict) for name in names):
        raise ValueError("about.json does not have the digest of each file")
    return dict(about)


def _mapped(part: Path, count: int, size: int, written: dict[str, Row]) -> Images:
    """ValueError for a file of another length or, if its digest is known and to be checked, with other content."""
    pixels_file, labels_file = part.with_suffix(".pixels"), part.with_suffix(".labels")
    for file, wanted in ((pixels_file, count * 3 * size**2), (labels_file, count * 8)):
        status, entry = file.stat(), written.get(file.name)
        if status.st_size != wanted:
            raise ValueError(f"{file.name} has {status.st_size:,} bytes, expected {wanted:,}")
        if entry is None or (wanted > CHECKED and entry.get("mtime_ns") == status.st_mtime_ns):
            continue
        if file_digest(file) != entry.get("sha256"):
            raise ValueError(f"{file.name} has other content than was written")
    if not count:  # the system maps no empty file
        return Images(torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    # Mode c maps the file privately and read-only on disk: a stray write would not reach it.
    pixels = np.memmap(pixels_file, np.uint8, "c", shape=(count, 3, size, size))
    return Images(torch.from_numpy(pixels), torch.from_numpy(np.fromfile(labels_file, np.int64)))
