"""The forms of a history that are compared, fed with the same low-rank Fishers.

exact          every task's direction
merge to N     LowRankHistory(max_terms=N): the best N orthogonal directions
N + diagonal   LowRankHistory(max_terms=N, tail="diagonal"): what merging leaves out becomes one diagonal
diagonal       DiagonalHistory of the diagonals a u^2 of the same Fishers: all of it is one diagonal
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import crl_kernels as ck

History = ck.LowRankHistory | ck.DiagonalHistory
EXACT, DIAGONAL = "exact", "diagonal"


def merged(terms: int) -> str:
    return f"merge to {terms}"


def with_tail(terms: int) -> str:
    return f"{terms} + diagonal"


def make(model: nn.Module, limits: Sequence[int]) -> dict[str, History]:
    """An empty history of each form, by name."""
    forms: dict[str, History] = {EXACT: ck.LowRankHistory(model)}
    forms |= {merged(terms): ck.LowRankHistory(model, max_terms=terms) for terms in limits}
    forms |= {with_tail(terms): ck.LowRankHistory(model, max_terms=terms, tail="diagonal") for terms in limits}
    return forms | {DIAGONAL: ck.DiagonalHistory(model)}


def diagonal_of(fisher: ck.LowRankFisher, model: nn.Module) -> ck.DiagonalFisher:
    """sum_k a_k u_kj^2, with the present parameters as the anchor, as the estimate of ``fisher`` had them."""
    terms = fisher.layout.split(fisher.directions.double())
    curvatures = fisher.curvatures
    diagonal = {n: (u.square().flatten(1).T @ curvatures).view(u.shape[1:]).float() for n, u in terms.items()}
    return ck.DiagonalFisher(diagonal, {name: parameter.detach() for name, parameter in model.named_parameters()})
