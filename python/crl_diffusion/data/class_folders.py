"""A folder with one folder for each class: which folders are classes, which files are images, and what is neither.

Hidden files and folders, and those that systems put beside photos, are passed over. A class's images may lie in folders
of any depth. A link to a folder is followed unless it leads to a folder that is listed anyway, that contains the data
themselves or that belongs to the other part of them, so no link multiplies images, gives them a second label or brings
held-out images among those to train on.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from crl_diffusion.data.image_files import SUFFIXES
from crl_diffusion.errors import OptionError

PASSED_OVER = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
NO_TARGET = "a link to nothing"
Identity = tuple[int, int]  # of a folder, whatever paths lead to it: device and inode


@dataclass
class ClassFolders:
    """Classes in the order of their folders' names, and the image files of each, (path, class number)."""

    classes: tuple[str, ...]  # the folders' names, composed (Unicode's form NFC)
    files: list[tuple[str, int]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # paths that could not be listed, and why
    others: Counter[str] = field(default_factory=Counter)  # endings of the files that are no images
    beside: int = 0  # image files beside the class folders
    not_followed: int = 0  # links to folders

    @property
    def empty(self) -> list[str]:
        """Classes without image files."""
        return [self.classes[c] for c in sorted(set(range(len(self.classes))) - {label for _, label in self.files})]


def passed_over(name: str) -> bool:
    return name.startswith(".") or name.casefold() in PASSED_OVER


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, of links to folders as well, in the order of their names."""
    return sorted(entry.name for entry in _entries(str(folder)) if _is_folder(entry))


def peek(folder: Path) -> tuple[list[str], bool]:
    """Names of the folders in a folder, and whether images lie in it; nothing if it may not be listed."""
    try:
        return subfolders(folder), any(_is_image(entry.name) for entry in _entries(str(folder)))
    except OSError:
        return [], False


def class_names(folder: Path, option: str, apart: Path | None = None) -> dict[str, str]:
    """The folder of each class, by the name of the class, in the order of the folders' names. `apart` holds the other
    part of the data, if there is one."""
    tops, _ = _tops(folder, apart)
    names: dict[str, str] = {}
    for top in tops:
        name = unicodedata.normalize("NFC", top)
        if name in names:
            raise OptionError(
                f"{option}: two folders in {str(folder)!r} have the name {name!r}, which Unicode writes in two ways "
                f"({names[name]!a} and {top!a}); put their images into one of them"
            )
        names[name] = top
    return names


def list_classes(folder: Path, option: str, apart: Path | None = None) -> ClassFolders:
    """All images of a folder that holds one folder for each class. Their order is that of their paths: by folder, and
    in a folder by name. `apart` holds the other part of the data, if there is one: no link into it is followed."""
    names = class_names(folder, option, apart)
    tops, left_out = _tops(folder, apart)
    found = ClassFolders(tuple(names), not_followed=left_out)
    for entry in _entries(str(folder)):
        found.beside += _is_image(entry.name) and not _is_folder(entry)
        if _leads_nowhere(entry):
            found.unreadable.append((entry.path, NO_TARGET))

    # First the folders themselves, then links to folders that are not among them.
    listed = {identity for top in tops if (identity := _identity(os.path.join(folder, top)))}
    by_class: list[list[tuple[str, list[str]]]] = [[] for _ in tops]  # folders with the names of their images
    links: list[tuple[int, str]] = []
    for label, top in enumerate(tops):
        by_class[label] += _walk(os.path.join(folder, top), label, found, listed, links)
    while links:
        label, link = links.pop(0)
        identity = _identity(link)
        if identity in listed or _leads_back(link, folder, apart):
            found.not_followed += 1
            continue
        by_class[label] += _walk(link, label, found, listed, links)
    for label, folders in enumerate(by_class):
        for path, files in sorted(folders):
            found.files += [(os.path.join(path, name), label) for name in files]
    return found


def _walk(
    top: str, label: int, found: ClassFolders, listed: set[Identity], links: list[tuple[int, str]]
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its image files) for a folder and all folders in it; links to folders are put into `links`."""
    waiting = [top]
    while waiting:
        folder, files = waiting.pop(), []
        if identity := _identity(folder):
            if identity in listed and folder != top:
                continue
            listed.add(identity)
        try:
            entries = _entries(folder)
        except OSError as error:
            found.unreadable.append((folder, f"a folder; {error.strerror or error}"))
            continue
        for entry in entries:
            if _is_folder(entry):
                if entry.is_symlink():
                    links.append((label, entry.path))
                else:
                    waiting.append(entry.path)
            elif _leads_nowhere(entry):
                if _is_image(entry.name) or "." not in entry.name:
                    found.unreadable.append((entry.path, NO_TARGET))
            elif _is_image(entry.name) and entry.is_file():
                files.append(entry.name)
            else:
                found.others[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
        yield folder, files


def _tops(folder: Path, apart: Path | None) -> tuple[list[str], int]:
    """Names of the folders that are classes, and the number of links that are none since they lead to a class, to a
    folder that contains the data or into the other part of them."""
    names, links, listed = [], [], set()
    for name in subfolders(folder):
        path = os.path.join(folder, name)
        if os.path.islink(path):
            links.append(name)
        else:
            names.append(name)
            listed.add(_identity(path))
    left_out = 0
    for name in links:
        path = os.path.join(folder, name)
        if (identity := _identity(path)) in listed or _leads_back(path, folder, apart):
            left_out += 1
        else:
            names.append(name)
            listed.add(identity)
    return sorted(names), left_out


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not passed_over(entry.name)), key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _identity(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _leads_back(link: str, folder: Path, apart: Path | None) -> bool:
    """Whether the folder that a link leads to contains `folder`, or contains `apart` or lies in it."""
    target, place = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    if apart is not None:
        other = Path(os.path.realpath(apart))
        if target == other or target in other.parents or other in target.parents:
            return True
    return target == place or target in place.parents
