"""Files in the safetensors format, by parameter name, never pickle. A file is written under a temporary name and then
renamed, so it is never incomplete.

A file has one entry of metadata, in JSON: the format's version, the kind of its contents, facts about them, and a
digest. The digest is the SHA-256 of the other entries and of the name, dtype, shape and bytes of every tensor. Files of
version 1, which have no digest, also load.
"""

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_ENTRY = "crl_kernels"
_VERSION = 2
_KEYS = {1: {"version", "kind", "facts"}, 2: {"version", "kind", "facts", "digest"}}


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors, and JSON-able facts about them, to ``path``."""
    _require_utf_8(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {"version": _VERSION, "kind": kind, "facts": facts}
    # One entry, because safetensors writes several in an arbitrary order, and equal states should give equal files.
    header = {_ENTRY: json.dumps(description | {"digest": _digest(description, plain)})}
    data = save(plain, header)
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path {os.fspath(path)!r} is a folder; expected a file.")
    if not target.parent.is_dir():
        remedy = "write os.path.expanduser(path)" if str(target).startswith("~") else "create it"
        raise FileNotFoundError(
            f"path {os.fspath(path)!r}: its folder {str(target.parent)!r} does not exist; {remedy}."
        )
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:  # with the umask's mode, where tempfile's files are for their owner only
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _require_utf_8(path: str | os.PathLike[str]) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; expected a str or a pathlib.Path.")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"path {os.fspath(path)!r} is not UTF-8, as safetensors needs it; rename it.") from error


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The digest of a description and of contiguous CPU tensors, independent of their order in the file."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.nbytes:
            digest.update((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()


def described(path: str | os.PathLike[str]) -> str:
    """The name of a file in an error message."""
    return f"the file {os.fspath(path)!r}"


def read(path: str | os.PathLike[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(kind, tensors, facts) of a file that ``write`` wrote, in version 1 or 2.

    Raises:
        OSError: a file that cannot be opened: FileNotFoundError, IsADirectoryError, PermissionError.
        ValueError: a file of another kind, a damaged file, or a file of a later version; the message names it.
    """
    _require_utf_8(path)
    if Path(path).is_dir():
        raise IsADirectoryError(f"path {os.fspath(path)!r} is a folder; expected a file.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r} is not a file.")
    with open(path, "rb") as file:  # safetensors says of a file without permission that it is missing, and maps it: a
        while file.read(2**24):  # part that the disk cannot read would end the process
            pass
    try:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(_ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{described(path)} is not a safetensors file, or is damaged: {error}.") from error
    if entry is None:
        raise ValueError(f"{described(path)} was not saved by this library.")
    try:
        header: Any = json.loads(entry)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{described(path)} is damaged: its metadata is not JSON: {error}.") from error
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is int and version > _VERSION:
        raise ValueError(
            f"{described(path)} is of format {version}, and this version of the library knows formats up to "
            f"{_VERSION}. Load it with the version that saved it, or a later one."
        )
    if type(version) is not int or header.keys() != _KEYS.get(version) or not isinstance(header["facts"], dict):
        raise ValueError(f"{described(path)} was not saved by this library, or its metadata are damaged.")
    if "digest" in header and header.pop("digest") != _digest(header, tensors):
        raise ValueError(
            f"{described(path)} is damaged, or was changed after it was saved: its contents do not have its digest. "
            "Load another copy of it."
        )
    return str(header["kind"]), tensors, header["facts"]
