"""The compiled libraries: where they are, and whether they were built from the sources that lie beside this package.

Beside the libraries is a record: ``sources``, the digest of csrc/ from which they were built, and ``left_out``, why a
library was not built, by file name. An installed package has no csrc/ and takes its own libraries. In a checkout, whose
folder may be imported before it is built, the libraries of the ``crl_kernels`` that is installed serve too; those that
were built from other sources do not, wherever they are.

This file imports neither torch nor the package, because setup.py runs it, for the digest and the record.
"""

import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = PACKAGE.parent / "csrc"
RECORD = "_build.json"
_SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".inc")


@functools.cache
def sources_digest(folder: Path = SOURCES) -> str:
    """The SHA-256 of the names and contents of all sources in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def write_record(package: Path, left_out: Mapping[str, str]) -> None:
    record = {"sources": sources_digest(), "left_out": left_out}
    (package / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@functools.cache
def _record(package: Path) -> dict[str, Any]:
    """The record in a package's folder, empty where there is none."""
    try:
        record = json.loads((package / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _installed() -> list[Path]:
    """The folders of this package's name that Python can import, but this one."""
    folders = [Path(entry, PACKAGE.name).resolve() for entry in sys.path]
    return [folder for folder in dict.fromkeys(folders) if folder != PACKAGE and folder.is_dir()]


def find(file: str) -> Path | str:
    """A library's path; a string says why there is none."""
    checkout = SOURCES.is_dir()
    folders = [PACKAGE, *(_installed() if checkout else [])]
    found = [folder / file for folder in folders if (folder / file).is_file()]
    for path in found:
        if not checkout or _record(path.parent).get("sources") == sources_digest():
            return path
    if found:
        return f"{found[0]} was not built from the sources that are now in {SOURCES}"
    reasons = [_record(folder)["left_out"].get(file) for folder in folders if "left_out" in _record(folder)]
    return f"{file} was not built" + (f": {reasons[0].rstrip('.')}" if reasons and reasons[0] else "")


def reinstall() -> str:
    """What to type to build them."""
    source = shlex.quote(str(PACKAGE.parent)) if SOURCES.is_dir() else "FOLDER_OF_THE_SOURCE"
    return f'pip install "setuptools>=77" ninja && pip install --no-build-isolation {source}'
