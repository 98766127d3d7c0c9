"""Context managers that restore a model after an estimate: mode, buffers, gradients, hooks, random state."""

import random
import sys
from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .zero import require_no_engine


def require_no_inference_mode(caller: str) -> None:
    """Raises RuntimeError in inference mode, where torch.enable_grad() does not enable gradients."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{caller} needs gradients, and torch.inference_mode() is on. Call it outside of that.")


@contextmanager
def same_random_numbers(
    device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Generator[None, None, None]:
    """Restores the random states of torch, random, numpy and ``generators`` after the block."""
    states = [generator.get_state() for generator in generators]
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def seeded_random_numbers(device: torch.device, seed: int) -> Generator[None, None, None]:
    """In the block, torch, random and numpy draw the numbers of ``seed``; afterwards they are as before."""
    with same_random_numbers(device):
        torch.manual_seed(seed)
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % 2**32)
        yield


@contextmanager
def without_gradient_hooks(parameters: Iterable[Tensor]) -> Generator[None, None, None]:
    """Disables hooks of ``register_hook`` and ``register_post_accumulate_grad_hook`` on parameters: they are made for a
    batch's gradient, not for a single sample's; one of the second kind may train the model in the backward pass."""
    parameters = list(parameters)
    hooks = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    later_hooks = [(p, p._post_accumulate_grad_hooks) for p in parameters if p._post_accumulate_grad_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        for parameter, _ in later_hooks:
            parameter._post_accumulate_grad_hooks = OrderedDict()  # autograd keeps calling the old ones after None
        yield
    finally:
        for parameter, hook in hooks:
            parameter._backward_hooks = hook
        for parameter, later_hook in later_hooks:
            parameter._post_accumulate_grad_hooks = later_hook


@contextmanager
def preserved(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Sets evaluation mode and removes gradients; restores mode, buffers, gradients, hooks and the global random state
    after the block, also if it raises.

    Raises:
        ValueError: DeepSpeed's engine, whose state of accumulated gradients it cannot restore.
    """
    require_no_engine(model)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with same_random_numbers(device), without_gradient_hooks(model.parameters()):
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None  # so that backward passes allocate new tensors
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient
