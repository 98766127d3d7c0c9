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


class RandomState:
    """The present state of torch's global generators (of the CPU and of one device), random, numpy and others."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator] = ()) -> None:
        self._device = None if device.type == "cpu" else device
        self._torch = torch.get_rng_state()
        self._of_device = None if self._device is None else torch.get_device_module(device).get_rng_state(device)
        self._python = random.getstate()
        self._numpy = sys.modules.get("numpy")
        self._of_numpy = None if self._numpy is None else self._numpy.random.get_state()
        self._generators = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._of_device, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._of_numpy)
        for generator, state in self._generators:
            generator.set_state(state)


@contextmanager
def same_random_numbers(
    device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Generator[None, None, None]:
    """Afterwards torch, random, numpy and ``generators`` are in the state in which they were before."""
    state = RandomState(device, generators)
    try:
        yield
    finally:
        state.restore()


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
