"""The processes that share one run: `torchrun --nproc-per-node N -m crl_diffusion train ...`. One process without it.

All processes hold the same model and draw the same global batches from the same named streams. Each computes its share,
and sums are exchanged. So the results of a run do not depend on the number of processes, up to rounding. Processes that
were started with other options, data or another torch end with an error before anything is written. The functions here
ask torch.distributed for the state of the group. Functions that exchange data must be called by all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from crl_diffusion.errors import OptionError, in_words

T = TypeVar("T")

# The first process measures FIDs and writes files while the others wait; at paper scale that takes many minutes.
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
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """The rank of this process among them, also before they have joined."""
    return int(os.environ.get("RANK") or 0)


@contextmanager
def together(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and leave them at the end. Yields the device of this process."""
    if launched() == 1 or _several():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise OptionError(
                f"torchrun has started process {local} of this machine, which has {devices} CUDA device(s)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield device
    distributed.destroy_process_group()  # not after an error: the others may wait until this process ends


def share(n: int) -> slice:
    """The slice of n items that belongs to this process."""
    return slice(n * rank() // count(), n * (rank() + 1) // count())


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients over processes in one exchange. DistributedDataParallel does not fit: the penalty's gradient is
    added once, after the sum, and every process must clip by the norm of the total gradient."""
    if count() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    summed = sum_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def largest(number: int) -> int:
    """The largest of all processes' numbers, exchanged on the CPU."""
    if count() == 1:
        return number
    numbers = torch.tensor(number)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return int(numbers)


def gather(tensor: Tensor) -> Tensor:
    """All processes' shares in their order: (n_r, ...) on the CPU -> (sum n_r, ...), in every process."""
    return torch.cat(everyone(tensor)) if count() > 1 else tensor


def everyone(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def require_same(facts: Mapping[str, Any]) -> None:
    """OptionError in all processes unless they have the same `facts`: each that differs, both values, and the processes
    that have another one than the first. They have left the group then."""
    all_facts = everyone(dict(facts))
    differences = []
    for name, expected in all_facts[0].items():
        others: dict[Any, list[str]] = {}
        for number, theirs in enumerate(all_facts):
            if name in theirs and theirs[name] != expected:
                others.setdefault(theirs[name], []).append(str(number))
        for value, numbers in others.items():
            differences.append(f"{name} is {expected} in process 0 and {value} in {in_words(numbers)}")
    if differences:
        distributed.destroy_process_group()
        raise OptionError(
            f"torchrun has started processes that differ: {'; '.join(differences)}; give all of them the same command, "
            "data and environment"
        )


def from_first(value: T) -> T:
    """The value of the first process; the values of the others are ignored."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values)
    return values[0]  # type: ignore[no-any-return]


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()
