"""whole_parameters: a sharded model with full parameters in every process, for per-sample gradients."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from .fully_sharded import FSDP, find_fully_sharded, fsdp_modules
from .shards import gathered

_open: dict[int, Any] = {}  # id of a full parameter in an open block -> its process group


@contextmanager
def whole_parameters(model: nn.Module) -> Generator[Any, None, None]:
    """In the block, a sharded model (FSDP2, HSDP) has its full parameters in every process. Each process can then
    compute per-sample gradients of its own samples, without synchronization. All processes must enter the block
    together.

        with whole_parameters(model), SampleGradients(model) as sg:
            per_sample_loss(model, batch).sum().backward()

    Parameters are gathered on the mesh's device. In the block, the hooks of ``fully_shard`` around the model's forward
    do not run, so there is no mixed precision and no move of inputs to the device either. After the block the model is
    sharded as before; changes and gradients of the full parameters are lost. Blocks may be nested, and an unsharded
    model is not changed. ``diagnose`` enters the block itself. ``estimate_fisher`` never does, and is much faster in
    it. A forward that calls ``unshard()`` is not supported.

    Memory: the full parameters, in every process.

    Yields:
        The process group that shares the model; None if it is not sharded.

    Raises:
        ValueError: parameters that are sharded by something other than ``fully_shard``, or on several meshes.
        RuntimeError: a forward pass that failed has left parameters unsharded.
    """
    sharded = find_fully_sharded(model)
    if sharded is None:
        yield _group_of_open_block(model)
        return
    group = sharded.group()
    replacements: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters have one entry
    with ExitStack() as stack:
        for module in sharded.modules:
            stack.enter_context(_without_fsdp(module))
        try:
            for module, name, parameter in sharded.places:
                if parameter not in replacements:
                    value = gathered(parameter.detach())
                    if value.data_ptr() == parameter.to_local().data_ptr():  # one process
                        value = value.clone()
                    replacements[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                    _open[id(replacements[parameter])] = group
                setattr(module, name, replacements[parameter])
            yield group
        finally:
            for replacement in replacements.values():
                del _open[id(replacement)]
            for module, name, parameter in sharded.places:
                setattr(module, name, parameter)


def _group_of_open_block(model: nn.Module) -> Any:
    """The process group of the open block that the model is in; None if it is in none."""
    for parameter in model.parameters():
        if id(parameter) in _open:
            return _open[id(parameter)]
    if any(next(module.parameters(), None) is not None for module in fsdp_modules(model)):
        raise RuntimeError(
            "model was given to fully_shard, and its parameters are whole: a forward pass that failed has left them "
            "so. Run a forward and a backward pass, or call the model's reset_iter_state()."
        )
    return None


@contextmanager
def _without_fsdp(module: nn.Module) -> Generator[None, None, None]:
    """In the block, the module's forward and its registered methods do not call FSDP."""
    registries: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    orders = [list(registry) for registry in registries]
    removed = [
        {key: hook for key, hook in registry.items() if (getattr(hook, "__module__", None) or "").startswith(FSDP)}
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
    """Whether it is a wrapper that ``register_fsdp_forward_method`` put around a method."""
    if not isinstance(method, MethodType) or not hasattr(method.__func__, "__wrapped__"):
        return False
    module_name: str = getattr(method.__func__, "__globals__", {}).get("__name__", "")
    return module_name.startswith(FSDP)
