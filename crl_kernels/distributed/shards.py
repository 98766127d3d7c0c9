"""Sharded parameters: of every vector, a process keeps what belongs to its own shards, and nothing is gathered.

The parameters of FSDP2 (``fully_shard``) are DTensors on a mesh of processes. Kernels run on local shards; what is
summed over the whole model, K dot products in float64, is then summed over the mesh's sharded dimensions: one exchange
a step for FSDP, and for HSDP, whose other dimension holds copies.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether it is a DTensor. Who has one has imported its module, which is slow to import for the others."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; differentiable."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    if not is_sharded(tensor):
        return tensor
    mesh_device = tensor.device_mesh.device_type
    on_mesh: Any = tensor if tensor.device.type == mesh_device else tensor.to(mesh_device)  # CPU offload
    whole: Tensor = on_mesh.full_tensor()
    return whole


class Shards:
    """How a model's parameters are cut; ``whole`` where they are not.

    Raises:
        ValueError: parameters that are not cut alike, or in a way that is not known here, by name.
    """

    def __init__(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        first = next(filter(is_sharded, params), None)
        self.whole = first is None
        if first is None:
            self.lengths = [parameter.numel() for parameter in params]
            return
        self._like = [_require_like(first, name, parameter) for name, parameter in zip(names, params, strict=True)]
        self._mesh = first.device_mesh
        self._groups = [self._mesh.get_group(i) for i, cut in enumerate(cuts(first)) if cut]
        self._shapes = [part.shape for part in self.local(params)]
        self.lengths = [shape.numel() for shape in self._shapes]

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of parameters; differentiable."""
        return list(tensors) if self.whole else list(map(local_part, tensors))

    def local_gradients(self, names: Sequence[str], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The same of gradients.

        Raises:
            ValueError: one that is not placed as its parameter is.
        """
        for name, gradient, (placements, _, _) in zip(names, gradients, [] if self.whole else self._like, strict=False):
            found = gradient.placements if is_sharded(gradient) else "a whole tensor"
            if found != placements:
                raise ValueError(
                    f"the gradient of {name!r} is placed as {found} and the parameter as {placements}; redistribute "
                    "it, or add rank1_ewc_penalty or diagonal_ewc_penalty to the loss instead."
                )
        return self.local(gradients)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of tensors like the parameters, each whole, or sharded in whatever way on their mesh.

        Raises:
            ValueError: one that is sharded over other processes than the parameters are.
        """
        from torch.distributed.tensor import distribute_tensor

        for tensor in tensors:
            if is_sharded(tensor) and tensor.device_mesh != self._mesh:
                raise ValueError(
                    f"a tensor is sharded over {tensor.device_mesh}, and the model over {self._mesh}. From another "
                    "number of processes load a file of save(), or a distributed checkpoint, with load_history of "
                    "crl_kernels.integrations.distributed_checkpoint."
                )
        parts = []
        for tensor, (placements, _, _) in zip(tensors, self._like, strict=True):
            if not is_sharded(tensor):  # cut here, without an exchange
                tensor = distribute_tensor(tensor, self._mesh, placements, src_data_rank=None)
            parts.append(tensor.redistribute(self._mesh, placements).to_local())
        return parts

    def join(self, flat: Tensor) -> list[Tensor]:
        """Tensors like the parameters, sharded as they are: views of a local flat vector."""
        from torch.distributed.tensor import DTensor

        parts = zip(flat.split(self.lengths), self._shapes, self._like, strict=True)
        return [
            DTensor.from_local(part.view(local), self._mesh, placements, run_check=False, shape=shape, stride=stride)
            for part, local, (placements, shape, stride) in parts
        ]

    def sum_(self, value: Tensor) -> Tensor:
        """In place, the sum over all shards."""
        return value if self.whole else self._reduce(value, distributed.ReduceOp.SUM)

    def max_(self, value: Tensor) -> Tensor:
        """In place, the largest over all shards."""
        return value if self.whole else self._reduce(value, distributed.ReduceOp.MAX)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all shards. Its derivative by a process's own value is 1: every process has the sum in its own
        loss, and differentiates it by its own shards."""
        return value if self.whole else value + (self.sum_(value.detach().clone()) - value.detach())

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        on_mesh = value.to(self._mesh.device_type)  # with CPU offload, shards lie where their mesh does not reduce
        for group in self._groups:
            distributed.all_reduce(on_mesh, operation, group)
        return value if on_mesh is value else value.copy_(on_mesh)


def cuts(tensor: "DTensor") -> list[bool]:
    """Along which of the mesh's dimensions it is cut."""
    from torch.distributed.tensor import Shard

    return [isinstance(placement, Shard) for placement in tensor.placements]


def _require_like(first: "DTensor", name: str, parameter: Tensor) -> tuple[Any, Any, Any]:
    """(placements, shape, stride) of a parameter that is cut along the same dimensions as the first."""
    from torch.distributed.tensor import Replicate, Shard

    where = "Bind a history to each kind, with include= or exclude=."
    if not is_sharded(parameter):
        raise ValueError(f"parameter {name!r} is whole and others are sharded. {where}")
    if not all(type(placement) in (Replicate, Shard) for placement in parameter.placements):
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements}; expected Shard and Replicate alone, as "
            "fully_shard places parameters."
        )
    if parameter.device_mesh != first.device_mesh or cuts(parameter) != cuts(first):
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements} on {parameter.device_mesh}, and others as "
            f"{first.placements} on {first.device_mesh}. {where}"
        )
    return parameter.placements, parameter.shape, parameter.stride()
