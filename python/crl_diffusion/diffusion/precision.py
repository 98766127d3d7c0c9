"""The arithmetic of the network: fp32, fp64, or 16 bits through autocast, with a gradient scaler for fp16."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The parts of a step that depend on the arithmetic: dtype of the parameters, autocast, gradient scaler."""

    def __init__(self, name: str, device: torch.device) -> None:
        self._double = name == "fp64"
        self._device, self._autocast = device, AUTOCAST.get(name)
        # fp16 has no numbers below 6e-8: the loss is scaled up so that gradients do not vanish.
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def of(self, model: nn.Module) -> nn.Module:
        """The model with parameters of this precision."""
        return model.double() if self._double else model

    def autocast(self) -> AbstractContextManager[object]:
        """For forward passes."""
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the scale of the gradients. Call it before anything is added to them or their norm is taken."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """The step of the optimizer, unless gradients have overflowed. Returns whether the step was taken."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold: the current scale, and its number of steps without an overflow."""
        if self.scaler is None:
            return {}
        state = self.scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float64),
            "good_steps": torch.tensor(state["_growth_tracker"]),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.scaler is not None:
            loaded = {"scale": state["scale"].item(), "_growth_tracker": int(state["good_steps"])}
            self.scaler.load_state_dict({**self.scaler.state_dict(), **loaded})
