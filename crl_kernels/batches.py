"""Batches of a loader: how many samples they hold, the first so many, two halves, and a line that shows progress."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def batch_size(batch: Any) -> int:
    """The common first dimension of a batch's tensors."""
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        raise ValueError(
            "loader yields batches whose tensors have no common first dimension; expected a tensor, or tuples, lists "
            "and dicts of tensors, whose first dimension is the sample."
        )
    return size


def slice_batch(batch: Any, begin: int, end: int) -> Any:
    """Samples ``begin`` to ``end`` of a batch."""
    leaves, structure = tree_flatten(batch)
    return tree_unflatten([leaf[begin:end] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def limited(loader: Iterable[Any], max_samples: int | None) -> Iterator[Any]:
    """Batches, the last one cut, up to ``max_samples`` samples."""
    left = math.inf if max_samples is None else max_samples
    for batch in loader:
        count = batch_size(batch)
        if count > left:
            batch, count = slice_batch(batch, 0, int(left)), int(left)
        if count:
            yield batch
        left -= count
        if left <= 0:
            return


def _samples_in(loader: Any, size: int) -> int | None:
    """How many samples a loader with first batches of ``size`` yields; None where nothing tells."""
    if isinstance(loader, (list, tuple)):
        return sum(batch_size(batch) for batch in loader)
    try:
        count = len(loader) * size
        return min(count, len(loader.dataset)) if hasattr(loader, "dataset") else count
    except TypeError:  # no len, or a stream behind a loader that claims to have one
        return None


def halves(loader: Iterable[Any], max_samples: int | None) -> Iterator[Iterator[Any]]:
    """Two iterators over batches, to be used up one after the other: the first half of the samples, then the rest."""
    batches = limited(loader, max_samples)
    first = next(batches, None)
    if first is None:
        raise ValueError("loader yields no samples.")
    known = [count for count in (max_samples, _samples_in(loader, batch_size(first))) if count is not None]
    if not known:
        raise ValueError("loader has no len, so it cannot be cut in half; give max_samples=.")
    half = min(known) // 2
    if half == 0:
        raise ValueError("loader yields one sample; low-rank estimation needs at least two, one for each half.")
    rest: list[Any] = []

    def first_half() -> Iterator[Any]:
        left, batch = half, first
        while batch is not None:
            count = batch_size(batch)
            if count > left:
                yield slice_batch(batch, 0, left)
                rest.append(slice_batch(batch, left, count))
                return
            yield batch
            left -= count
            if left == 0:
                return
            batch = next(batches, None)

    yield first_half()
    yield (batch for source in (rest, batches) for batch in source)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers hold, apart from the global one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def shown(batches: Iterable[Any], what: str, show: bool) -> Iterator[Any]:
    """The batches; with ``show``, a line on stderr that says how many samples of them are done, and how fast."""
    if not show:
        yield from batches
        return
    begun = told = time.monotonic()
    done = 0

    def tell() -> None:
        rate = done / max(told - begun, 1e-9)
        print(f"\rFisher, {what}: {done:,} samples, {rate:,.0f}/s", end="", file=sys.stderr, flush=True)

    try:
        for batch in batches:
            yield batch
            done += batch_size(batch)
            if time.monotonic() - told > 0.2:  # a terminal, or a log, need not see every batch
                told = time.monotonic()
                tell()
    finally:
        told = time.monotonic()
        tell()
        print(file=sys.stderr)
