"""LowRankFisher and DiagonalFisher: the curvature of one learned task, for elastic weight consolidation.

The empirical Fisher of a task is F = mean_i g_i g_i^T over per-sample gradients g_i. Two approximations of it:

    LowRankFisher    F ~ sum_k a_k u_k u_k^T   directions u_k, curvatures a_k, and the anchor only as b_k = u_k . theta*
    DiagonalFisher   F ~ diag(F_jj)            the diagonal, and the anchor theta* itself

Source: rank-1 form and coefficient c*: arXiv 2509.23593; diagonal form: Kirkpatrick et al., arXiv 1612.00796.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict

import torch
from torch import Tensor

from .. import files, operators
from ..backends.int8 import Int8Vector, stored_values
from ..distributed.agreement import digest
from ..distributed.shards import Shards
from ..model.names import Layout, join_names
from .statistics import FisherStatistics
from .validation import STORAGE_DTYPES, as_scalars, require_numbers, require_scalars, require_tensor


def _layout_of(tensors: Mapping[str, Tensor], argument: str, leading: int = 0) -> Layout:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{argument} is {type(tensors).__name__}; expected a mapping from parameter names to tensors.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{name!r}] is {type(tensor).__name__}; expected a tensor.")
    if not tensors:
        raise ValueError(f"{argument} is empty; expected one tensor per parameter.")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{argument}[{name!r}] is {tensor.dtype}; expected a real floating-point dtype.")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{argument} is on {', '.join(sorted(map(str, devices)))}; expected one device.")
    return Layout(list(tensors), [tensor.shape[leading:] for tensor in tensors.values()])


def _require_finite(tensors: Mapping[str, Tensor], argument: str) -> None:
    require_numbers(argument, list(tensors), list(tensors.values()))


def _num_terms(directions: Mapping[str, Tensor]) -> int:
    """K of (K, \\*shape) tensors."""
    leading = {tensor.shape[:1] for tensor in directions.values()}
    if len(leading) != 1 or leading == {()}:
        raise ValueError("directions are (K, *shape) tensors of one K; their leading dimensions differ.")
    if leading == {(0,)}:
        raise ValueError("directions are (K, *shape) tensors of K = 0; expected at least one term.")
    return leading.pop()[0]


def _pieces(stored: Int8Vector, layout: Layout) -> list[Tensor]:
    """As the operators take directions in int8."""
    terms = (Int8Vector(*term).split(layout.shapes) for term in zip(*stored, strict=True))
    return [piece for q, scales in terms for piece in (*q, *scales)]


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _state_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32


class _Fisher(ABC):
    """What both forms share: vectors over all parameters, flat, of which each process may have its shards alone."""

    layout: Layout
    statistics: FisherStatistics | None
    shards: Shards | None = None

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        """A (P,) vector by parameter name, as views, sharded as the parameters are."""
        if self.shards is None:
            return self.layout.split(vector)
        return dict(zip(self.layout.names, self.shards.join(vector), strict=True))

    @property
    def _shapes(self) -> Sequence[torch.Size]:
        """Of the parameters in this process."""
        return self.layout.shapes if self.shards is None else self.shards.shapes

    def _gathered(self, vectors: Tensor, *, scales: bool = False) -> dict[str, Tensor]:
        """(P,) or (K, P) vectors, or the scales of such, by parameter name; of a sharded model full ones, in the mesh's
        first process alone."""
        if self.shards is None:
            return (self.layout.of_scales() if scales else self.layout).split(vectors)
        if vectors.dim() == 1:
            return self.shards.gathered_on_first(self._named(vectors))
        names, shards = self.layout.names, self.shards
        rows = [
            shards.gathered_on_first(dict(zip(names, shards.join(row, scales=scales), strict=True))) for row in vectors
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _require_numbers(self, argument: str, vectors: Tensor, *, nonnegative: bool = False) -> None:
        lengths = self.layout.lengths if self.shards is None else self.shards.lengths
        parts = vectors.split(lengths, dim=-1)
        require_numbers(argument, self.layout.names, parts, nonnegative=nonnegative, shards=self.shards)

    @abstractmethod
    def _vectors(self) -> dict[str, Tensor]:
        """The vectors by the names that they have in a file, ``_gathered``."""

    def _scalars(self) -> dict[str, Tensor]:
        """The tensors of a file that belong to no parameter."""
        return {}

    def _write(self, path: str | os.PathLike[str]) -> None:
        if self.shards is not None:
            self.shards.require_all("save")
        tensors = self._vectors() | self._scalars()
        facts = {"names": self.layout.names, "statistics": None if self.statistics is None else asdict(self.statistics)}
        if self.shards is None:
            files.write(path, type(self).__name__, tensors, facts)
        else:
            self.shards.on_first(lambda: files.write(path, type(self).__name__, tensors, facts))

    def _described(self) -> str:
        """What it is, and a digest of its numbers; of a sharded one, of those that every process has."""
        tensors = self._scalars() if self.shards is not None else self._vectors() | self._scalars()
        return f"{self!r} with the digest {digest(tensors)}"


class LowRankFisher(_Fisher):
    """F ~ sum_k a_k u_k u_k^T with anchors b_k = u_k . theta*.

    Its penalty is (lam / 2) sum_k a_k (u_k . theta - b_k)^2. Curvatures and anchor projections belong to the directions
    as they are STORED, so to the rounded u_k; theta* is not kept.

    Slopes are the first-order term. The task's expansion along u_k is s_k x + a_k x^2 / 2 with x = u_k . theta - b_k.
    Its minimum is at x = -s_k / a_k and not at theta*, where the mean gradient mu is not exactly zero. A history with
    ``LowRankHistory(first_order=True)`` uses slopes; the paper's penalty does not.

    Args:
        directions: parameter name -> (K, \\*shape) tensor; row k of all of them together is u_k. They need not be
            orthonormal.
        curvatures: (K,), a_k >= 0, in squared gradient units for unit u_k.
        anchor: parameter name -> theta*, the parameters that the task ended with.
        slopes: (K,), s_k = u_k . mu, in gradient units for unit u_k; None if unknown.
        storage_dtype: of the directions: torch.float32 (the default), torch.bfloat16, torch.float64 (the default if any
            direction is float64), or torch.int8: 1 byte for each element, and 4 for the scale of each block of up to
            128 elements, the longest that divides a row of the parameter.
        statistics: the statistics of the estimate; None if the Fisher was not estimated.

    ``estimate_fisher`` of a sharded model gives a Fisher with ``shards``: ``directions`` is then this process's part of
    (K, P), and ``named_directions`` has DTensors.

    Raises:
        TypeError, ValueError: an invalid argument, by name.
    """

    def __init__(
        self,
        directions: Mapping[str, Tensor],
        curvatures: Tensor,
        anchor: Mapping[str, Tensor],
        *,
        slopes: Tensor | None = None,
        storage_dtype: torch.dtype | None = None,
        statistics: FisherStatistics | None = None,
    ) -> None:
        layout = _layout_of(directions, "directions", leading=1)
        num_terms = _num_terms(directions)
        layout.require_same_parameters(_layout_of(anchor, "anchor"), "directions", "anchor")
        if (device := _device_of(anchor)) != _device_of(directions):
            raise ValueError(f"anchor is on {device} and directions on {_device_of(directions)}; expected one device.")
        _require_finite(anchor, "anchor")
        flat = layout.flatten(directions, [num_terms]).detach()
        dtype = storage_dtype or _state_dtype(directions)
        stored: Tensor | Int8Vector = Int8Vector.of(flat, layout.shapes) if dtype == torch.int8 else flat.to(dtype)
        pieces = list(stored) if isinstance(stored, Tensor) else _pieces(stored, layout)
        projections = operators.constant_projections(
            [anchor[name].detach() for name in layout.names], pieces, num_terms
        )
        self._set(layout, stored, curvatures, projections, slopes, statistics)

    @classmethod
    def _from_stored(
        cls,
        layout: Layout,
        directions: Tensor | Int8Vector,
        curvatures: Tensor,
        anchor_projections: Tensor,
        slopes: Tensor | None,
        statistics: FisherStatistics | None,
        shards: Shards | None = None,
    ) -> "LowRankFisher":
        """From flat (K, P) directions as they are stored."""
        fisher = cls.__new__(cls)
        fisher.shards = shards
        fisher._set(layout, directions, curvatures, anchor_projections, slopes, statistics)
        return fisher

    def _set(
        self,
        layout: Layout,
        directions: Tensor | Int8Vector,
        curvatures: Tensor,
        anchor_projections: Tensor,
        slopes: Tensor | None,
        statistics: FisherStatistics | None,
    ) -> None:
        if isinstance(directions, Tensor) and directions.dtype not in STORAGE_DTYPES:
            raise TypeError(f"storage_dtype is {directions.dtype}; expected one of {STORAGE_DTYPES}.")
        self.layout = layout
        self._stored = directions
        device = directions[0].device
        self.curvatures = as_scalars("curvatures", curvatures, device)
        self.anchor_projections = anchor_projections
        self.slopes = None if slopes is None else as_scalars("slopes", slopes, device)
        self.statistics = statistics
        self._require_valid()

    def _require_valid(self) -> None:
        """Raises ValueError if an attribute has values that a Fisher cannot have."""
        names = self.layout.names
        if isinstance(self._stored, Tensor):
            self._require_numbers("directions", self._stored)
        else:
            _, scales = self._stored.split(self._shapes)
            largest = [127 * part for part in scales]  # no element is larger
            require_numbers("directions", names, largest, shards=self.shards)
            require_numbers("scales of directions", names, scales, nonnegative=True, shards=self.shards)
        count = len(self)
        require_scalars("curvatures", self.curvatures, count, nonnegative=True)
        require_scalars("anchor_projections", self.anchor_projections, count)
        if self.slopes is not None:
            require_scalars("slopes", self.slopes, count)

    @classmethod
    def from_mean_gradient(
        cls,
        mean_gradient: Mapping[str, Tensor],
        c: float | Tensor,
        anchor: Mapping[str, Tensor],
        *,
        storage_dtype: torch.dtype | None = None,
    ) -> "LowRankFisher":
        """The paper's (mu, c*, theta*): F ~ c mu mu^T, penalty (lam / 2) c (mu . (theta - theta*))^2.

        Stored as u = mu / |mu| and a = c (mu . u)^2 / |u|^4 for the stored u, which is c |mu|^2 up to rounding; the
        slope is mu . u.

        Args:
            mean_gradient: parameter name -> mu, the task's mean gradient.
            c: the coefficient c* = mean_i (u . g_i)^2 / |mu|^2 >= 0, of the same loss convention as mu.
            anchor: parameter name -> theta*.
            storage_dtype: see ``LowRankFisher``.

        Source: arXiv 2509.23593.
        """
        layout = _layout_of(mean_gradient, "mean_gradient")
        _require_finite(mean_gradient, "mean_gradient")
        if isinstance(c, (str, bytes, bool)):
            raise TypeError(f"c is {c!r}; expected a number.")
        coefficient = float(c)
        if not math.isfinite(coefficient) or coefficient < 0:
            raise ValueError(f"c is {coefficient}; expected a finite value >= 0.")
        mu = layout.flatten({name: tensor.detach().double() for name, tensor in mean_gradient.items()})
        scale = mu.abs().max()  # keeps |mu|^2 from underflowing
        if not bool(scale > 0):
            raise ValueError("mean_gradient is zero everywhere, so it has no direction. Use a diagonal Fisher.")
        norm = scale * (mu / scale).norm()
        dtype = storage_dtype or _state_dtype(mean_gradient)
        stored = stored_values(mu / norm, layout.shapes, dtype)
        directions = {name: tensor[None] for name, tensor in layout.split(stored).items()}
        u = layout.flatten(directions).double()
        slope = mu @ u
        curvature = coefficient * slope.square() / (u @ u).square()
        return cls(directions, curvature.reshape(1), anchor, slopes=slope.reshape(1), storage_dtype=dtype)

    @property
    def directions(self) -> Tensor:
        """The u_k: (K, P), as they are stored; of those in int8 the values, a new float32 tensor."""
        return self._stored if isinstance(self._stored, Tensor) else self._stored.floats(self._shapes)

    def __len__(self) -> int:
        return len(self._stored[0]) if isinstance(self._stored, Int8Vector) else len(self._stored)

    def __repr__(self) -> str:
        dtype = self._stored.dtype if isinstance(self._stored, Tensor) else torch.int8
        return f"LowRankFisher(terms={len(self)}, parameters={self.layout.numel}, {dtype})"

    @property
    def nbytes(self) -> int:
        """Bytes of state in this process."""
        stored = [self._stored] if isinstance(self._stored, Tensor) else self._stored
        tensors = (*stored, self.curvatures, self.anchor_projections, self.slopes)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def named_directions(self) -> list[dict[str, Tensor]]:
        """u_k by parameter name, one dict per term: views, or new tensors for int8; sharded as the Fisher is."""
        return [self._named(u) for u in self.directions]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; read it with ``load_fisher``.

        All processes of a sharded model call it. Tensors are gathered one by one, and the first process writes.
        """
        self._write(path)

    def _vectors(self) -> dict[str, Tensor]:
        directions, *scales = [self._stored] if isinstance(self._stored, Tensor) else self._stored
        tensors = {f"directions.{name}": tensor for name, tensor in self._gathered(directions).items()}
        for part in scales:
            tensors |= {f"scales.{name}": tensor for name, tensor in self._gathered(part, scales=True).items()}
        return tensors

    def _scalars(self) -> dict[str, Tensor]:
        tensors = {"curvatures": self.curvatures, "anchor_projections": self.anchor_projections}
        return tensors if self.slopes is None else tensors | {"slopes": self.slopes}


class DiagonalFisher(_Fisher):
    """F ~ diag(F_jj), F_jj = mean_i g_ij^2, with the anchor theta*.

    Its penalty is (lam / 2) sum_j F_jj (theta_j - theta*_j)^2.

    Args:
        fisher_diagonal: parameter name -> F_jj >= 0, in squared gradient units.
        anchor: parameter name -> theta*.
        statistics: the statistics of the estimate; None if the Fisher was not estimated.

    Raises:
        TypeError, ValueError: an invalid argument, by name.
    """

    def __init__(
        self,
        fisher_diagonal: Mapping[str, Tensor],
        anchor: Mapping[str, Tensor],
        *,
        statistics: FisherStatistics | None = None,
    ) -> None:
        self.layout = _layout_of(fisher_diagonal, "fisher_diagonal")
        self.layout.require_same_parameters(_layout_of(anchor, "anchor"), "fisher_diagonal", "anchor")
        dtype = torch.promote_types(_state_dtype(fisher_diagonal), _state_dtype(anchor))
        self.fisher_diagonal = self.layout.flatten(fisher_diagonal).detach().to(dtype)
        self.anchor = self.layout.flatten(anchor).detach().to(self.fisher_diagonal)
        self.statistics = statistics
        self._require_valid()

    @classmethod
    def _from_shards(
        cls,
        layout: Layout,
        fisher_diagonal: Tensor,
        anchor: Tensor,
        statistics: FisherStatistics,
        shards: Shards,
    ) -> "DiagonalFisher":
        """From this process's parts of flat (P,) tensors of one dtype."""
        fisher = cls.__new__(cls)
        fisher.layout, fisher.shards, fisher.statistics = layout, shards, statistics
        fisher.fisher_diagonal, fisher.anchor = fisher_diagonal, anchor
        fisher._require_valid()
        return fisher

    def _require_valid(self) -> None:
        """Raises ValueError if an attribute has values that a Fisher cannot have."""
        self._require_numbers("fisher_diagonal", self.fisher_diagonal, nonnegative=True)
        self._require_numbers("anchor", self.anchor)

    def __repr__(self) -> str:
        return f"DiagonalFisher(parameters={self.layout.numel}, {self.fisher_diagonal.dtype})"

    @property
    def nbytes(self) -> int:
        """Bytes of state in this process."""
        return self.fisher_diagonal.nbytes + self.anchor.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; see ``LowRankFisher.save``."""
        self._write(path)

    def _vectors(self) -> dict[str, Tensor]:
        tensors = {f"fisher_diagonal.{name}": part for name, part in self._gathered(self.fisher_diagonal).items()}
        return tensors | {f"anchor.{name}": part for name, part in self._gathered(self.anchor).items()}


def load_fisher(path: str | os.PathLike[str]) -> LowRankFisher | DiagonalFisher:
    """Reads a file of ``LowRankFisher.save`` or ``DiagonalFisher.save``, on the CPU.

    Raises:
        OSError: a file that cannot be opened: FileNotFoundError, IsADirectoryError, PermissionError.
        ValueError: a file that is not a safetensors file, is damaged, was changed after it was saved, or holds no
            Fisher; the message names the file.
    """
    kind, tensors, facts = files.read(path)
    if kind not in ("LowRankFisher", "DiagonalFisher"):
        raise ValueError(f"path {os.fspath(path)!r} holds a {kind}; expected a LowRankFisher or a DiagonalFisher.")
    try:
        names, statistics = facts.get("names"), facts.get("statistics")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"names are {names!r}; expected a list of strings.")
        statistics = None if statistics is None else FisherStatistics._from_facts(statistics)
        return (_low_rank_fisher if kind == "LowRankFisher" else _diagonal_fisher)(names, tensors, statistics)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{files.described(path)} holds no {kind}, or is damaged: {error}") from error


def _low_rank_fisher(
    names: Sequence[str], tensors: Mapping[str, Tensor], statistics: FisherStatistics | None
) -> LowRankFisher:
    scalars = {"curvatures", "anchor_projections"} | ({"slopes"} & tensors.keys())
    scales = {key: tensor for key, tensor in tensors.items() if key.startswith("scales.")}
    others = {key: tensor for key, tensor in tensors.items() if key not in scales}
    (directions,) = _by_name(names, others, ["directions."], scalars, STORAGE_DTYPES)
    for name in scalars:
        require_tensor(name, tensors[name], torch.float64)
    num_terms = _num_terms(directions)
    layout = Layout(names, [directions[name].shape[1:] for name in names])
    flat = layout.flatten(directions, [num_terms])
    if flat.dtype != torch.int8 and scales:
        raise ValueError(f"it has {join_names(sorted(scales))} beside directions that are {flat.dtype}.")
    stored = Int8Vector(flat, _scales_of(layout, num_terms, scales)) if flat.dtype == torch.int8 else flat
    return LowRankFisher._from_stored(
        layout,
        stored,
        tensors["curvatures"],
        tensors["anchor_projections"],
        tensors.get("slopes"),
        statistics,
    )


def _scales_of(layout: Layout, num_terms: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """The flat scales of directions in int8."""
    (scales,) = _by_name(layout.names, tensors, ["scales."], set(), (torch.float32,))
    for name, shape in zip(layout.names, layout.of_scales().shapes, strict=True):
        if scales[name].shape != (num_terms, *shape):
            raise ValueError(
                f"scales of {name!r} have shape {tuple(scales[name].shape)}; expected {(num_terms, *shape)}."
            )
    return layout.of_scales().flatten(scales, [num_terms])


def _diagonal_fisher(
    names: Sequence[str], tensors: Mapping[str, Tensor], statistics: FisherStatistics | None
) -> DiagonalFisher:
    diagonal, anchor = _by_name(names, tensors, ["fisher_diagonal.", "anchor."], set(), (torch.float32, torch.float64))
    return DiagonalFisher(diagonal, anchor, statistics=statistics)


def _by_name(
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    prefixes: Sequence[str],
    scalars: Set[str],
    dtypes: Sequence[torch.dtype],
) -> list[dict[str, Tensor]]:
    """The tensors of each prefix by parameter name. Raises ValueError for missing or additional tensors, and for
    several dtypes."""
    expected = {*scalars, *(prefix + name for prefix in prefixes for name in names)}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"it lacks {join_names(missing)}.")
    if unknown := sorted(tensors.keys() - expected):
        raise ValueError(f"it has {join_names(unknown)}, which no Fisher of its parameters has.")
    vectors = [{name: tensors[prefix + name] for name in names} for prefix in prefixes]
    used_dtypes = {require_tensor(f"{name!r}", t, *dtypes).dtype for vector in vectors for name, t in vector.items()}
    if len(used_dtypes) > 1:
        raise ValueError(f"its tensors are of {', '.join(sorted(map(str, used_dtypes)))}; expected one dtype.")
    return vectors
