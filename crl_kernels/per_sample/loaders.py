"""Loaders: iterables of batches, cut after so many samples or into two halves, and a line that shows progress."""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from .batches import batch_size, class_name, is_array, slice_batch


def require_loader(loader: Any) -> None:
    """Refuses what is no iterable of batches, or would be taken for one by mistake.

    Raises:
        TypeError: a Dataset, whose items are samples; a tensor, array, dict or string, which can be iterated, but not
            over batches; anything that cannot be iterated.
    """
    if (isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)) or hasattr(loader, "column_names"):
        raise TypeError(
            f"loader is a dataset ({class_name(loader)}), which yields samples; expected batches: give "
            "DataLoader(dataset, batch_size=...), or batch_size=None if its items are batches."
        )
    if is_array(loader) or isinstance(loader, Mapping):
        raise TypeError(
            f"loader is a {class_name(loader)}; expected an iterable of batches, such as a DataLoader. If it is one "
            "batch, give a list of it: [batch]."
        )
    iterable = hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")
    if not iterable or isinstance(loader, (str, bytes, bytearray)):
        raise TypeError(f"loader is {loader!r:.100}; expected an iterable of batches, such as a DataLoader or a list.")


def _counted(loader: Iterable[Any], max_samples: int | None) -> Iterator[tuple[int, Any]]:
    """Batches that have samples, the last one cut, up to ``max_samples`` samples; before each, its index in loader."""
    require_loader(loader)
    left = math.inf if max_samples is None else max_samples
    for index, batch in enumerate(loader):
        count = batch_size(batch)
        if count > left:
            batch, count = slice_batch(batch, 0, int(left)), int(left)
        if count:
            yield index, batch
        left -= count
        if left <= 0:
            return


def limited(loader: Iterable[Any], max_samples: int | None) -> Iterator[Any]:
    """Batches that have samples, the last one cut, up to ``max_samples`` samples."""
    return (batch for _, batch in _counted(loader, max_samples))


def _length(source: Any) -> int | None:
    """None where nothing tells: no len, or a stream behind something that claims to have one."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _samples_in(loader: Any, size: int) -> int | None:
    """How many samples a loader yields whose first batch has ``size``; None where only its number of batches tells.

    The length of a sampler, or of a stream's dataset, is believed only if so many samples make as many batches of that
    size as the loader has: with drop_last, a batch sampler of another kind, several processes, or items that are
    batches themselves, it counts something else.
    """
    if isinstance(loader, (list, tuple)):
        return sum(batch_size(batch) for batch in loader)
    batches, batch_sampler = _length(loader), getattr(loader, "batch_sampler", None)
    if batches is None or batch_sampler is None:
        return None
    for source in (getattr(batch_sampler, "sampler", None), getattr(loader, "dataset", None)):
        samples = _length(source)
        if samples is not None and (batches - 1) * size < samples <= batches * size:
            return samples
    return None


def halves(loader: Iterable[Any], max_samples: int | None) -> Iterator[Iterator[Any]]:
    """Two iterators over batches, to be used up one after the other: the first half of the samples, then the rest.

    Half is half of the samples where their number is known, and half of the batches otherwise, of an odd number half of
    the samples of the one in the middle; with ``max_samples``, half of that at most. No sample is in both.
    """
    batches = _counted(loader, max_samples)
    first = next(batches, None)
    if first is None:
        used_up = ": it is an iterator, and has been read already" if isinstance(loader, Iterator) else ""
        raise ValueError(f"loader yields no samples{used_up}.")
    begin, size = first[0], batch_size(first[1])
    samples, length = _samples_in(loader, size), _length(loader)
    if samples is None and length is None and max_samples is None:
        raise ValueError("loader has no len, so it cannot be cut in half; give max_samples=.")
    half = min((count // 2 for count in (samples, max_samples) if count is not None), default=math.inf)
    middle = math.inf  # index of the batch that is cut in half; its fraction is the share in the first half
    if samples is None and length is not None:
        middle = (begin + max(length, begin + 1)) / 2
    if half == 0 or size * (middle - begin) < 1:
        raise ValueError("loader yields one sample; low-rank estimation needs at least two, one for each half.")
    rest: list[Any] = []

    def first_half() -> Iterator[Any]:
        left = half
        for index, batch in itertools.chain([first], batches):
            count = batch_size(batch)
            take = int(min(count, left, count * max(middle - index, 0)))
            if take:
                yield batch if take == count else slice_batch(batch, 0, take)
            if take < count:
                rest.append(slice_batch(batch, take, count) if take else batch)
                return
            left -= take
            if left == 0:
                return

    yield first_half()
    yield itertools.chain(rest, (batch for _, batch in batches))


def generators_of(loader: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers hold, apart from the global one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def with_progress(batches: Iterable[Any], stage: str, enabled: bool) -> Iterator[Any]:
    """The batches; if enabled, a line on stderr has the number of samples used so far, and how many a second."""
    if not enabled:
        yield from batches
        return
    begun = printed = time.monotonic()
    done = 0

    def print_line() -> None:
        rate = done / max(printed - begun, 1e-9)
        print(f"\rFisher, {stage}: {done:,} samples, {rate:,.0f}/s", end="", file=sys.stderr, flush=True)

    try:
        for batch in batches:
            yield batch
            done += batch_size(batch)
            if time.monotonic() - printed > 0.2:  # a terminal, or a log, need not see every batch
                printed = time.monotonic()
                print_line()
    finally:
        printed = time.monotonic()
        print_line()
        print(file=sys.stderr)
