"""The processes that share one run: `torchrun --nproc-per-node N -m crl_diffusion train ...`. One process without it.

All processes hold the same model and draw the same global batches from the same named streams; each computes its share
and sums are exchanged, so that a run's numbers do not depend on how many processes make it, up to rounding. The
functions here are told nothing: they ask torch.distributed. Those that exchange something must be called by all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from crl_diffusion.errors import OptionError

T = TypeVar("T")

# The first process measures FIDs and writes files alone, and the others wait; at paper scale that is many minutes.
TIMEOUT = timedelta(hours=6)


def count() -> int:
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    return distributed.get_rank() if _several() else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def group() -> Any:
    """All processes, for `estimate_fisher`; None if there is one."""
    return distributed.group.WORLD if count() > 1 else None


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Which of them this one is, also before they have joined."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def together(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun has started, and part from them at the end; yields this process's device."""
    if launched() == 1 or _several():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise OptionError(f"torchrun has started process {local} of this machine, which has {there} CUDA device(s)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield device
    distributed.destroy_process_group()  # after an error, the others may be waiting: let the process end, and they do


def share(n: int) -> slice:
    """Which of n things are this process's."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


def sum_(tensor: Tensor) -> Tensor:
    """In place, the sum over processes."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """Of all processes' numbers; exchanged on the CPU, whatever they compute on."""
    if count() == 1:
        return number
    numbers = torch.tensor(number)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)


def gather(tensor: Tensor) -> Tensor:
    """All processes' shares in their order: (n_r, ...) on the CPU -> (sum n_r, ...), in every process."""
    return torch.cat(everyone(tensor)) if count() > 1 else tensor


def everyone(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The first process's value; what the others give is not looked at."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[no-any-return]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
