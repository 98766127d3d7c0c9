"""The user's arguments of a penalty: its strength lam, and learning rates."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A learning rate for all parameters, or an optimizer's param_groups, each with its own.
Rate = float | Tensor | Sequence[Mapping[str, Any]]
# (ratio to the largest rate, indices of the parameters that have it); None stands for all parameters.
Groups = tuple[tuple[float, tuple[int, ...] | None], ...]
ALL: Groups = ((1.0, None),)


def check_strength(argument: str, value: float | Tensor, *, finite: bool = True) -> None:
    """Raises unless ``value`` is a real number >= 0, or a 0-dim tensor of one.

    A tensor's value is checked where that is cheap: on the CPU, outside of compiled code and of transforms.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise TypeError(
                f"{argument} is a {value.dtype} tensor of shape {tuple(value.shape)}; "
                "expected a float or a 0-dim floating-point tensor."
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        try:
            number = value.item()
        except RuntimeError:  # batched by vmap: it has no single value
            return
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    else:
        raise TypeError(f"{argument} is a {type(value).__name__}; expected a float or a 0-dim tensor.")
    # Comparisons, because a float may be symbolic in compiled code.
    if not number >= 0 or (finite and number == math.inf):
        raise ValueError(f"{argument} is {number}; expected a {'finite ' if finite else ''}value >= 0.")
