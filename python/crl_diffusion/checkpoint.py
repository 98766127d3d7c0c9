"""Checkpoints: one safetensors file each, written so that a crash at any moment leaves the last good one in place.

`02-00000300.safetensors` was taken with two stages finished and 300 steps of the third. The end of stage i is
`<i+1>-00000000`; those are kept, of the others only the last two. A file is written beside its final name, synced to
the disk and then renamed, and it carries a digest of its contents: what is torn or altered is noticed and passed over.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEPT_WITHIN_A_STAGE = 2


class Checkpoint(NamedTuple):
    """Where a run stood: stages finished, steps taken in the next one, rows written to each log, and its tensors."""

    stage: int
    step: int
    rows: dict[str, int]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Tensors whose name begins with `name/`, without that beginning."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint and drop those that are no longer needed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in checkpoint.tensors.items()}
    rows = {f"rows/{name}": str(count) for name, count in checkpoint.rows.items()}
    metadata = {"stage": str(checkpoint.stage), "step": str(checkpoint.step), "digest": _digest(tensors), **rows}
    path = folder / f"{checkpoint.stage:02d}-{checkpoint.step:08d}.safetensors"
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(folder)
    _prune(folder)
    return path


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint, and one line for each newer one that is not good."""
    complaints: list[str] = []
    for path in sorted(folder.glob("*.safetensors"), reverse=True):
        try:
            return load(path), complaints
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            complaints.append(f"checkpoint {path.name} is damaged ({error}); going back to the one before it")
    return None, complaints


def load(path: Path) -> Checkpoint:
    """Read one checkpoint; ValueError if its contents are not those that were written."""
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a mapping
    if metadata.get("digest") != _digest(tensors):
        raise ValueError("its contents do not match its digest")
    rows = {name[5:]: int(count) for name, count in metadata.items() if name.startswith("rows/")}
    return Checkpoint(int(metadata["stage"]), int(metadata["step"]), rows, tensors)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _prune(folder: Path) -> None:
    within = sorted(p for p in folder.glob("*.safetensors") if not p.stem.endswith("-00000000"))
    for path in within[:-KEPT_WITHIN_A_STAGE]:
        path.unlink()
    for path in folder.glob("*.tmp"):
        path.unlink()
