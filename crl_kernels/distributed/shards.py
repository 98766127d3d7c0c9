"""Sharded parameters: each process keeps the part of every vector that belongs to its shards; nothing is gathered.

The parameters of FSDP2 (``fully_shard``) are DTensors on a mesh of processes. Kernels run on local shards. Sums over
the model, K dot products in float64, are then summed over the mesh's sharded dimensions: one exchange in each step, for
FSDP and for HSDP, whose other mesh dimension holds copies.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from typing_extensions import TypeIs

from ..backends.int8 import scales_shape
from .agreement import Agreement, agreement_on

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_TOGETHER = "All processes make the same calls."


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether it is a DTensor. Does not import DTensor's module, which is slow; a DTensor exists only after that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; differentiable."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, in every process."""
    if not is_sharded(tensor):
        return tensor
    mesh_device = tensor.device_mesh.device_type
    on_mesh: Any = tensor if tensor.device.type == mesh_device else tensor.to(mesh_device)  # CPU offload
    full: Tensor = on_mesh.full_tensor()
    return full


class Shards:
    """How a model's parameters are sharded; ``unsharded`` if they are not.

    Raises:
        ValueError: parameters that are sharded differently, or in an unsupported way, by name.
    """

    def __init__(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        first = next(filter(is_sharded, params), None)
        self.unsharded = first is None
        self.agreement = Agreement()  # of the mesh's processes
        if first is None:
            self.shapes = [parameter.shape for parameter in params]
            self.lengths = [shape.numel() for shape in self.shapes]
            return
        self._like = [_require_like(first, name, parameter) for name, parameter in zip(names, params, strict=True)]
        self._mesh = first.device_mesh
        groups = [(self._mesh.get_group(i), sharded) for i, sharded in enumerate(sharded_dimensions(first))]
        self._groups = [group for group, sharded in groups if sharded]
        self._copy_groups = [group for group, sharded in groups if not sharded]
        self.agreement = agreement_on(self._mesh)
        self.shapes = [part.shape for part in self.local(params)]
        self.lengths = [shape.numel() for shape in self.shapes]

    def local(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of parameters; differentiable."""
        return list(tensors) if self.unsharded else list(map(local_part, tensors))

    def local_gradients(self, names: Sequence[str], gradients: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of gradients.

        Raises:
            ValueError: a gradient that is placed differently from its parameter.
        """
        for name, gradient, (placements, _, _) in zip(
            names, gradients, [] if self.unsharded else self._like, strict=False
        ):
            placed = gradient.placements if is_sharded(gradient) else "a whole tensor"
            if placed != placements:
                raise ValueError(
                    f"the gradient of {name!r} is placed as {placed} and the parameter as {placements}; redistribute "
                    "it, or add rank1_ewc_penalty or diagonal_ewc_penalty to the loss instead."
                )
        return self.local(gradients)

    def cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of tensors like the parameters, each either full or sharded in any way on their mesh.

        Raises:
            ValueError: a tensor that is sharded over other processes than the parameters.
        """
        for tensor in tensors:
            if is_sharded(tensor) and tensor.device_mesh != self._mesh:
                raise ValueError(
                    f"a tensor is sharded over {tensor.device_mesh}, and the model over {self._mesh}. From another "
                    "number of processes load a file of save(), or a distributed checkpoint, with load_history of "
                    "crl_kernels.integrations.distributed_checkpoint."
                )
        parts = []
        for tensor, (placements, _, _) in zip(tensors, self._like, strict=True):
            if is_sharded(tensor):
                parts.append(tensor.redistribute(self._mesh, placements).to_local())
            else:
                parts.append(_own_chunk(tensor, self._mesh, placements))
        return parts

    def join(self, flat: Tensor, *, scales: bool = False) -> list[Tensor]:
        """Tensors like the parameters, sharded as they are: views of a local flat vector, or of the scales of one."""
        from torch.distributed.tensor import DTensor

        shapes = list(map(scales_shape, self.shapes)) if scales else self.shapes
        parts = flat.split([shape.numel() for shape in shapes])
        joined: list[Tensor] = []
        for part, local, (placements, shape, stride) in zip(parts, shapes, self._like, strict=True):
            if scales:
                shape = scales_shape(shape)
                stride = (shape[1], 1)
            options = {"run_check": False, "shape": shape, "stride": stride}
            joined.append(DTensor.from_local(part.view(local), self._mesh, placements, **options))
        return joined

    def require_rows(self, names: Sequence[str]) -> None:
        """Raises ValueError unless each process has whole rows of the parameters, as vectors in int8 need them."""
        for name, (placements, _, _) in zip(names, [] if self.unsharded else self._like, strict=False):
            if any(getattr(placement, "dim", 0) != 0 for placement in placements):
                raise ValueError(
                    f"parameter {name!r} is placed as {placements}; expected shards of dimension 0 beside int8 "
                    "directions, whose blocks are in rows. Use storage_dtype=torch.bfloat16."
                )

    @property
    def device(self) -> torch.device:
        """Where the model computes; with CPU offload, the parameters are elsewhere."""
        return torch.device(self._mesh.device_type)

    @property
    def sharing_group(self) -> Any:
        """The process group that shares one copy of a model of ``fully_shard``."""
        (group,) = self._groups
        return group

    def gathered_on_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The full tensors, gathered one by one, on the CPU of the mesh's first process; none in the others."""
        if self.unsharded:
            return dict(tensors)
        full = {}
        for name, tensor in tensors.items():
            value = gathered(tensor)
            if self._is_first():
                full[name] = value.cpu()
        return full

    def require_all(self, call: str) -> None:
        """Returns once all processes of the mesh have made this call, which gathers what they have. Raises RuntimeError
        if one has not."""
        with self.agreement.on(call, _TOGETHER):
            pass

    def on_first(self, action: Callable[[], None]) -> None:
        """Calls ``action`` in the mesh's first process; the others wait for it, and raise RuntimeError if it raises."""
        with self.agreement.on("save", _TOGETHER):
            if self.unsharded or self._is_first():
                action()

    def _is_first(self) -> bool:
        return not any(self._mesh.get_coordinate() or ())

    def sum_(self, value: Tensor) -> Tensor:
        """Sums over all shards, in place."""
        return value if self.unsharded else self._reduce(value, distributed.ReduceOp.SUM, self._groups)

    def sum_copies_(self, value: Tensor) -> Tensor:
        """Sums over HSDP's copies, in place; each process has the same shard in each copy."""
        return self._reduce(value, distributed.ReduceOp.SUM, self._copy_groups)

    def max_(self, value: Tensor) -> Tensor:
        """The maximum over all shards, in place."""
        return value if self.unsharded else self._reduce(value, distributed.ReduceOp.MAX, self._groups)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all shards. Its derivative by this process's value is 1: each process has the sum in its loss
        and differentiates it by its own shards."""
        return value if self.unsharded else value + (self.sum_(value.detach().clone()) - value.detach())

    def _reduce(self, value: Tensor, operation: Any, groups: Sequence[Any]) -> Tensor:
        on_mesh = value.to(self._mesh.device_type)  # with CPU offload, shards are on another device than the mesh
        for group in groups:
            distributed.all_reduce(on_mesh, operation, group)
        return value if on_mesh is value else value.copy_(on_mesh)


def sharded_dimensions(tensor: "DTensor") -> list[bool]:
    """For each dimension of the mesh, whether the tensor is sharded along it."""
    from torch.distributed.tensor import Shard

    return [isinstance(placement, Shard) for placement in tensor.placements]


def _require_like(first: "DTensor", name: str, parameter: Tensor) -> tuple[Any, Any, Any]:
    """(placements, shape, stride) of a parameter. Raises ValueError if it is sharded differently from ``first``."""
    from torch.distributed.tensor import Replicate, Shard

    advice = "Bind a history to each kind, with include= or exclude=."
    if not is_sharded(parameter):
        raise ValueError(f"parameter {name!r} is whole and others are sharded. {advice}")
    if not all(type(placement) in (Replicate, Shard) for placement in parameter.placements):
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements}; expected Shard and Replicate alone, as "
            "fully_shard places parameters."
        )
    if parameter.device_mesh != first.device_mesh or sharded_dimensions(parameter) != sharded_dimensions(first):
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements} on {parameter.device_mesh}, and others as "
            f"{first.placements} on {first.device_mesh}. {advice}"
        )
    return parameter.placements, parameter.shape, parameter.stride()


def _own_chunk(tensor: Tensor, mesh: "DeviceMesh", placements: Sequence[Any]) -> Tensor:
    """This process's part of a full tensor, as a view; distribute_tensor would make the views of all processes."""
    for i, placement in enumerate(placements):
        if placement.is_shard():
            size = tensor.shape[placement.dim]
            length = -(-size // mesh.size(i))  # as torch.chunk cuts
            start = min(mesh.get_local_rank(i) * length, size)
            tensor = tensor.narrow(placement.dim, start, min(length, size - start))
    return tensor
