"""torch.distributed.checkpoint: a sharded history saved by n processes and loaded by m.

dcp.save({"model": model.state_dict(), "history": history.state_dict()}, checkpoint_id=path)

history = LowRankHistory(model)                       # of the model as it is sharded now
load_history(history, path, key="history")
"""

import os

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from ..model.names import Layout
from ..penalty.diagonal import DiagonalHistory
from ..penalty.low_rank import LowRankHistory
from ..penalty.vectors import split_key


def load_history(history: LowRankHistory | DiagonalHistory, path: str | os.PathLike[str], key: str = "history") -> None:
    """Loads into ``history`` the state that was saved under ``key``. All processes must call it.

    If parameters joined the model after the save, load into a history of the old parameters (``include=``), then call
    ``LowRankHistory.rebind``.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: nothing under that key; parts that cannot be read; the history of another model, by name; values
            that a history cannot have. ``history`` has not changed then.
        RuntimeError: another process that shares the model loads something else, or does not call.
    """
    origin = f"the checkpoint {os.fspath(path)!r}"
    with history._binding.agreement.on("load_history", "Load one checkpoint in all of them."):
        state = _blank_state(history, path, key, origin)
    try:
        load({key: state}, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(f"{origin} is damaged, or parts of it are missing: {error}") from error
    history._take("load_history", state, origin)


def _blank_state(
    history: LowRankHistory | DiagonalHistory, path: str | os.PathLike[str], key: str, origin: str
) -> dict[str, torch.Tensor]:
    """Tensors that the saved state is read into, as the model is sharded."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {name.removeprefix(f"{key}."): entry for name, entry in metadata.items() if name.startswith(f"{key}.")}
    if not saved:
        raise ValueError(f"{origin} has nothing under key={key!r}.")
    vectors: dict[str, dict[str, TensorStorageMetadata]] = {}
    state = {}
    for name, entry in saved.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name!r} in {origin} is not a tensor.")
        prefix, parameter = split_key(name)
        if prefix:
            vectors.setdefault(prefix, {})[parameter] = entry
        else:
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device=history._device)
    for prefix, entries in vectors.items():
        stored = history._binding.rename(Layout(list(entries), [entry.size for entry in entries.values()]))
        scales = prefix.startswith("scales.")
        own = history._binding.layout.of_scales() if scales else history._binding.layout
        own.require_same_parameters(stored, "the scales of the model" if scales else "the model", origin)
        dtypes = {entry.properties.dtype for entry in entries.values()}
        if len(dtypes) > 1:
            raise ValueError(f"{prefix.removesuffix('.')} in {origin} is of {len(dtypes)} dtypes; expected one.")
        numel = sum(history._scales_lengths() if scales else history._binding.shards.lengths)
        flat = torch.empty(numel, dtype=dtypes.pop(), device=history._device)
        blank = history._named_row_major(flat, scales=True) if scales else history._named(flat)
        state |= {prefix + name: blank[own] for name, own in zip(entries, stored.names, strict=True)}
    return state
