"""Directions given by the user, as one row of numbers per direction."""

from collections.abc import Mapping

from torch import Tensor

from ..backends.reference import mean_dtype
from ..model.binding import Binding
from ..model.names import join_names


def rows_of(direction: Mapping[str, Tensor], binding: Binding) -> tuple[bool, list[Tensor]]:
    """(whether it is one direction, without a leading K; (K, numel) of each bound parameter, float32 or float64)."""
    if not isinstance(direction, Mapping):
        raise TypeError(f"direction is a {type(direction).__name__}; expected a mapping from parameter names.")
    layout = binding.layout
    if unknown := [name for name in direction if name not in layout.names]:
        raise ValueError(f"direction has {join_names(unknown)}, which are not among the chosen parameters.")
    leading: set[int | None] = set()
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in direction:
            continue
        tensor = direction[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"direction[{name!r}] is a {type(tensor).__name__}; expected a tensor.")
        if tensor.shape != shape and (tensor.dim() != len(shape) + 1 or tensor.shape[1:] != shape):
            raise ValueError(
                f"direction[{name!r}] has shape {tuple(tensor.shape)}; expected {tuple(shape)}, or (K, *) of it."
            )
        if tensor.device != binding.device:
            raise ValueError(f"direction[{name!r}] is on {tensor.device} and the model on {binding.device}.")
        leading.add(None if tensor.shape == shape else tensor.shape[0])
    if len(leading) != 1:
        raise ValueError("direction is empty, or its tensors have different numbers K of directions.")
    (count,) = leading
    rows = []
    for name, length, parameter in zip(layout.names, layout.lengths, binding.params, strict=True):
        dtype = mean_dtype(parameter.dtype)
        zeros = parameter.new_zeros(count or 1, length, dtype=dtype)
        row = direction[name].detach().to(dtype).reshape(zeros.shape) if name in direction else zeros
        rows.append(row.contiguous())
    return count is None, rows
