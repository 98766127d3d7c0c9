"""A parameter's state in FusedAdamW: its number of steps, its moments and, for 16-bit parameters, its master copy.

The keys are those of torch's AdamW, ``step``, ``exp_avg`` and ``exp_avg_sq``, and ``master``: a float32 copy of a
float16 or bfloat16 parameter. The step moves the master copy, and the parameter is its rounding.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..backends.memory_order import in_order_of
from ..model.names import join_names

HALF_DTYPES = (torch.float16, torch.bfloat16)
TRAINABLE_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)
_REQUIRED_KEYS = ("step", "exp_avg", "exp_avg_sq")
_PARAMETER_SHAPED_KEYS = ("exp_avg", "exp_avg_sq", "master")  # float32 for a 16-bit parameter


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    half = parameter.dtype in HALF_DTYPES
    theta = parameter.detach().float() if half else parameter
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(theta, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(theta, memory_format=torch.preserve_format),
    }
    return state | {"master": theta} if half else state


def convert_state(parameter: Tensor, state: dict[str, Any]) -> None:
    """Moves a state to its parameter's device and memory order, and to the dtype of the step's arithmetic.

    A 16-bit parameter without a master copy gets one. Any other parameter moves itself, and loses its master copy.
    """
    half = parameter.dtype in HALF_DTYPES
    dtype = torch.float32 if half else parameter.dtype
    state["step"] = torch.as_tensor(state["step"]).to(parameter.device, torch.float32)
    for key in _PARAMETER_SHAPED_KEYS:
        if key in state:
            state[key] = in_order_of(state[key].to(parameter.device, dtype), parameter)
    if half:
        state.setdefault("master", parameter.detach().float())
    else:
        state.pop("master", None)


def read_states(
    states: Mapping[Any, Mapping[str, Any]], keys: Iterable[Any], params: Iterable[Tensor]
) -> tuple[dict[Any, Any], dict[Tensor, dict[str, Any]]]:
    """Checks the states of a ``state_dict``, where ``keys`` are its parameters and ``params`` the optimizer's.

    Returns:
        (states without empty entries, the float32 tensors of each 16-bit parameter, which torch would round).

    Raises:
        ValueError: a state that is incomplete, without data or of another shape than its parameter.
    """
    checked, unrounded = dict(states), {}
    for number, (key, parameter) in enumerate(zip(keys, params, strict=False)):  # torch refuses another number of them
        if not states.get(key):
            continue
        # A flattened distributed checkpoint has {} for an entry that is missing.
        state = {name: value for name, value in states[key].items() if not (isinstance(value, dict) and not value)}
        if state:
            _check_state(f"parameter {number}" if key == number else f"parameter {key!r}", parameter, state)
        checked[key] = state
        if parameter.dtype in HALF_DTYPES:
            unrounded[parameter] = {name: state[name] for name in _PARAMETER_SHAPED_KEYS if name in state}
    return checked, unrounded


def _check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    expected = (
        "expected step, exp_avg and exp_avg_sq, as FusedAdamW and torch.optim.AdamW save them, of the same model."
    )
    if missing := [key for key in _REQUIRED_KEYS if key not in state]:
        raise ValueError(f"the state of {name} lacks {join_names(missing)}; {expected}")
    for key in _PARAMETER_SHAPED_KEYS:
        value = state.get(key, parameter)
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{key!r} in the state of {name} has shape {shape} and the parameter {tuple(parameter.shape)}; "
                f"{expected}"
            )
    if empty := [k for k, v in state.items() if isinstance(v, Tensor) and v.is_meta and not parameter.is_meta]:
        raise ValueError(
            f"{join_names(empty)} in the state of {name} is on the meta device and has no data; {expected}"
        )
