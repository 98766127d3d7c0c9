"""Batches: how many samples one holds, and which parts of it are cut, reordered and joined with the samples.

A batch of N samples is a tree. Its containers are Mappings of any class, dataclasses, attrs classes, named tuples,
other objects that hold tensors as attributes, and lists and tuples. Its leaves:

    a tensor or numpy array of N rows              a column: row i belongs to sample i
    a list or tuple of N things                    a column too: captions, ids, PIL images, dicts of annotations,
                                                   tensors of different sizes; also a PackedSequence or nested tensor
    a string, a number, None, a 0-dim tensor,      a constant: as it is, whatever is done with the samples
    a torch.Size, any other object

N is the common first dimension of the tensors and arrays that lie in no list below the batch itself; without any, of
those in lists too, together with the lengths of lists that hold neither tensors nor containers; if these differ, the
common length of the outermost lists. Tensors of N rows are columns wherever they are: in a batch of two samples, (x, y)
is a container of two columns, and so is {"crops": [a, b]} if a and b have two rows. A list in the batch that could be
both a container of N columns and a column of N containers (N lists of N captions) is refused when it is to be cut, and
so is a list of another length than N.
"""

import copy
import dataclasses
import itertools
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

_CONSTANTS = (str, bytes, bytearray, memoryview, torch.Size, type)  # whatever their length
_Rows = Callable[[Sequence[Any]], Any]  # the same column of one or several batches -> a column of the same kind


def batch_size(batch: Any) -> int:
    """N, see above.

    Raises:
        ValueError: nothing in the batch has N entries, or its tensors and arrays differ in their first dimension.
    """
    readings = [list(_column_lengths(batch, "batch", enter_lists=False))]
    if not readings[0]:
        readings += [list(_column_lengths(batch, "batch", enter_lists=True)), list(_outermost_lists(batch, "batch"))]
    for lengths in readings:
        if len({length for _, length in lengths}) == 1:
            return lengths[0][1]
    first_place: dict[int, str] = {}
    for place, length in readings[0] or readings[1]:
        first_place.setdefault(length, place)
    got = ", ".join(f"{place} has {length}" for length, place in first_place.items())
    raise ValueError(
        f"batch, a {class_name(batch)}, has no common first dimension, the number of its samples: "
        f"{got or 'it holds no tensor and no array'}. Expected a tensor or array, or tuples, lists, dicts, "
        "dataclasses, ... of such, whose first dimension is the sample; what belongs to no sample goes into the loss."
    )


def slice_batch(batch: Any, begin: int, end: int) -> Any:
    """Samples ``begin`` to ``end``: a batch of the same classes, whose tensors and arrays are views.

    Raises:
        ValueError, TypeError: for what cannot be cut, naming its place in the batch.
    """

    def rows(columns: Sequence[Any]) -> Any:
        (column,) = columns
        if isinstance(column, Tensor) and column.layout != torch.strided:
            return column.index_select(0, torch.arange(begin, min(end, len(column)), device=column.device))
        return column[begin:end]

    return _rebuilt([batch], rows)


def reorder_batch(batch: Any, order: Tensor) -> Any:
    """Samples ``order[0]``, ``order[1]``, ...: in another order, fewer, or some of them repeatedly.

    Args:
        order: 1-d integer tensor on any device, entries from 0 to N - 1.
    """
    if order.dim() != 1 or order.is_floating_point() or order.is_complex() or order.dtype == torch.bool:
        raise ValueError(f"order is {order.dtype} of shape {tuple(order.shape)}; expected a 1-d tensor of integers.")
    indices: list[int] = order.tolist()

    def rows(columns: Sequence[Any]) -> Any:
        (column,) = columns
        if isinstance(column, list):
            return [column[i] for i in indices]
        return column.index_select(0, order.to(column.device)) if isinstance(column, Tensor) else column[indices]

    return _rebuilt([batch], rows)


def concatenate_batches(batches: Sequence[Any]) -> Any:
    """One batch of the samples of all of them, of the first one's classes.

    Raises:
        ValueError, TypeError: batches of different structure, tensors whose further dimensions differ, constants that
            differ; naming the place in the batch.
    """

    def rows(columns: Sequence[Any]) -> Any:
        if isinstance(columns[0], list):
            return list(itertools.chain.from_iterable(columns))
        if _is_numpy(columns[0]):
            return sys.modules["numpy"].concatenate(columns)
        return torch.cat(columns)  # type: ignore[arg-type]

    return _rebuilt(batches, rows)


class _Parts(NamedTuple):
    """A container, opened: its parts by place, and what makes a container like it of other parts.

    kind: "named" where every part has a name of its own; "list" for lists and tuples, whose parts may be columns or
    samples; "samples" where they can only be samples.
    """

    kind: Literal["named", "list", "samples"]
    parts: dict[str, Any]
    like: Callable[[list[Any]], Any]


def _opened(node: Any) -> _Parts | None:
    """None for a leaf."""
    if isinstance(node, PackedSequence):
        return _Parts("samples", _numbered(unpack_sequence(node)), lambda rows: pack_sequence(rows, False))
    if isinstance(node, Tensor) and node.is_nested:
        layout = node.layout
        return _Parts(
            "samples", _numbered(node.unbind()), lambda rows: torch.nested.as_nested_tensor(rows, layout=layout)
        )
    if is_array(node) or isinstance(node, _CONSTANTS):
        return None
    if isinstance(node, Mapping):
        return _opened_mapping(node)
    if isinstance(node, tuple) and hasattr(node, "_fields") and hasattr(node, "_make"):
        return _Parts("named", {f".{name}": part for name, part in zip(node._fields, node, strict=True)}, node._make)
    if isinstance(node, list):
        return _Parts("list", _numbered(node), lambda parts: _list_like(node, parts))
    if isinstance(node, Sequence):
        return _Parts("list", _numbered(node), type(node))
    attributes = _attributes(node)
    if (
        dataclasses.is_dataclass(node)
        or hasattr(type(node), "__attrs_attrs__")
        or isinstance(node, SimpleNamespace)
        or any(_rows(value) is not None for value in attributes.values())
    ):
        named = {f".{name}": value for name, value in attributes.items()}
        return _Parts("named", named, lambda parts: _object_like(node, dict(zip(attributes, parts, strict=True))))
    return None


def _opened_mapping(node: Mapping[Any, Any]) -> _Parts:
    values = dict(node.items())
    named = {f"[{key!r}]": value for key, value in values.items()}
    if not isinstance(node, (dict, UserDict)):
        return _Parts("named", named, lambda parts: _mapping_of(type(node), dict(zip(values, parts, strict=True))))
    # A BatchEncoding of a fast tokenizer has its samples' offsets, words, ... outside of the mapping.
    encodings = getattr(node, "__dict__", {}).get("_encodings")

    def like(parts: list[Any]) -> Any:
        copied: Any = copy.copy(node)
        for key, part in zip(values, parts, strict=False):
            copied[key] = part
        if encodings is not None:
            copied._encodings = parts[-1]
        return copied

    return _Parts("named", named if encodings is None else {**named, "._encodings": encodings}, like)


def _mapping_of(kind: type, values: dict[Any, Any]) -> Any:
    mapping = kind(values)
    if set(mapping.keys()) != set(values.keys()):
        raise TypeError(f"{kind.__name__}(dict) has other keys")
    return mapping


def _list_like(node: list[Any], parts: list[Any]) -> list[Any]:
    copied = copy.copy(node)  # a subclass may have attributes
    copied[:] = parts
    return copied


def _object_like(node: Any, attributes: dict[str, Any]) -> Any:
    copied = copy.copy(node)  # no __init__, no __post_init__: they may do more than once what must be done once
    for name, value in attributes.items():
        object.__setattr__(copied, name, value)  # frozen dataclasses too
    return copied


def _attributes(node: Any) -> dict[str, Any]:
    slots = [slot for cls in type(node).__mro__ for slot in _strings(cls.__dict__.get("__slots__", ()))]
    names = [*getattr(node, "__dict__", ()), *(slot for slot in slots if slot not in ("__dict__", "__weakref__"))]
    return {name: getattr(node, name) for name in names if hasattr(node, name)}


def _strings(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


def _numbered(parts: Iterable[Any]) -> dict[str, Any]:
    return {f"[{i}]": part for i, part in enumerate(parts)}


def _is_numpy(node: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(node, numpy.ndarray)


def is_array(node: Any) -> bool:
    """A tensor, a numpy array, or what acts as one tensor, such as a TensorDict with a batch size."""
    if isinstance(node, Tensor):
        return not node.is_nested
    return _is_numpy(node) or (hasattr(type(node), "__torch_function__") and bool(getattr(node, "shape", ())))


def _rows(node: Any) -> int | None:
    """How many rows a tensor or array has; None for a leaf or container of another kind, and without dimensions."""
    return int(node.shape[0]) if is_array(node) and len(node.shape) else None


def class_name(node: Any) -> str:
    return type(node).__name__


def _is_column_only(opened: _Parts) -> bool:
    """A list of neither tensors nor containers: whatever it has is one for each sample."""
    return opened.kind == "samples" or (
        opened.kind == "list" and all(_rows(part) is None and _opened(part) is None for part in opened.parts.values())
    )


def _column_lengths(node: Any, place: str, *, enter_lists: bool) -> Iterator[tuple[str, int]]:
    """Place and length of columns, if every list that holds tensors or containers is a container.

    Without ``enter_lists``, only those that lie in no list below the batch itself, and no lists.
    """
    rows, opened = _rows(node), _opened(node)
    if rows is not None:
        yield place, rows
    elif opened is None:
        return
    elif opened.kind == "samples" or (enter_lists and _is_column_only(opened)):
        yield place, len(opened.parts)
    elif enter_lists or opened.kind == "named" or place == "batch":
        for name, part in opened.parts.items():
            yield from _column_lengths(part, place + name, enter_lists=enter_lists)


def _outermost_lists(node: Any, place: str) -> Iterator[tuple[str, int]]:
    opened = _opened(node)
    if opened is None:
        return
    if opened.kind == "list" and (place != "batch" or _is_column_only(opened)):
        yield place, len(opened.parts)
    else:
        for name, part in opened.parts.items():
            yield from _outermost_lists(part, place + name)


def _is_container(opened: _Parts, count: int) -> bool | None:
    """True if the parts are columns of ``count`` samples, or hold such, beside constants; None if all are constants;
    False if a column among them has another length."""
    inside = {_holds_columns(part, count) for part in opened.parts.values()} - {None}
    return None if not inside else inside == {True}


def _is_column(opened: _Parts, count: int) -> bool:
    """Whether the parts may be samples; a tensor of ``count`` rows beside other things is a column, so they are not."""
    arrays = [_rows(part) for part in opened.parts.values() if is_array(part)]
    return (
        opened.kind != "named"
        and len(opened.parts) == count
        and (count not in arrays or len(arrays) == len(opened.parts))
    )


def _holds_columns(node: Any, count: int) -> bool | None:
    """As ``_is_container`` says of parts, of anything."""
    if (rows := _rows(node)) is not None:
        return rows == count
    if (opened := _opened(node)) is None:
        return None
    if opened.kind != "samples" and ((inside := _is_container(opened, count)) or opened.kind == "named"):
        return inside
    return _is_column(opened, count) if opened.parts else None


def _rebuilt(batches: Sequence[Any], rows: _Rows) -> Any:
    """One batch of the first one's classes, in which every column is what ``rows`` makes of it in all the batches."""
    return _rebuilt_at("batch", batches, [batch_size(batch) for batch in batches], rows)


def _rebuilt_at(place: str, nodes: Sequence[Any], counts: Sequence[int], rows: _Rows) -> Any:
    """``_rebuilt`` of what is at one place in each batch."""
    if all(_rows(node) is not None for node in nodes):
        for node, count in zip(nodes, counts, strict=True):
            if len(node) != count:
                raise ValueError(f"{place} has {len(node)} rows in a batch of {count} samples; expected one for each.")
        if len(shapes := dict.fromkeys(tuple(node.shape[1:]) for node in nodes)) > 1:
            raise ValueError(
                f"{place} has samples of shapes {' and '.join(map(str, shapes))} in different batches, which cannot "
                "be one tensor; pad or crop them to one shape, or give lists of tensors."
            )
        return rows(nodes)
    opened = [parts for parts in map(_opened, nodes) if parts is not None]
    if not opened:
        return _constant(place, nodes, counts)
    first = opened[0]
    if len(opened) < len(nodes) or len({parts.kind for parts in opened}) > 1:
        kinds = dict.fromkeys(map(class_name, nodes))
        raise ValueError(f"{place} is a {' in one batch, in another a '.join(kinds)}; expected the same in all.")
    if _is_one_column(place, nodes, opened, counts):
        parts = rows([list(of_batch.parts.values()) for of_batch in opened])
    else:
        for of_batch in opened:
            if of_batch.parts.keys() != first.parts.keys():
                different = ", ".join(place + name for name in sorted(of_batch.parts.keys() ^ first.parts.keys()))
                raise ValueError(f"some batches have {different} and others do not; expected the same in all.")
        parts = [
            _rebuilt_at(place + name, [of_batch.parts[name] for of_batch in opened], counts, rows)
            for name in first.parts
        ]
    try:
        return first.like(parts)
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(
            f"{place} is a {class_name(nodes[0])}, and another one cannot be made of its parts ({error}). Give a dict, "
            "list, tuple or dataclass instead, or a class that can be made of a dict or a list."
        ) from error


def _is_one_column(place: str, nodes: Sequence[Any], opened: Sequence[_Parts], counts: Sequence[int]) -> bool:
    """Whether a container's parts are samples, or columns; refused where they could be either or neither."""
    kind, both = opened[0].kind, list(zip(opened, counts, strict=True))
    if kind == "named":
        return False
    if place == "batch":
        return all(_is_column_only(parts) for parts in opened)
    column = all(_is_column(parts, count) for parts, count in both)
    container = all(_is_container(parts, count) for parts, count in both)
    if not column:
        for node, (parts, count) in zip(nodes, both, strict=True):
            length = len(parts.parts)
            if length not in (0, count) and not any(_holds_columns(part, count) for part in parts.parts.values()):
                raise ValueError(
                    f"{place} is a {class_name(node)} of length {length} in a batch of {count} samples; expected one "
                    "entry for each sample, or columns of them. What belongs to no sample goes into the loss."
                )
        return False
    if kind == "samples" or not container:
        return True
    if all(is_array(part) for parts in opened for part in parts.parts.values()):
        return False
    count = counts[0]
    raise ValueError(
        f"{place} is a {class_name(nodes[0])} of {count} containers that hold {count} entries each, in a batch of "
        f"{count} samples: they could be samples or columns, so it cannot be cut. Give columns in a dict, or batches "
        "of another size."
    )


def _constant(place: str, nodes: Sequence[Any], counts: Sequence[int]) -> Any:
    """What is no column, the same in all batches."""
    first = nodes[0]
    for node, count in zip(nodes, counts, strict=True):
        known = is_array(node) or isinstance(node, _CONSTANTS)
        if not known and hasattr(type(node), "__len__") and len(node) == count:
            raise TypeError(
                f"{place} is a {class_name(node)} of length {count}, as many as the batch has samples, and it is not "
                "known how to cut it; give a tensor, an array or a list."
            )
        if not (node is first or (type(node) is type(first) and bool(node == first))):
            raise ValueError(
                f"{place} is {first!r} in one batch and {node!r} in another, and cannot be both in one that holds the "
                "samples of all; give a value for each sample, or none."
            )
    return first
