"""Files: safetensors, by parameter name, never pickle. Written aside and renamed, so never half a file."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_ENTRY = "crl_kernels"
_VERSION = 1


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading need the safetensors package: pip install safetensors") from error
    return safetensors


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes tensors, and JSON-able facts about them, to ``path``."""
    library = _safetensors()
    # One entry: safetensors writes several in an arbitrary order, and equal states should be equal files.
    header = {_ENTRY: json.dumps({"version": _VERSION, "kind": kind, "facts": facts})}
    data = library.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, header)
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path {os.fspath(path)!r}: its folder {str(target.parent)!r} does not exist; create it."
        )
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike[str]) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """(kind, tensors, facts) of a file that ``write`` wrote. Raises ValueError for any other file."""
    library = _safetensors()
    if not Path(path).is_file():
        raise FileNotFoundError(f"path {os.fspath(path)!r} is not a file.")
    try:
        with library.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except library.SafetensorError as error:
        raise ValueError(f"path {os.fspath(path)!r} is not a safetensors file, or is damaged: {error}.") from error
    if header.get("version") != _VERSION:
        raise ValueError(
            f"path {os.fspath(path)!r} was not saved by this library, or by another version of it: its format is "
            f"{header.get('version')}, expected {_VERSION}."
        )
    return header["kind"], tensors, header["facts"]
