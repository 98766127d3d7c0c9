"""One process that is a group of its own, for wrappers and shards that ask for one."""

import pytest
import torch


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
