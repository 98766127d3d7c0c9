"""Rank-1 EWC for models that must learn something new without forgetting: fused penalties and Fisher estimators.

    history = LowRankHistory(model)
    history.append(estimate_fisher(model, per_sample_loss, loader))   # after each task
    loss = task_loss + rank1_ewc_penalty(history, lam=15_000.0)       # in any trainer

``python -m crl_kernels`` says what was built and what runs. ``__all__`` is the public API; the rest may change.
"""

from .diagnostics import Diagnosis, diagnose
from .diagonal_history import DiagonalHistory
from .estimate import estimate_fisher
from .fisher import DiagonalFisher, FisherStatistics, LowRankFisher, load_fisher
from .flat_parameters import flatten_parameters
from .forward_mode import jvp_projections
from .low_rank_history import LowRankHistory
from .optim import FusedAdamW
from .penalty import diagonal_ewc_penalty, rank1_ewc_penalty
from .sample_gradients import SampleGradients
from .sample_matrix import (
    SampleGradientStats,
    SampleGradientStatsWithDiagonal,
    sample_gradient_stats,
    sample_gram,
)
from .unsharded import whole_parameters

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "DiagonalFisher",
    "DiagonalHistory",
    "FisherStatistics",
    "FusedAdamW",
    "LowRankFisher",
    "LowRankHistory",
    "SampleGradientStats",
    "SampleGradientStatsWithDiagonal",
    "SampleGradients",
    "diagnose",
    "diagonal_ewc_penalty",
    "estimate_fisher",
    "flatten_parameters",
    "jvp_projections",
    "load_fisher",
    "rank1_ewc_penalty",
    "sample_gradient_stats",
    "sample_gram",
    "whole_parameters",
]
