"""The data that every contender works on: P float32 parameters in N equal tensors, their gradients, and past tasks.

A past task has a unit direction u, a diagonal Fisher F = u^2 and an anchor theta*, each flat. Its penalties:

    rank-1     (lam / 2) (u . (theta - theta*))^2
    diagonal   (lam / 2) sum F (theta - theta*)^2
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import crl_kernels as ck

LAM = 15_000.0
TASKS = 10  # of the rows with a history


class Unavailable(Exception):
    """Why a contender cannot be measured here; its row in the table says so."""


@dataclass(frozen=True)
class Task:
    direction: Tensor
    fisher: Tensor
    anchor: Tensor


class Problem(nn.Module):
    """Parameters, gradients and one task; ``tasks`` makes the others at its first use."""

    BYTES = 28  # per parameter, during construction

    def __init__(self, numel: int, tensors: int, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.numel = numel
        self._directions: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self.task = self._task(1)
        theta = self.task.anchor + 0.1 * self.task.direction
        self.lengths = [len(part) for part in theta.tensor_split(tensors)]
        self._held = nn.ParameterList(part.clone() for part in theta.split(self.lengths))
        for parameter in self._held:
            parameter.grad = torch.zeros_like(parameter)
        # Plain lists, because iterating over a ParameterList takes 2 us per parameter, which no row should pay.
        self.params = list(self._held)
        self.grads = [parameter.grad for parameter in self.params]

    def _normal(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.numel, generator=generator, device=self.device)

    def _task(self, number: int) -> Task:
        direction = self._normal(2 * number)
        direction /= direction.norm()
        anchor = self._normal(0).add_(self._normal(2 * number + 1), alpha=0.01)
        return Task(direction, direction.square(), anchor)

    @cached_property
    def tasks(self) -> list[Task]:
        return [self.task, *(self._task(number) for number in range(2, TASKS + 1))]

    def first_tasks(self, count: int) -> list[Task]:
        """The first ``count`` tasks; for one, the others are not made."""
        return [self.task] if count == 1 else self.tasks[:count]

    @staticmethod
    def more_bytes(tasks: int) -> int:
        """Bytes per parameter of these tasks beyond the first."""
        return 0 if tasks == 1 else 12 * (TASKS - 1)

    def bytes_of_tasks(self, tasks: int) -> int:
        """Bytes per parameter that these tasks will add."""
        return 0 if "tasks" in self.__dict__ else self.more_bytes(tasks)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor, one per parameter."""
        return list(flat.split(self.lengths))

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: part for (name, _), part in zip(self.named_parameters(), self.split(flat), strict=True)}

    def scalar(self, value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def directions(self, terms: int, dtype: torch.dtype) -> list[Tensor]:
        """The first tasks' directions, in the dtype in which they are stored; made once for each dtype."""
        if (terms, dtype) not in self._directions:
            self._directions[terms, dtype] = [task.direction.to(dtype) for task in self.first_tasks(terms)]
        return self._directions[terms, dtype]

    @cached_property
    def scratch(self) -> Tensor:
        """A flat buffer for the yardsticks to write to."""
        return torch.zeros_like(self.task.anchor)

    @cached_property
    def rank1_history(self) -> ck.LowRankHistory:
        return self.low_rank_history([self.task], torch.float32)

    def low_rank_history(self, tasks: list[Task], storage_dtype: torch.dtype) -> ck.LowRankHistory:
        history = ck.LowRankHistory(self)
        for task in tasks:
            direction = {name: part[None] for name, part in self.named(task.direction).items()}
            anchor = self.named(task.anchor)
            history.append(ck.LowRankFisher(direction, torch.ones(1), anchor, storage_dtype=storage_dtype))
        return history

    @cached_property
    def diagonal_history(self) -> ck.DiagonalHistory:
        """One task, set from a state, because appending it needs 60 bytes per parameter meanwhile."""
        history = ck.DiagonalHistory(self)
        fisher = {f"fisher_diagonal.{name}": part for name, part in self.named(self.task.fisher).items()}
        anchor = {f"anchor.{name}": part for name, part in self.named(self.task.anchor).items()}
        history.load_state_dict(fisher | anchor | {"residual": self.scalar(0.0), "num_tasks": torch.tensor(1)})
        return history

    def appended_diagonal_history(self) -> ck.DiagonalHistory:
        history = ck.DiagonalHistory(self)
        for task in self.tasks:
            history.append(ck.DiagonalFisher(self.named(task.fisher), self.named(task.anchor)))
        return history
