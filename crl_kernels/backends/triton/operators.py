"""All operators in Triton, by the names under which the registry looks them up."""

# ruff: noqa: F401  (the registry looks the names up)

from .adamw import diagonal_adamw_, low_rank_adamw_
from .penalty import (
    diagonal_accumulate_,
    diagonal_gradient,
    diagonal_quadratic,
    diagonal_shrink_,
    low_rank_accumulate_,
    low_rank_combine,
    low_rank_penalty_accumulate_,
    low_rank_projections,
)
from .sample_matrix import sample_gradient_stats, sample_gram
from .weight_gradients import sample_weight_gradients
