"""Checks of the numbers of a Fisher or a history, whether they come from an estimate, a file or a state.

Directions, anchors, slopes and anchor projections must be finite; curvatures, also diagonal ones, finite and >= 0.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards, is_sharded
from ..model.names import join_names

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)  # of directions; int8 with scales


def require_numbers(
    argument: str,
    names: Sequence[str],
    parts: Sequence[Tensor],
    *,
    nonnegative: bool = False,
    shards: Shards | None = None,
) -> None:
    """Raises ValueError, naming parameters, unless all parts are finite and, if asked for, >= 0.

    If parameters are sharded, each process has its own parts, and all processes raise together.
    """
    if not parts:
        return
    flags = torch.stack([torch.isfinite(part).all().logical_not() for part in parts]).double()
    if nonnegative:
        flags = torch.maximum(flags, 2.0 * torch.stack([(part < 0).any() for part in parts]))
    codes = (flags if shards is None else shards.max_(flags)).tolist()  # 1: not finite, 2: negative
    if bad := [name for name, code in zip(names, codes, strict=True) if code == 1]:
        raise ValueError(f"{argument} has NaN or infinite values in {join_names(bad)}.")
    if bad := [name for name, code in zip(names, codes, strict=True) if code == 2]:
        raise ValueError(f"{argument} is negative in {join_names(bad)}; expected values >= 0.")


def as_scalars(argument: str, values: Any, device: torch.device) -> Tensor:
    """A float64 tensor of real numbers on ``device``. Raises TypeError for anything else."""
    try:
        tensor = torch.as_tensor(values)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{argument} is a {type(values).__name__}; expected a (K,) tensor of real numbers.") from error
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"{argument} is {tensor.dtype}; expected a (K,) tensor of real numbers.")
    return tensor.detach().to(device, torch.float64)


def require_scalars(argument: str, values: Tensor, count: int, *, nonnegative: bool = False) -> None:
    """Raises ValueError unless ``values`` are ``count`` finite numbers, not sharded and, if asked for, >= 0."""
    if is_sharded(values):
        raise ValueError(f"{argument} is sharded over {values.device_mesh}; expected a whole tensor.")
    if values.shape != (count,):
        raise ValueError(f"{argument} has shape {tuple(values.shape)}; expected ({count},).")
    numbers = values.tolist()
    if not all(math.isfinite(number) and not (nonnegative and number < 0) for number in numbers):
        raise ValueError(f"{argument} is {numbers}; expected finite values{' >= 0' if nonnegative else ''}.")


def require_tensor(argument: str, value: Any, *dtypes: torch.dtype) -> Tensor:
    """Returns ``value``. Raises TypeError or ValueError unless it is a dense tensor of one of ``dtypes``, with data."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} is a {type(value).__name__}; expected a tensor.")
    if value.dtype not in dtypes:
        raise ValueError(f"{argument} is {value.dtype}; expected {' or '.join(map(str, dtypes))}.")
    if value.layout != torch.strided or value.is_meta:
        raise ValueError(
            f"{argument} is a {value.layout} tensor on {value.device}; expected a dense one that has values."
        )
    return value
