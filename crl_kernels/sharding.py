"""Sharded parameters: of every vector, a process keeps what belongs to its own shards, and nothing is gathered.

The parameters of FSDP2 (``fully_shard``) are DTensors on a mesh of processes. Kernels run on local shards; what is
summed over the whole model, K dot products in float64, is then summed over the mesh's sharded dimensions: one exchange
a step for FSDP, and for HSDP, whose other dimension holds copies.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, distributed, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
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
        self._groups = [self._mesh.get_group(i) for i, cut in enumerate(_cuts(first)) if cut]
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


def _cuts(tensor: "DTensor") -> list[bool]:
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
    if parameter.device_mesh != first.device_mesh or _cuts(parameter) != _cuts(first):
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements} on {parameter.device_mesh}, and others as "
            f"{first.placements} on {first.device_mesh}. {where}"
        )
    return parameter.placements, parameter.shape, parameter.stride()


# A sharded model as a whole one

_FSDP = "torch.distributed.fsdp"
_open: dict[int, Any] = {}  # id of a parameter that is whole for a block -> the group of its processes
_groups: "WeakKeyDictionary[DeviceMesh, Any]" = WeakKeyDictionary()


@contextmanager
def whole_parameters(model: nn.Module) -> Generator[Any, None, None]:
    """In the block, a sharded model (FSDP2, HSDP) is a whole one in every process: per-sample gradients of a process's
    own samples exist there, and processes need not keep step. All of them enter it together.

    ::

        with whole_parameters(model), SampleGradients(model) as sg:
            per_sample_loss(model, batch).sum().backward()

    Parameters are gathered on the mesh's device, and what ``fully_shard`` does around the model's forward is left out:
    mixed precision and the inputs' move to the device, too. Afterwards the model is sharded as it was; changes and
    gradients of the whole parameters are lost. Blocks may lie in each other, and a model that is whole is left alone.
    ``estimate_fisher`` and ``diagnose`` do this by themselves. A forward that calls ``unshard()`` is not served.

    Memory: the whole parameters, in every process.

    Yields:
        The process group of those that share the model; None if it is whole.

    Raises:
        ValueError: parameters that are sharded by something else than ``fully_shard``, or on several meshes.
        RuntimeError: parameters were left whole by a forward pass that failed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    fsdp = sys.modules.get(_FSDP)
    wrapped = [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]
    for module in wrapped:
        module.reshard()  # a forward without a backward pass leaves whole parameters in their places
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    if not places:
        yield _group_of_open_block(model, wrapped)
        return
    group = _group_of(_require_fully_sharded(places, wrapped))
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied one once
    with ExitStack() as stack:
        for module in wrapped:
            stack.enter_context(_without_fsdp(module))
        try:
            for module, name, parameter in places:
                if parameter not in whole:
                    value = gathered(parameter.detach())
                    if value.data_ptr() == parameter.to_local().data_ptr():  # one process
                        value = value.clone()
                    whole[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    _open[id(whole[parameter])] = group
                setattr(module, name, whole[parameter])
            yield group
        finally:
            for replacement in whole.values():
                del _open[id(replacement)]
            for module, name, parameter in places:
                setattr(module, name, parameter)


def _group_of_open_block(model: nn.Module, wrapped: Sequence[nn.Module]) -> Any:
    """None if the model is in no block."""
    for parameter in model.parameters():
        if id(parameter) in _open:
            return _open[id(parameter)]
    if any(next(module.parameters(), None) is not None for module in wrapped):
        raise RuntimeError(
            "model was given to fully_shard, and its parameters are whole: a forward pass that failed has left them "
            "so. Run a forward and a backward pass, or call the model's reset_iter_state()."
        )
    return None


def _require_fully_sharded(places: Sequence[tuple[nn.Module, str, Any]], wrapped: Sequence[nn.Module]) -> "DeviceMesh":
    """The mesh of all of them."""
    from torch.distributed.tensor import Replicate, Shard

    mesh: DeviceMesh = places[0][2].device_mesh
    fully_sharded = {parameter for module in wrapped for parameter in module.parameters()}
    for module, name, parameter in places:
        placements = parameter.placements
        known = all(type(placement) in (Replicate, Shard) for placement in placements) and sum(_cuts(parameter)) == 1
        if parameter not in fully_sharded or not known:
            raise ValueError(
                f"parameter {name!r} of a {type(module).__name__} is placed as {placements}, and not by fully_shard "
                "alone. Tensor-parallel layers cannot be made whole here: use a whole copy of the model."
            )
        if parameter.device_mesh != mesh:
            raise ValueError(
                f"parameter {name!r} of a {type(module).__name__} is on {parameter.device_mesh}, and others are on "
                f"{mesh}. Use a whole copy of the model."
            )
    return mesh


def _group_of(mesh: "DeviceMesh") -> Any:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return distributed.group.WORLD
    if mesh not in _groups:
        _groups[mesh] = distributed.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    return _groups[mesh]


@contextmanager
def _without_fsdp(module: nn.Module) -> Generator[None, None, None]:
    """In the block, neither its forward nor any other method that was registered for it calls FSDP."""
    registries: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    orders = [list(registry) for registry in registries]
    removed = [
        {key: hook for key, hook in registry.items() if (getattr(hook, "__module__", None) or "").startswith(_FSDP)}
        for registry in registries
    ]
    methods = {name: value for name, value in vars(module).items() if _was_registered(value)}
    for registry, hooks in zip(registries, removed, strict=True):
        for key in hooks:
            del registry[key]
    for name, method in methods.items():
        while _was_registered(method):
            method = method.__func__.__wrapped__
        vars(module)[name] = method
    try:
        yield
    finally:
        for registry, hooks, order in zip(registries, removed, orders, strict=True):
            now = {**registry, **hooks}
            registry.clear()
            registry.update({key: now[key] for key in [*order, *now] if key in now})
        vars(module).update(methods)


def _was_registered(method: Any) -> bool:
    """Whether ``register_fsdp_forward_method`` has put it around another."""
    if not isinstance(method, MethodType) or not hasattr(method.__func__, "__wrapped__"):
        return False
    made_in: str = getattr(method.__func__, "__globals__", {}).get("__name__", "")
    return made_in.startswith(_FSDP)
