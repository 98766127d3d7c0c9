"""The vectors of a history's state, which are directions, curvatures and anchors: how they lie along the model's
parameters, how they are taken from a Fisher or read from a saved state, and which parts of them the operators get.

A vector is one flat tensor over all bound parameters, in the order of the parameters' memory; one in int8 is row-major.
Of sharded parameters, it has this process's parts.
"""

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..backends.int8 import Int8Vector, scales_shape
from ..backends.memory_order import FlatOrder
from ..distributed.shards import Shards, gathered
from ..fisher.validation import require_numbers, require_tensor
from ..model.binding import Binding
from ..model.flat import FlatRun
from ..model.names import Layout

CACHES = ("_parts", "_parameter_run", "_gradient_run")  # attributes that copies do without

# A vector's part in a state: "directions.0.net.weight" is of direction 0, "anchor.net.weight" of the anchor.
_PART = re.compile(r"((?:directions\.\d+|scales\.\d+|fisher_diagonal|anchor)\.)(.+)", re.DOTALL)


def split_key(key: str) -> tuple[str, str]:
    """(vector's prefix, parameter's name) of a key of a state; ("", key) of what belongs to no parameter."""
    part = _PART.fullmatch(key)
    return ("", key) if part is None else (part[1], part[2])


def differentiable_through(tensor: Tensor) -> Tensor:
    """A constant of a penalty, for autograd to save; it does not save what was made in torch.inference_mode()."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _with_rows(tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` with rows of zeros appended, if it differs from ``shape`` only by having fewer rows."""
    if tensor.dim() != len(shape) or not shape or tensor.shape[1:] != shape[1:] or len(tensor) >= shape[0]:
        return tensor
    full = gathered(tensor)
    return torch.cat([full, full.new_zeros(shape[0] - len(full), *shape[1:])])


class StateVectors(ABC):
    """The state of a history, without the numbers that belong to no parameter."""

    _scalar_keys: ClassVar[tuple[str, ...]]  # keys of a state that do not belong to parameters
    _has_int8 = False  # whether a vector is in int8, which no flat tensor is for operators

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._device = binding.device
        self._order = self._present_order()  # of the elements of the vectors
        self._clear_caches()

    def _clear_caches(self) -> None:
        self._parts: dict[tuple[int, ...] | None, list[Tensor]] = {}  # cache of _pieces, until the state changes
        self._parameter_run, self._gradient_run = (FlatRun(self._binding.shards.lengths) for _ in range(2))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bound parameters, without wrapper prefixes, in the order of the state."""
        return self._binding.layout.names

    # Their order in memory

    @abstractmethod
    def _map_vectors(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces each flat vector of the state by a function of it."""

    def _present_order(self) -> FlatOrder:
        """The order that the parameters have now; parts of sharded parameters are row-major."""
        return FlatOrder(self._binding.params if self._binding.shards.unsharded else [])

    def _follow_memory_order(self) -> None:
        """Rearranges the state if parameters have changed their order, as model.to(memory_format=...) does it. Without
        this, every operator would copy what is in another order than the parameter."""
        if torch.compiler.is_compiling() or not self._binding.shards.unsharded:
            return
        if not self._order.is_of(self._binding.params):
            order = self._present_order()
            if not order.same_as(self._order):
                with torch.inference_mode(False):  # autograd may save the new vectors later
                    self._map_vectors(lambda flat: order.flatten(self._order.split(flat)))
            self._order = order

    # By parameter name

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector of the state as views by parameter name, sharded as the parameters are."""
        parts = self._order.split(flat) if self._binding.shards.unsharded else self._binding.shards.join(flat)
        return dict(zip(self.names, parts, strict=True))

    def _named_row_major(self, flat: Tensor, *, scales: bool = False) -> dict[str, Tensor]:
        """The same for a vector in row-major order, or for the scales of one."""
        if not self._binding.shards.unsharded:
            return dict(zip(self.names, self._binding.shards.join(flat, scales=scales), strict=True))
        return (self._binding.layout.of_scales() if scales else self._binding.layout).split(flat)

    def _scales_lengths(self) -> list[int]:
        return [scales_shape(shape).numel() for shape in self._binding.shards.shapes]

    # From a Fisher, whose parameters may be in another order

    def _bound(self, layout: Layout, flat: Tensor, shards: Shards | None = None) -> Tensor:
        """A flat (P,) or (K, P) tensor of another layout, in this history's order and on its device; this process's
        part if parameters are sharded. With ``shards``, ``flat`` is this process's part in the layout's order."""
        if not self._binding.shards.unsharded:
            parts = self._cut_rows(layout, [flat] if flat.dim() == 1 else flat, shards)
            return torch.stack(parts).view(*flat.shape[:-1], len(parts[0])).to(self._device)
        self._require_whole(shards)
        ordered = self._binding.layout.reorder(flat, layout)
        if not self._order.is_row_major:
            ordered = self._order.flatten(self._binding.layout.split(ordered).values(), ordered.shape[:-1])
        return ordered.to(self._device)

    def _bound_int8(self, layout: Layout, stored: Int8Vector, shards: Shards | None = None) -> list[Int8Vector]:
        """The K vectors of another layout as ``_bound`` has them, but in row-major order."""
        own = self._binding.shards
        own.require_rows(self.names)
        if own.unsharded:
            self._require_whole(shards)
            layouts = self._binding.layout, self._binding.layout.of_scales()
            q, scales = (
                to.reorder(rows, of) for to, of, rows in zip(layouts, (layout, layout.of_scales()), stored, strict=True)
            )
            return [Int8Vector(*row).to(self._device) for row in zip(q, scales, strict=True)]
        parts = (
            self._cut_rows(layout, stored.q, shards),
            self._cut_rows(layout.of_scales(), stored.scales, shards, scales=True),
        )
        return [Int8Vector(*row).to(self._device) for row in zip(*parts, strict=True)]

    def _cut_rows(
        self, layout: Layout, rows: Iterable[Tensor], shards: Shards | None, *, scales: bool = False
    ) -> list[Tensor]:
        """This process's parts of vectors of another layout. With ``shards`` the vectors are parts already."""
        parts = []
        for row in rows:
            tensors = layout.split(row).values() if shards is None else shards.join(row, scales=scales)
            parts.append(self._cut(dict(zip(layout.names, tensors, strict=True))))
        return parts

    def _cut(self, named: Mapping[str, Tensor]) -> Tensor:
        """This process's part of a vector by parameter name, flat."""
        return torch.cat([part.reshape(-1) for part in self._binding.shards.cut([named[n] for n in self.names])])

    def _require_whole(self, shards: Shards | None) -> None:
        if shards is not None:
            raise ValueError(
                "fisher is sharded and the history's parameters are whole; save it with fisher.save(path) in all "
                "processes, and append load_fisher(path)."
            )

    # From a saved state

    def _require_shapes(self, state: Mapping[str, Tensor], origin: str, grown: Container[str]) -> None:
        """Raises ValueError for a part of a vector that has another shape than the model's, such as one process's part
        of a sharded one."""
        own = self._binding.layout
        shapes = [dict(zip(layout.names, layout.shapes, strict=True)) for layout in (own, own.of_scales())]
        for key, tensor in state.items():
            prefix, name = split_key(key)
            shape = shapes[prefix.startswith("scales.")].get(name)
            if prefix and shape is not None and name not in grown and isinstance(tensor, Tensor):
                saved = Layout([name], [tensor.shape])
                Layout([name], [shape]).require_same_parameters(saved, "the model", origin)

    def _vectors_of(
        self,
        state: Mapping[str, Tensor],
        prefixes: Sequence[str],
        dtypes: Sequence[torch.dtype],
        origin: str,
        grown: Container[str],
    ) -> list[Tensor]:
        """The flat vectors whose parts a state has under prefix + parameter name, checked against the model. New
        elements of ``grown`` parameters are zero. Raises ValueError for parts of other vectors."""
        named: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
        for key, tensor in state.items():
            prefix, name = split_key(key)
            if prefix in named:
                named[prefix][name] = tensor
            elif key not in self._scalar_keys:
                raise ValueError(
                    f"{origin} has {key!r}, which no {type(self).__name__} of its terms has; expected what one saved."
                )
        return [self._vector_of(parts, prefix, dtypes, origin, grown) for prefix, parts in named.items()]

    def _vector_of(
        self,
        named: Mapping[str, Tensor],
        prefix: str,
        dtypes: Sequence[torch.dtype],
        origin: str,
        grown: Container[str],
    ) -> Tensor:
        """One flat vector, from its parts by parameter name."""
        vector_name, shards = f"{prefix.removesuffix('.')} in {origin}", self._binding.shards
        own, described, lengths = self._binding.layout, "the model", shards.lengths
        if scales := prefix.startswith("scales."):
            own, described, lengths = own.of_scales(), "the scales of the model", self._scales_lengths()
            dtypes = (torch.float32,)
        for name, tensor in named.items():
            require_tensor(f"{prefix}{name} in {origin}", tensor, *dtypes)
        if len(kinds := {f"{tensor.dtype} on {tensor.device}" for tensor in named.values()}) != 1:
            listed = ", ".join(sorted(kinds)) or "absent"
            raise ValueError(f"{vector_name} is {listed}; expected tensors of one dtype, on one device.")
        stored = self._binding.rename(Layout(list(named), [tensor.shape for tensor in named.values()]))
        parts, like = dict(zip(stored.names, named.values(), strict=True)), next(iter(named.values()))
        for name, shape in zip(self.names, own.shapes, strict=True):
            if name in grown:
                known = parts.get(name)
                new = torch.zeros(shape, dtype=like.dtype, device=like.device) if known is None else known
                parts[name] = _with_rows(new, shape)
        layout = Layout(list(parts), [tensor.shape for tensor in parts.values()])
        own.require_same_parameters(
            layout,
            described,
            origin,
            if_missing="If they have joined the model since, name them in grown=. ",
            if_unknown=self._binding.why_unbound(layout.names),
        )
        if like.dtype == torch.int8:
            shards.require_rows(self.names)
        if not shards.unsharded:
            flat = self._cut(parts).to(self._device)
        elif scales or like.dtype == torch.int8:
            flat = own.reorder(layout.flatten(parts), layout).to(self._device)
        else:
            flat = self._bound(layout, layout.flatten(parts))
        numbers = 127 * flat if scales else flat  # no element in int8 is larger
        self._require_numbers(vector_name, numbers, lengths, nonnegative=scales or prefix == "fisher_diagonal.")
        return flat

    def _require_numbers(
        self, vector_name: str, flat: Tensor, lengths: list[int] | None = None, *, nonnegative: bool = False
    ) -> None:
        """Raises ValueError, by parameter, unless a vector of the state is finite and, if asked for, >= 0."""
        shards = self._binding.shards
        parts = flat.split(lengths or shards.lengths)
        require_numbers(vector_name, self.names, parts, nonnegative=nonnegative, shards=shards)

    # For operators

    def _pieces(self, vectors: Sequence[Tensor | Int8Vector], members: tuple[int, ...] | None) -> list[Tensor]:
        """The parts of the state's vectors that belong to the parameters ``members``, vector by vector, as operators
        take them. None stands for all parameters: the vectors themselves, if they are row-major and none is in int8."""
        if members is None and self._are_flat():
            return cast(list[Tensor], vectors)
        pieces = self._parts.get(members)
        if pieces is None:
            pieces = self._split(vectors, range(len(self.names)) if members is None else members)
            if not torch.compiler.is_compiling():
                self._parts[members] = pieces
        return pieces

    def _constant_pieces(
        self, vectors: Sequence[Tensor | Int8Vector], members: tuple[int, ...] | None, along: Sequence[Tensor]
    ) -> list[Tensor]:
        """The same, for an operator that runs along these tensors and whose result is not differentiated: one tensor a
        vector where their memory is in the order of the state, because each tensor of a list costs time."""
        if members is not None or self._order.is_row_major or self._has_int8 or torch.compiler.is_compiling():
            return self._pieces(vectors, members)
        params = self._binding.params  # their order has been looked at in this call
        all_of_them = len(along) == len(params) and all(map(operator.is_, along, params))
        return [cast(Tensor, v)[None] for v in vectors] if all_of_them else self._pieces(vectors, members)

    def _are_flat(self) -> bool:
        """Whether operators take the state's vectors as they are."""
        return self._order.is_row_major and not self._has_int8

    def _split(self, vectors: Sequence[Tensor | Int8Vector], members: Sequence[int]) -> list[Tensor]:
        """The parts of vectors, for operators; with tensors of scales, if the state has vectors in int8."""
        pieces: list[Tensor] = []
        for vector in vectors:
            if isinstance(vector, Int8Vector):
                parts, scales = vector.split(self._binding.shards.shapes)
            else:
                lengths = self._binding.shards.lengths
                parts = list(vector.split(lengths) if self._order.is_row_major else self._order.split(vector))
                scales = [vector.new_empty(0, dtype=torch.float32)] * len(parts)
            pieces += [parts[i] for i in members]
            if self._has_int8:
                pieces += [scales[i] for i in members]
        return pieces

    def _run_or_list(self, params: list[Tensor]) -> list[Tensor]:
        """[one flat tensor over all parameters] if they lie in one buffer (flatten_parameters), else ``params``."""
        if torch.compiler.is_compiling() or self._has_int8:
            return params
        run = self._parameter_run.find(params)
        return params if run is None else [run]
