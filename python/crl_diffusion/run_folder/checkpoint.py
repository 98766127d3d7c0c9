"""Checkpoints: safetensors files, written so that a crash at any moment leaves the last good one in place.

`02-00000300.safetensors` was written after two finished stages and 300 steps of the third. The end of stage i is
`<i+1>-00000000`. These files are kept; of the others only the last two. What does not change within a stage (teacher,
pool, penalties: with fifty directions for each task, many times the model) is stored only in the file of the stage's
start, and the later files name the digest of that file. A file is written under a temporary name, synced to the disk
and then renamed. It stores a digest of its contents and of the run that it belongs to, so a torn, altered or misplaced
file is detected and skipped. It also stores config.json and the digests of logs and sample files. Digests protect
against accidents; they are not signatures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crl_diffusion.errors import WriteError
from crl_diffusion.files import (
    read_tensors,
    require_file,
    require_folder,
    tensor_files,
    write_tensors,
)

KEPT_WITHIN_A_STAGE = 2
MEMORY = "memory/"  # prefix of tensors that do not change within a stage


class StaleRecords(ValueError):
    """A good checkpoint whose run has other records than when it was written."""


class Checkpoint(NamedTuple):
    """The state of a run: finished stages, steps in the next one, rows of each log, and tensors."""

    stage: int
    step: int
    rows: dict[str, int]
    tensors: dict[str, Tensor]
    run: str = ""  # identifies the run: the digest of its configuration
    digests: Mapping[str, str] = {}  # sha256 of the rows of each log and of other files of the run, by name
    config: str = ""  # the text of config.json

    def part(self, name: str) -> dict[str, Tensor]:
        """Tensors whose name begins with `name/`, without that prefix."""
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}


Check = Callable[[Checkpoint], Any]  # raises ValueError or KeyError if a checkpoint does not fit


def _digests(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, str]:
    """Two digests: of tensors and metadata, and of the tensors alone, as earlier versions wrote it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    of_tensors = digest.hexdigest()
    digest.update(json.dumps(sorted(item for item in metadata.items() if item[0] != "digest")).encode())
    return digest.hexdigest(), of_tensors


def _path(folder: Path, stage: int, step: int) -> Path:
    return folder / f"{stage:02d}-{step:08d}.safetensors"


def _moment(path: Path) -> tuple[int, int]:
    """Stage and step in the name of a file; (-1, -1), before all others, if the name has none."""
    stage, _, step = path.stem.partition("-")
    return (int(stage), int(step)) if stage.isdecimal() and step.isdecimal() else (-1, -1)


def is_named_as_one(path: Path) -> bool:
    """Whether the name of a file is that of a checkpoint."""
    return _moment(path) >= (0, 0)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint and delete those that are no longer needed. WriteError if that fails, as on a full disk."""
    stage, step = checkpoint.stage, checkpoint.step
    path = _path(folder, stage, step)
    try:
        metadata = {"stage": str(stage), "step": str(step), "run": checkpoint.run}
        metadata.update({f"rows/{name}": str(count) for name, count in checkpoint.rows.items()})
        metadata.update({f"sha256/{name}": digest for name, digest in checkpoint.digests.items()})
        if checkpoint.config:
            metadata["config"] = checkpoint.config
        kept = checkpoint.tensors
        if stage and step:
            with suppress(FileNotFoundError, SafetensorError):  # without a file of the start, this one stores all
                metadata["start"] = _metadata(_path(folder, stage, 0))["digest"]
                kept = {name: value for name, value in kept.items() if not name.startswith(MEMORY)}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in kept.items()}
        metadata["digest"], _ = _digests(tensors, metadata)
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{str(path)!r} cannot be written ({error})") from error
    _prune(folder, path)
    return path


def latest(folder: Path, check: Check = lambda checkpoint: None) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint that passes `check`, and one line for each newer one that is not good; None, and a
    line for each, if none is. RecordError if the folder is a file, or one of its files a folder. UnreadableError if one
    of them cannot be read: it may be good."""
    require_folder(folder)
    complaints: list[str] = []
    for path in sorted(tensor_files(folder), key=_moment, reverse=True):
        require_file(path)
        try:
            loaded = load(path)
            check(loaded)
            return loaded, [f"{complaint}; going back to the one before it" for complaint in complaints]
        except StaleRecords as error:
            complaints.append(f"{error}, which checkpoint {path.name} was taken after")
        except (ValueError, KeyError) as error:
            damage = f"no {error}" if isinstance(error, KeyError) else error
            complaints.append(f"checkpoint {path.name} is damaged ({damage})")
    return None, complaints


def load(path: Path) -> Checkpoint:
    """Read one checkpoint, with what the file of its stage's start holds for it; ValueError or KeyError if its contents
    are not those that were written, or not under this name, UnreadableError if they cannot be read."""
    metadata, tensors = _read(path)
    stage, step = int(metadata["stage"]), int(metadata["step"])
    if path.name != _path(path.parent, stage, step).name:
        raise ValueError(f"it was taken after {stage} stages and {step} steps, which is not what its name says")
    if "start" in metadata:
        start = _path(path.parent, stage, 0)
        if not start.exists():
            raise ValueError(f"it needs {start.name}, which is missing")
        try:
            start_metadata, start_tensors = _read(start)
        except ValueError as error:
            raise ValueError(f"it needs {start.name}, which is damaged: {error}") from None
        if start_metadata["digest"] != metadata["start"]:
            raise ValueError(f"it was taken after another {start.name}")
        tensors.update({name: value for name, value in start_tensors.items() if name.startswith(MEMORY)})
    return _checkpoint(metadata, tensors)


def newest_header(folder: Path) -> Checkpoint | None:
    """The newest checkpoint without its tensors; None if it cannot be read."""
    with suppress(SafetensorError, OSError, ValueError, KeyError):
        for path in sorted(tensor_files(folder), key=_moment)[-1:]:
            return _checkpoint(_metadata(path), {})
    return None


def _checkpoint(metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Checkpoint:
    def part(beginning: str) -> dict[str, str]:
        return {name[len(beginning) :]: x for name, x in metadata.items() if name.startswith(beginning)}

    rows = {name: int(count) for name, count in part("rows/").items()}
    stage, step, config = int(metadata["stage"]), int(metadata["step"]), metadata.get("config", "")
    return Checkpoint(stage, step, rows, tensors, metadata["run"], part("sha256/"), config)


def end_of_stage(folder: Path, number: int) -> Path:
    """The checkpoint that was taken at the end of the stage with this number, from 0."""
    return _path(folder, number + 1, 0)


def require_like(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], part: str) -> None:
    """ValueError unless `tensors` have the names, shapes and dtypes of `wanted`."""
    if odd := tensors.keys() ^ wanted.keys():
        raise ValueError(f"its {part} lacks or has too many: {', '.join(sorted(odd)[:3])}")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (wanted[name].shape, wanted[name].dtype):
            raise ValueError(
                f"its {part} has {tensor.dtype} {tuple(tensor.shape)} for {name}, and not {wanted[name].dtype} "
                f"{tuple(wanted[name].shape)}"
            )


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return dict(file.metadata() or {})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    metadata, tensors = read_tensors(path)
    if metadata.get("digest") not in _digests(tensors, metadata):
        raise ValueError("its contents do not match its digest")
    return metadata, tensors


def _prune(folder: Path, newest: Path) -> None:
    # Files of later moments are those that were passed over: they are overwritten when the run gets there.
    within = [p for p in tensor_files(folder) if _moment(p)[1] > 0 and _moment(p) <= _moment(newest)]
    for path in sorted(within, key=_moment)[:-KEPT_WITHIN_A_STAGE]:
        path.unlink()
