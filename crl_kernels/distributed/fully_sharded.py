"""Models that ``fully_shard`` has sharded (FSDP2, HSDP): their modules, their mesh, and backward passes whose gradients
are means over known processes."""

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import distributed, nn

from .shards import is_sharded, sharded_dimensions

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FSDP = "torch.distributed.fsdp"
_groups: "WeakKeyDictionary[DeviceMesh, Any]" = WeakKeyDictionary()  # of all processes of a mesh
_alone: "WeakKeyDictionary[DeviceMesh, Any]" = WeakKeyDictionary()  # of this process alone


@dataclass(frozen=True)
class FullySharded:
    """A model whose sharded parameters were all placed by ``fully_shard``, on one mesh."""

    modules: list[Any]  # those that were given to fully_shard
    places: list[tuple[nn.Module, str, Any]]  # of each sharded parameter: module, its name there, and the DTensor
    mesh: "DeviceMesh"

    def group(self) -> Any:
        """The process group of the mesh."""
        if self.mesh.ndim == 1:
            return self.mesh.get_group()
        if self.mesh.size() == distributed.get_world_size():
            return distributed.group.WORLD
        if self.mesh not in _groups:
            ranks = self.mesh.mesh.flatten().tolist()
            _groups[self.mesh] = distributed.new_group(ranks, use_local_synchronization=True)
        return _groups[self.mesh]

    @contextmanager
    def backward_passes(self) -> Generator[Any, None, None]:
        """In the block, every backward pass leaves in ``.grad`` the mean over all processes of the mesh, whatever the
        user has set for training: a factor of his own, accumulation without exchange, a hook. After the block the
        parameters are sharded, also if a pass has failed.

        Yields:
            The mesh's process group.
        """
        settings = {"reduce_grads": True, "all_reduce_grads": True, "gradient_divide_factor": None}
        try:
            with _attributes(self._parameter_groups(), **settings, _all_reduce_hook=None):
                yield self.group()
        except BaseException:
            for module in self.modules:
                if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):  # torch >= 2.14
                    module.reset_iter_state()
            raise
        finally:
            for module in self.modules:
                module.reshard()

    @contextmanager
    def within_copies(self) -> Generator[None, None, None]:
        """In the block, ``.grad`` is the mean over the processes that share one copy of the parameters; HSDP's copies
        do not exchange gradients."""
        infos = [group.mesh_info for group in self._parameter_groups()]
        replicated = [info for info in infos if hasattr(info, "replicate_process_group")]
        if replicated and self.mesh not in _alone:
            _alone[self.mesh] = distributed.new_group([distributed.get_rank()], use_local_synchronization=True)
        with _attributes(replicated, replicate_process_group=_alone.get(self.mesh)):
            yield

    def _parameter_groups(self) -> list[Any]:
        """FSDP's groups of parameters that are gathered and reduced together."""
        groups: list[Any] = []
        for module in self.modules:
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)  # newer torch
            groups += [state._fsdp_param_group] if several is None else several
        return [group for group in groups if group is not None]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that were given to ``fully_shard``."""
    fsdp = sys.modules.get(FSDP)
    return [module for module in model.modules() if fsdp is not None and isinstance(module, fsdp.FSDPModule)]


def find_fully_sharded(model: nn.Module) -> FullySharded | None:
    """None if no parameter is sharded, as in a block of ``whole_parameters``.

    Raises:
        TypeError: not a module.
        ValueError: parameters that are sharded by something other than ``fully_shard``, or on several meshes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
    modules = fsdp_modules(model)
    for module in modules:
        module.reshard()  # a forward without a backward pass leaves the full parameters in place
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    return FullySharded(modules, places, _require_one_mesh(places, modules)) if places else None


def _require_one_mesh(places: Sequence[tuple[nn.Module, str, Any]], modules: Sequence[nn.Module]) -> "DeviceMesh":
    """The mesh of the sharded parameters. Raises ValueError if ``fully_shard`` did not place them all, on one mesh."""
    from torch.distributed.tensor import Replicate, Shard

    mesh: DeviceMesh = places[0][2].device_mesh
    fully_sharded = {parameter for module in modules for parameter in module.parameters()}
    for module, name, parameter in places:
        placements = parameter.placements
        supported = (
            all(type(placement) in (Replicate, Shard) for placement in placements)
            and sum(sharded_dimensions(parameter)) == 1
        )
        if parameter not in fully_sharded or not supported:
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


@contextmanager
def _attributes(objects: Sequence[Any], **values: Any) -> Generator[None, None, None]:
    """In the block, the objects' attributes have these values."""
    before = [(item, name, getattr(item, name)) for item in objects for name in values]
    try:
        for item, name, _ in before:
            setattr(item, name, values[name])
        yield
    finally:
        for item, name, value in reversed(before):  # an object may be there twice
            setattr(item, name, value)
