"""The processes that share an estimate, and the collective calls of an estimate; no calls with one process."""

from typing import Any, TypeVar

from torch import Tensor, distributed, nn

T = TypeVar("T")


class Processes:
    """The processes of ``group``; without one, those of a DistributedDataParallel model, or only this process."""

    def __init__(self, model: nn.Module, group: Any) -> None:
        if group is not None and not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "process_group is given, but torch.distributed is not initialised; initialise it or drop it."
            )
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.count = 1 if group is None else distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not contain this process; call estimate_fisher in its members only.")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, self._group)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums over processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor, group=self._group)
        return tensor

    def broadcast_(self, tensor: Tensor, rank: int) -> Tensor:
        """Overwrites ``tensor`` with that of process ``rank``."""
        distributed.broadcast(tensor, distributed.get_global_rank(self._group, rank), self._group)
        return tensor
