"""torch.distributed.checkpoint: a sharded history saved by n processes and loaded by m.

dcp.save({"model": model.state_dict(), "history": history.state_dict()}, checkpoint_id=path)

history = LowRankHistory(model)                       # of the model as it is sharded now
load_history(history, path, key="history")
"""

import os
import re

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..diagonal_history import DiagonalHistory
from ..low_rank_history import LowRankHistory

_VECTOR = re.compile(r"((?:directions\.\d+|fisher_diagonal|anchor)\.)(.+)")


def load_history(history: LowRankHistory | DiagonalHistory, path: str | os.PathLike[str], key: str = "history") -> None:
    """Reads into ``history`` what was saved of one under ``key``. All processes call it.

    Raises:
        ValueError: nothing under that key, or the history of another model, by name.
    """
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    mine = {name.removeprefix(f"{key}."): entry for name, entry in found.items() if name.startswith(f"{key}.")}
    if not mine:
        raise ValueError(f"the checkpoint {os.fspath(path)!r} has nothing under key={key!r}.")
    vectors: dict[tuple[str, torch.dtype], set[str]] = {}
    state = {}
    for name, entry in mine.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} in the checkpoint {os.fspath(path)!r} is not a tensor.")
        if part := _VECTOR.fullmatch(name):
            vectors.setdefault((part[1], entry.properties.dtype), set()).add(part[2])
        else:
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device=history._device)
    for (prefix, dtype), names in vectors.items():
        blank = history._named(torch.empty(sum(history._binding.shards.lengths), dtype=dtype, device=history._device))
        state |= {f"{prefix}{name}": tensor for name, tensor in blank.items() if name in names}
    load({key: state}, checkpoint_id=path)
    history.load_state_dict(state)
