"""What looking at a model must not change: its mode, buffers, gradients, hooks, and the global random state."""

import random
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


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
def preserved(model: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Evaluation mode and no gradients; then mode, buffers, gradients and global random state as they were, whatever
    happens."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # An optimizer that steps inside of the backward pass would train the model; what hooks make of a batch's gradient
    # says nothing of a single sample's.
    hooks = [(p, p._post_accumulate_grad_hooks, p._backward_hooks) for p in model.parameters()]
    try:
        with same_random_numbers(device):
            model.eval()
            for parameter, _ in gradients:
                parameter.grad = None  # backward passes then write tensors of their own
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
                parameter._backward_hooks = None
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for parameter, after, before in hooks:
            parameter._post_accumulate_grad_hooks, parameter._backward_hooks = after, before
