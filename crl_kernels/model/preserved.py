"""Context managers that restore a model after an estimate: mode, buffers, gradients, hooks, random state."""

import random
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
def without_gradient_hooks(parameters: Iterable[Tensor]) -> Generator[None, None, None]:
    """Disables hooks of ``Tensor.register_hook`` on parameters: they are made for a batch's gradient, not for a single
    sample's."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    try:
        for parameter, _ in hooks:
            parameter._backward_hooks = None
        yield
    finally:
        for parameter, hook in hooks:
            parameter._backward_hooks = hook


@contextmanager
def preserved(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Sets evaluation mode and removes gradients; restores mode, buffers, gradients, hooks and the global random state
    after the block, also if it raises."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # Disabled in the block: an optimizer that steps inside of the backward pass would train the model.
    hooks = [(parameter, parameter._post_accumulate_grad_hooks) for parameter in model.parameters()]
    try:
        with same_random_numbers(device), without_gradient_hooks(model.parameters()):
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None  # so that backward passes allocate new tensors
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, hook in hooks:
            parameter._post_accumulate_grad_hooks = hook
