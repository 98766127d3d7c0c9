"""One task's curvature: what elastic weight consolidation keeps of a task after it was learned.

The empirical Fisher of a task is F = mean_i g_i g_i^T over per-sample gradients g_i. Two approximations of it:

    LowRankFisher    F ~ sum_k a_k u_k u_k^T   directions u_k, curvatures a_k, and the anchor only as b_k = u_k . theta*
    DiagonalFisher   F ~ diag(F_jj)            the diagonal, and the anchor theta* itself

Source: rank-1 form and coefficient c*: arXiv 2509.23593; diagonal form: Kirkpatrick et al., arXiv 1612.00796.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import _ops, storage
from .binding import Layout, join_names

_STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class FisherStatistics:
    """What an estimate was made from, how much of F it holds, and how far its numbers may be off.

    Read rho first. mean_gradient_sq_norm and kappa are unbiased, so near an optimum, where mu is lost in noise, they
    may be below zero. Intervals are value +- 1.96 se; where something is not known it is nan. A diagonal Fisher has
    num_samples and trace alone.

    Attributes:
        num_samples: N, of all halves and processes.
        trace: tr F = mean |g_i|^2, in squared gradient units.
        mean_gradient_sq_norm: |mu|^2, without the bias tr(Cov) / N of |mean g_i|^2.
        kappa: |mu|^2 / tr F, the share of the trace that the mean gradient explains.
        rho: sum_k a_k / tr F, the share of the trace that lies along the directions; without strata these are
            orthonormal, so it is at most 1.
        curvature_se: standard error of each curvature of the Fisher, the directions taken as given.
        rho_se, kappa_se: standard errors of rho, the directions taken as given, and of kappa.
        signal_share: M kappa / (M kappa + 1 - kappa), the expected squared cosine between mu and the mean of M
            samples, with M the samples that the directions were made from. It is 1 - 1 / (M k) up to a share of 1 / M,
            if k is the kappa of those M samples with its bias.
        samples_needed: N for which signal_share would be 0.9, 9 (1 - kappa) / kappa times N / M; inf if kappa <= 0.
        stratum: which one these statistics are about; None for all the data.
        share: p_s, the stratum's share of the samples that gave the curvatures.
        strata: the statistics of each stratum, in the order of the Fisher's terms. A stratum's own curvatures are
            those of F_s: the Fisher's divided by p_s.
    """

    num_samples: int
    trace: float
    mean_gradient_sq_norm: float = math.nan
    kappa: float = math.nan
    rho: float = math.nan
    curvature_se: tuple[float, ...] = ()
    rho_se: float = math.nan
    kappa_se: float = math.nan
    signal_share: float = math.nan
    samples_needed: float = math.nan
    stratum: int | None = None
    share: float = 1.0
    strata: tuple["FisherStatistics", ...] = ()

    @property
    def term_strata(self) -> tuple[int | None, ...]:
        """The stratum of each term of the Fisher."""
        return tuple(part.stratum for part in self.strata or (self,) for _ in part.curvature_se)

    @classmethod
    def _from_facts(cls, facts: Mapping[str, Any]) -> "FisherStatistics":
        """From a file: what asdict() gave, through JSON."""
        known = dict(facts)
        known["curvature_se"] = tuple(facts.get("curvature_se", ()))
        known["strata"] = tuple(map(cls._from_facts, facts.get("strata", ())))
        return cls(**known)


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
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"{argument} has NaN or infinite values in {join_names(bad)}.")


def _state_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32


class LowRankFisher:
    """F ~ sum_k a_k u_k u_k^T with anchors b_k = u_k . theta*.

    The penalty that it stands for is (lam / 2) sum_k a_k (u_k . theta - b_k)^2. It is defined by the directions as they
    are STORED, so curvatures and anchor projections belong to the stored, rounded u_k; theta* is not kept.

    Slopes are the first-order term. The task's own expansion along u_k is s_k x + a_k x^2 / 2, x = u_k . theta - b_k:
    lowest at x = -s_k / a_k and not at theta*, where the mean gradient mu is not quite zero. A history takes them into
    account if it is told to (``LowRankHistory(first_order=True)``); the paper's penalty leaves them out.

    Args:
        directions: parameter name -> (K, \\*shape) tensor; row k of all of them together is u_k. They need not be
            orthonormal.
        curvatures: (K,), a_k >= 0, in squared gradient units for unit u_k.
        anchor: parameter name -> theta*, the parameters that the task ended with.
        slopes: (K,), s_k = u_k . mu, in gradient units for unit u_k; or None, if unknown.
        storage_dtype: of the directions: torch.float32 (the default), torch.bfloat16 or torch.float64 (the default if
            any direction is float64).
        statistics: what the estimate says of itself, if it was estimated.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it.
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
        num_terms = {tensor.shape[:1] for tensor in directions.values()}
        if len(num_terms) != 1 or num_terms == {()}:
            raise ValueError("directions are (K, *shape) tensors of one K; their leading dimensions differ.")
        layout.require_same_parameters(_layout_of(anchor, "anchor"), "directions", "anchor")
        _require_finite(anchor, "anchor")
        stored = layout.flatten(directions, num_terms.pop()).to(storage_dtype or _state_dtype(directions))
        projections = _ops.constant_projections(
            [anchor[name].detach() for name in layout.names], list(stored.detach()), len(stored)
        )
        self._set(layout, stored.detach(), curvatures, projections, slopes, statistics)

    @classmethod
    def _from_stored(
        cls,
        layout: Layout,
        directions: Tensor,
        curvatures: Tensor,
        anchor_projections: Tensor,
        slopes: Tensor | None,
        statistics: FisherStatistics | None,
    ) -> "LowRankFisher":
        """From a flat (K, P) tensor of directions in their storage dtype."""
        fisher = cls.__new__(cls)
        fisher._set(layout, directions, curvatures, anchor_projections, slopes, statistics)
        return fisher

    def _set(
        self,
        layout: Layout,
        directions: Tensor,
        curvatures: Tensor,
        anchor_projections: Tensor,
        slopes: Tensor | None,
        statistics: FisherStatistics | None,
    ) -> None:
        if directions.dtype not in _STORAGE_DTYPES:
            raise TypeError(f"storage_dtype is {directions.dtype}; expected one of {_STORAGE_DTYPES}.")
        curvatures = torch.as_tensor(curvatures, dtype=torch.float64, device=directions.device).detach()
        if curvatures.shape != directions.shape[:1]:
            raise ValueError(f"curvatures has shape {tuple(curvatures.shape)}; expected ({len(directions)},).")
        if not bool(torch.isfinite(curvatures).all()) or bool((curvatures < 0).any()):
            raise ValueError(f"curvatures is {curvatures.tolist()}; expected finite values >= 0.")
        if slopes is not None:
            slopes = torch.as_tensor(slopes, dtype=torch.float64, device=directions.device).detach()
            if slopes.shape != directions.shape[:1]:
                raise ValueError(f"slopes has shape {tuple(slopes.shape)}; expected ({len(directions)},).")
            if not bool(torch.isfinite(slopes).all()):
                raise ValueError(f"slopes is {slopes.tolist()}; expected finite values.")
        if not bool(torch.isfinite(directions).all()):
            raise ValueError("directions has NaN or infinite values.")
        self.layout = layout
        self.directions = directions
        self.curvatures = curvatures
        self.anchor_projections = anchor_projections
        self.slopes = slopes
        self.statistics = statistics

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

        Stored as u = mu / |mu| and a = c (mu . u)^2 / |u|^4 for the u that is stored, which is c |mu|^2 up to its
        rounding; the slope is mu . u.

        Args:
            mean_gradient: parameter name -> mu, the task's mean gradient.
            c: the coefficient c* = mean_i (u . g_i)^2 / |mu|^2 >= 0, of the same loss convention as mu.
            anchor: parameter name -> theta*.
            storage_dtype: see :class:`LowRankFisher`.

        Source: arXiv 2509.23593.
        """
        layout = _layout_of(mean_gradient, "mean_gradient")
        _require_finite(mean_gradient, "mean_gradient")
        coefficient = float(c)
        if not math.isfinite(coefficient) or coefficient < 0:
            raise ValueError(f"c is {coefficient}; expected a finite value >= 0.")
        mu = layout.flatten({name: tensor.detach().double() for name, tensor in mean_gradient.items()})
        scale = mu.abs().max()  # keeps |mu|^2 from underflowing
        if not bool(scale > 0):
            raise ValueError("mean_gradient is zero everywhere, so it has no direction. Use a diagonal Fisher.")
        norm = scale * (mu / scale).norm()
        dtype = storage_dtype or _state_dtype(mean_gradient)
        directions = {name: tensor[None] for name, tensor in layout.split((mu / norm).to(dtype)).items()}
        u = layout.flatten(directions).double()
        slope = mu @ u
        curvature = coefficient * slope.square() / (u @ u).square()
        return cls(directions, curvature.reshape(1), anchor, slopes=slope.reshape(1), storage_dtype=dtype)

    def __len__(self) -> int:
        return len(self.directions)

    def __repr__(self) -> str:
        return f"LowRankFisher(terms={len(self)}, parameters={self.layout.numel}, {self.directions.dtype})"

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        scalars = (self.curvatures, self.anchor_projections, self.slopes)
        return self.directions.nbytes + sum(tensor.nbytes for tensor in scalars if tensor is not None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; read it with :func:`load_fisher`."""
        tensors = {f"directions.{name}": tensor for name, tensor in self.layout.split(self.directions).items()}
        tensors |= {"curvatures": self.curvatures, "anchor_projections": self.anchor_projections}
        if self.slopes is not None:
            tensors["slopes"] = self.slopes
        storage.write(path, "LowRankFisher", tensors, _facts(self.layout, self.statistics))


class DiagonalFisher:
    """F ~ diag(F_jj), F_jj = mean_i g_ij^2, with the anchor theta*.

    The penalty that it stands for is (lam / 2) sum_j F_jj (theta_j - theta*_j)^2.

    Args:
        fisher_diagonal: parameter name -> F_jj >= 0, in squared gradient units.
        anchor: parameter name -> theta*.
        statistics: what the estimate says of itself, if it was estimated.

    Raises:
        TypeError, ValueError: for input that does not fit, naming it.
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
        for tensors, argument in ((fisher_diagonal, "fisher_diagonal"), (anchor, "anchor")):
            _require_finite(tensors, argument)
        if bad := [name for name, tensor in fisher_diagonal.items() if bool((tensor < 0).any())]:
            raise ValueError(f"fisher_diagonal is negative in {join_names(bad)}; expected mean squared gradients.")
        dtype = torch.promote_types(_state_dtype(fisher_diagonal), _state_dtype(anchor))
        self.fisher_diagonal = self.layout.flatten(fisher_diagonal).detach().to(dtype)
        self.anchor = self.layout.flatten(anchor).detach().to(self.fisher_diagonal)
        self.statistics = statistics

    def __repr__(self) -> str:
        return f"DiagonalFisher(parameters={self.layout.numel}, {self.fisher_diagonal.dtype})"

    @property
    def nbytes(self) -> int:
        """Bytes of state."""
        return self.fisher_diagonal.nbytes + self.anchor.nbytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; read it with :func:`load_fisher`."""
        tensors = {f"fisher_diagonal.{name}": part for name, part in self.layout.split(self.fisher_diagonal).items()}
        tensors |= {f"anchor.{name}": part for name, part in self.layout.split(self.anchor).items()}
        storage.write(path, "DiagonalFisher", tensors, _facts(self.layout, self.statistics))


def _facts(layout: Layout, statistics: FisherStatistics | None) -> dict[str, Any]:
    return {"names": layout.names, "statistics": None if statistics is None else asdict(statistics)}


def load_fisher(path: str | os.PathLike[str]) -> LowRankFisher | DiagonalFisher:
    """Reads what ``LowRankFisher.save`` or ``DiagonalFisher.save`` wrote, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, damaged, or not a Fisher.
    """
    kind, tensors, facts = storage.read(path)
    statistics = None if facts.get("statistics") is None else FisherStatistics._from_facts(facts["statistics"])
    if kind == "LowRankFisher":
        directions = {name: tensors[f"directions.{name}"] for name in facts["names"]}
        layout = _layout_of(directions, "directions", leading=1)
        curvatures = tensors["curvatures"]
        return LowRankFisher._from_stored(
            layout,
            layout.flatten(directions, curvatures.shape),
            curvatures,
            tensors["anchor_projections"],
            tensors.get("slopes"),
            statistics,
        )
    if kind == "DiagonalFisher":
        return DiagonalFisher(
            {name: tensors[f"fisher_diagonal.{name}"] for name in facts["names"]},
            {name: tensors[f"anchor.{name}"] for name in facts["names"]},
            statistics=statistics,
        )
    raise ValueError(f"path {os.fspath(path)!r} holds a {kind}; expected a LowRankFisher or a DiagonalFisher.")
