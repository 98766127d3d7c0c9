"""What looking at a model must not change: its mode, buffers, gradients, hooks, and the global random state."""

import random
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def require_no_inference_mode(what: str) -> None:
    """Raises RuntimeError where nothing can be differentiated, whatever torch.enable_grad() says."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} needs gradients, and torch.inference_mode() is on. Call it outside of that.")


@contextmanager
def same_random_numbers(
    device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Generator[None, None, None]:
    """Afterwards torch, random, numpy and ``generators`` are in the state in which they were before."""
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
    """Hooks of ``Tensor.register_hook`` on parameters are not called: what they make of a batch's gradient says nothing
    of a single sample's."""
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
    """Evaluation mode and no gradients; then mode, buffers, gradients and global random state as they were, whatever
    happens."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # An optimizer that steps inside of the backward pass would train the model.
    hooks = [(parameter, parameter._post_accumulate_grad_hooks) for parameter in model.parameters()]
    try:
        with same_random_numbers(device), without_gradient_hooks(model.parameters()):
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None  # backward passes then write tensors of their own
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
