"""Small models that fully_shard has sharded, the data of one process, and what an estimate must leave alone."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def network() -> nn.Module:
    """Sizes that neither two nor four processes divide; one bias is smaller than four."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)).double()


def unsharded(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(count: int, kind: str = "fsdp", model: nn.Module | None = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    model = network() if model is None else model
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    shape, names = ((2, count // 2), ("replicate", "shard")) if kind == "hsdp" else ((count,), ("shard",))
    options = {"mesh": init_device_mesh("cpu", shape, mesh_dim_names=names)}
    if kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


class Tied(nn.Module):
    """A tied weight, a frozen one, a hook of its own, and a method besides forward that FSDP is told of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 5)
        self.last.weight, self.first.bias.requires_grad = self.first.weight, False
        self.middle.register_forward_hook(lambda module, args, output: output * 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()))

    def halved(self, x: Tensor) -> Tensor:
        return self(x) / 2


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x) if not isinstance(model, Tied) else model.halved(x)
    return (y - x[:, : y.shape[1]].sin()).square().mean(1)


def strata_of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return losses_of(model, x), (x[:, 0] > 0).long()


def batches_of(rank: int) -> list[Tensor]:
    """Of one process; the first has one more."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(12, 6, generator=generator, dtype=torch.float64) for _ in range(5 if rank else 6)]


def everything_of(model: nn.Module) -> tuple[list, list]:
    """(objects, bits) that an estimate must leave alone."""
    objects = [id(p) for p in model.parameters()]
    for module in model.modules():
        objects += [module.training, *module._forward_pre_hooks.items(), *module._forward_hooks.items()]
        objects += [value for value in vars(module).values() if callable(value)]
    return objects, [unsharded(t.detach()).tolist() for p in model.parameters() for t in (p, p.grad) if t is not None]


def sharded_for_estimates(rank: int, count: int, name: str) -> tuple[nn.Module, object]:
    """A model, and the group of the processes that share it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if name == "tied":
        model = Tied()
        fully_shard([model.first, model.last])  # which share a parameter
        fully_shard(model)
        register_fsdp_forward_method(model, "halved")
        model.bring = model.unshard  # a method of FSDP's that wraps nothing
        return model, dist.group.WORLD
    if name == "part":  # of four processes, two pairs of whole copies
        mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("pair", "replicate", "shard"))
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        return fully_shard(network(), mesh=mesh["replicate", "shard"]), pairs[rank // 2]
    return sharded(count, name), dist.group.WORLD
