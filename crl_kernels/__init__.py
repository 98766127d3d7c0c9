"""Rank-1 EWC for models that learn new tasks without forgetting old ones: fused penalties and Fisher estimators.

    history = LowRankHistory(model)
    history.append(estimate_fisher(model, per_sample_loss, loader))   # after each task
    loss = task_loss + rank1_ewc_penalty(history, lam=15_000.0)       # in any trainer

``python -m crl_kernels`` prints what was built and which implementations run. ``__all__`` is the public API; everything
else may change.
"""

from .diagnostics.diagnose import diagnose
from .diagnostics.diagnosis import Diagnosis
from .distributed.unsharded import whole_parameters
from .fisher.estimate import estimate_fisher
from .fisher.forms import DiagonalFisher, LowRankFisher, load_fisher
from .fisher.statistics import FisherStatistics, FisherWarning
from .model.flat import flatten_parameters
from .optim.fused_adamw import FusedAdamW
from .penalty.diagonal import DiagonalHistory
from .penalty.functional import diagonal_ewc_penalty, rank1_ewc_penalty
from .penalty.low_rank import LowRankHistory
from .per_sample.forward_mode import jvp_projections
from .per_sample.matrix import (
    SampleGradientStats,
    SampleGradientStatsWithDiagonal,
    sample_gradient_stats,
    sample_gram,
)
from .per_sample.sample_gradients import SampleGradients

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "DiagonalFisher",
    "DiagonalHistory",
    "FisherStatistics",
    "FisherWarning",
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
