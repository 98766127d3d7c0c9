"""Reader of a folder of images with one folder per class, with a test part or without one."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crl_diffusion.data import cache
from crl_diffusion.data.class_folders import ClassFolders, class_names, list_classes, peek, subfolders
from crl_diffusion.data.dataset import Dataset
from crl_diffusion.data.image_files import RULES, SUFFIXES, Picture, Unreadable, formats, read_square
from crl_diffusion.data.split import HELD_OUT, Entry, split
from crl_diffusion.errors import OptionError, in_words

DECODED_AT_ONCE = 512  # image files
NAMED = 12  # unreadable files in a message; if there are more, a file lists all
LONGEST_NAME = 175  # bytes of a folder's name in the names of files
OPTION = "--data folder"


def read_folder(root: Path, size: int, skip_unreadable: bool = False) -> Dataset:
    """Any tree of image files. The name of the data set has a digest of the files, so different trees differ in it."""
    tree = ImageTree(root, OPTION, *train_and_held_out(root), skip_unreadable)
    folder = root.resolve().name.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore")
    listed = tree.read(f"folder-{folder}-{tree.digest()[:8]}", size)
    return listed._replace(name=f"folder-{folder}-{tree.digest()[:8]}")  # of the files that could be read


def standard_tree(root: Path, option: str) -> ImageTree:
    """A tree of a known data set, train/CLASS/* and test/CLASS/*, or val/CLASS/*: all of its images must be there."""
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None:
        raise OptionError(
            f"{option}: there is no folder 'test' or 'val' in {str(root)!r}; expected held-out images there, in "
            "folders named as those in 'train'"
        )
    return ImageTree(root, option, root / "train", root / held_out)


def count_classes(root: Path) -> int:
    """The number of classes in a folder of images; no image is read."""
    train, held_out = train_and_held_out(root)
    return len(class_names(train, OPTION, held_out))


def train_and_held_out(root: Path) -> tuple[Path, Path | None]:
    """The folder that holds the folders of the classes, and the one that holds those of held-out images if there is
    one. A folder 'train' beside other folders, with no folders in it, is a class of that name."""
    expected = "expected folders of images, one for each class, or these in a folder 'train' and in a folder 'test'"
    if not root.is_dir():
        raise OptionError(f"{OPTION}: there is no folder {str(root)!r}; {expected}; name it with --data-root")
    folders = subfolders(root)
    parts = [name for name in folders if name in ("train", "test", "val")]
    with_classes = [name for name in parts if peek(root / name)[0]]
    if "train" in with_classes or folders == parts == sorted({"train", *parts}):
        held_out = next((name for name in ("test", "val") if name in parts or (root / name).is_symlink()), None)
        if held_out not in (None, *parts):
            raise OptionError(
                f"{OPTION}: {held_out!r} in {str(root)!r} is a link to nothing or to a file; have it lead to the "
                "folder of held-out images, or delete it, and some of the others are held out"
            )
        return root / "train", root / held_out if held_out else None
    if with_classes:
        raise OptionError(
            f"{OPTION}: {str(root)!r} holds a folder {with_classes[0]!r} with classes in it, and no folder 'train' "
            "with the same ones; add it, or point --data-root at a folder of classes"
        )
    if not folders:
        raise OptionError(f"{OPTION}: {str(root)!r} holds no folders; {expected}; point --data-root at the right one")
    for name in folders:
        inner, images = peek(root / name)
        if ("train" in inner and {"test", "val"} & {*inner}) or (len(folders) == 1 and inner and not images):
            raise OptionError(
                f"{OPTION}: the classes seem to lie one folder deeper, in {str(root / name)!r}; point --data-root at it"
            )
    return root, None


class ImageTree:
    """Image files in one folder for each class; classes are numbered in alphabetical order. Without a folder of
    held-out images, some of the others are held out."""

    def __init__(
        self, root: Path, option: str, train: Path, held_out: Path | None, skip_unreadable: bool | None = None
    ) -> None:
        """`train` and `held_out` hold the classes' folders. `skip_unreadable` None: unreadable files are an error, and
        no option goes on without them."""
        self.root, self.option, self.skip_unreadable = root, option, skip_unreadable
        self.failed: list[tuple[str, str]] = []  # files that could not be decoded, and why
        self.animated = 0
        if held_out is not None and held_out.samefile(train):
            raise OptionError(
                f"{option}: {held_out.name!r} and {train.name!r} in {str(root)!r} are one folder; put images that are "
                f"not trained on into {held_out.name!r}, or delete it, and some of the others are held out"
            )
        listed = {"train": list_classes(train, option, held_out)}
        if held_out is not None:
            listed["test"] = list_classes(held_out, option, train)
        self.unlisted = [entry for part in listed.values() for entry in part.unreadable]
        self.total = sum(len(part.files) for part in listed.values()) + len(self.unlisted)
        for folder, part in zip((train, held_out), listed.values(), strict=False):
            self._require_images(str(folder), part)
        self.classes = listed["train"].classes
        self.parts = {part: found.files for part, found in listed.items()}
        self.notes = _notes(self.classes, list(listed.values()))
        self.undivided = str(train) if held_out is None else None  # the folder whose images are to be split
        if held_out is None:
            self.parts["test"] = []
            self._split()  # for its refusals, before anything is decoded
            return
        if differ := sorted({*self.classes} ^ {*listed["test"].classes}):
            raise OptionError(
                f"{option}: 'train' and {held_out.name!r} in {str(root)!r} must hold the same classes, but only one of "
                f"them has {in_words(differ)}"
            )
        number = [self.classes.index(name) for name in listed["test"].classes]
        self.parts["test"] = [(file, number[label]) for file, label in self.parts["test"]]

    def _require_images(self, folder: str, part: ClassFolders) -> None:
        if not part.classes:
            raise OptionError(
                f"{self.option}: {folder!r} holds no folders; expected one for each class, with its images in it"
            )
        if part.empty and self.unlisted and not self.skip_unreadable:
            raise self._refusal(self.unlisted)
        if part.empty:
            raise OptionError(
                f"{self.option}: there are no images of {in_words(part.empty)} in {folder!r}; expected files that end "
                f"in {', '.join(SUFFIXES)}: add some, or delete the empty folders"
            )

    def read(self, name: str, size: int) -> Dataset:
        way = json.dumps([RULES, self.skip_unreadable and formats()])
        decoded = cache.decoded(name, self.root, self._files(), size, partial(self._decode, size), way, self._findings)
        animated = self._recall(decoded)
        if self.unlisted and not self.skip_unreadable:
            raise self._refusal(self.unlisted)
        if unreadable := self.unlisted + self.failed:
            self.notes.append(
                f"{len(unreadable):,} of {self.total:,} images cannot be read and are left out: "
                f"{self._listed(unreadable)}"
            )
        if animated:
            self.notes.append(f"images with several frames or pages: {animated:,}; the first one of each is used")
        train, test = decoded.train, decoded.test
        if self.undivided is not None:
            self.parts["train"], self.parts["test"], held_out = self._split()
            train, test = train[~held_out], train[held_out]
            self.notes.append(
                f"there is no folder 'test': {len(test):,} of {len(held_out):,} images, one in {HELD_OUT} of each "
                "class, are held out, chosen by a hash of their names"
            )
        return Dataset(name, len(self.classes), train, test, self.classes, tuple(self.notes))

    def _recall(self, decoded: cache.Decoded) -> int:
        """Take over which files could not be decoded when the copy was made; returns how many images are animated."""
        self.failed = []
        try:
            unreadable, animated = decoded.findings["unreadable"], int(decoded.findings["animated"])
            if unreadable:
                files = {os.path.relpath(file, self.root): file for file in self._files()}
                self.failed = [(files[file], str(reason)) for file, reason in unreadable]
        except (KeyError, OverflowError, TypeError, ValueError):
            raise cache.damaged(decoded.folder, "about.json does not say which images could not be read") from None
        if self.undivided is not None and len(decoded.train) != len(self._files("train")):
            raise cache.damaged(decoded.folder, "about.json is of other images")
        return animated

    def _split(self) -> tuple[list[Entry], list[Entry], Tensor]:
        """The images of both parts, and which of all readable images the second one has, as a mask."""
        failed = {file for file, _ in self.failed}
        readable = [entry for entry in self.parts["train"] if entry[0] not in failed]
        train, test = split(readable, str(self.undivided), self.classes, self.option)
        held_out = {file for file, _ in test}
        return train, test, torch.tensor([file in held_out for file, _ in readable])

    def digest(self) -> str:
        """Of the names and sizes of the files in both parts, without those that could not be decoded."""
        if self.undivided is None:
            return cache.digest(self.root, self._files(), with_times=False)
        of_parts = [cache.digest(self.root, self._files(part), with_times=False) for part in cache.PARTS]
        return hashlib.sha256(" ".join(of_parts).encode()).hexdigest()

    def _files(self, *parts: str) -> list[str]:
        failed = {file for file, _ in self.failed}
        return [file for part in parts or cache.PARTS for file, _ in self.parts[part] if file not in failed]

    def _decode(self, size: int, part: str) -> cache.Chunks:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes and resizes without the interpreter's lock
            for chunk in _chunks(self.parts[part], DECODED_AT_ONCE):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about damaged metadata, and sizes that `image_files` limits
                    results = list(threads.map(lambda entry: _read(entry[0], size), chunk))
                read = [(r, label) for r, (_, label) in zip(results, chunk, strict=True) if isinstance(r, Picture)]
                self.animated += sum(picture.animated for picture, _ in read)
                for result, (file, _) in zip(results, chunk, strict=True):
                    if isinstance(result, Unreadable):
                        self.failed.append((file, str(result)))
                if read:
                    yield torch.cat([picture.pixels for picture, _ in read]), torch.tensor([label for _, label in read])

    def _findings(self) -> dict[str, Any]:
        """What about.json keeps. OptionError, with all files that cannot be read, unless they may be left out."""
        unreadable = self.unlisted + self.failed
        nothing_left = any(files and not self._files(part) for part, files in self.parts.items())
        if unreadable and (not self.skip_unreadable or nothing_left):
            raise self._refusal(unreadable)
        failed = [(os.path.relpath(file, self.root), reason) for file, reason in self.failed]
        return {"unreadable": failed, "animated": self.animated}

    def _refusal(self, unreadable: Sequence[tuple[str, str]]) -> OptionError:
        go_on = "" if self.skip_unreadable is None else ", or give --skip-unreadable to leave them out"
        if len(unreadable) == 1:
            ((file, reason),) = unreadable
            start = f"the image {file!r} cannot be read ({reason}); replace it, or delete it"
            return OptionError(f"{self.option}: {start}{go_on.replace('them', 'it')}")
        return OptionError(
            f"{self.option}: {len(unreadable):,} of {self.total:,} images cannot be read: {self._listed(unreadable)}; "
            f"replace them, or delete them{go_on}"
        )

    def _listed(self, unreadable: Sequence[tuple[str, str]]) -> str:
        """The first of the files by reason, in words; if there are more, all of them in a file that is named."""
        by_reason = defaultdict(list)
        for file, reason in unreadable[:NAMED]:
            by_reason[reason].append(repr(os.path.relpath(file, self.root)))
        words = "; ".join(f"{in_words(files)} ({reason})" for reason, files in by_reason.items())
        if len(unreadable) <= NAMED:
            return words
        rest = f"{words}; and {len(unreadable) - NAMED:,} more"
        path = cache.home(self.root) / "unreadable.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{file!r}: {reason}\n" for file, reason in unreadable)
            path.write_text(lines, encoding="utf-8", errors="backslashreplace")
        except OSError:
            return rest
        return f"{rest}, all of them in {str(path)!r}"


def _read(file: str, size: int) -> Picture | Unreadable:
    try:
        return read_square(file, size)
    except Unreadable as error:
        return error


def _notes(classes: Sequence[str], listed: Sequence[ClassFolders]) -> list[str]:
    """What was passed over in the folders, and names that look like one class."""
    notes = []
    for folded, count in Counter(name.casefold() for name in classes).items():
        if count > 1:
            alike = in_words([name for name in classes if name.casefold() == folded])
            notes.append(f"{alike} differ only in upper and lower case; they are {count} classes")
    others = sum((part.others for part in listed), Counter[str]())
    if others:
        endings = in_words([f"{count:,} {ending}" for ending, count in others.most_common()])
        notes.append(f"files that are no images and are passed over: {endings}")
    if beside := sum(part.beside for part in listed):
        notes.append(f"images that lie in no class's folder and are passed over: {beside:,}")
    if links := sum(part.not_followed for part in listed):
        notes.append(
            f"links that are not followed, since they lead to a folder that is listed or that holds the data: {links:,}"
        )
    return notes


def _chunks(items: Sequence[Any], n: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, n)):
        yield chunk
