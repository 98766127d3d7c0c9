"""One process of hundreds, in torch's fake process group: its work does not grow with their number."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import past_tasks
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.cpu("the fake process group has no device")


@contextmanager
def one_of(count: int) -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class CountTensors(TorchDispatchMode):
    """Tensors that operators return in the block."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))
        return result


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("kind", past_tasks.HISTORIES)
def test_appending_a_whole_fisher_makes_as_many_tensors_for_any_number_of_processes(kind):
    made = []
    for count in (2, 512):
        with one_of(count):
            model = fully_shard(network(), mesh=init_device_mesh("cpu", (count,)))
            with CountTensors() as tensors:
                past_tasks.history_of(model, kind, unsharded=network())
        made.append(tensors.count)
    assert made[0] == made[1]
