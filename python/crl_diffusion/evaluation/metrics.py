"""Metrics by arithmetic: averages and forgetting from the matrices of FIDs and accuracies, and class histograms.

R[i][j], j <= i, is the FID of task j's images after learning task i, lower is better; A[i][j] is their conditional
accuracy: the share of images that a classifier assigns to the class that was asked for. T is the number of tasks.
    average FID                    mean_j R[T-1][j]
    FID when learnt                mean_j R[j][j]
    incremental average            mean_i mean_{j<=i} R[i][j]
    forgetting                     sum_{j<T-1} (R[T-1][j] - R[j][j]) / (T - 1);  positive is worse
    forgetting, divisor T          the same sum divided by T, as in the rank-1 paper (arXiv 2509.23593): the average FID
                                   minus the FID when learnt
    accuracy forgetting            sum_{j<T-1} (A[j][j] - A[T-1][j]) / (T - 1);  positive is worse
    class KL                       see `class_kl`
FIDs themselves are in `fid.py`, the networks in `extractors.py`. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]  # row i holds tasks 0 .. i; rows of tasks that were not evaluated are empty


def average_fid(r: Matrix) -> float:
    return _mean(r[-1])


def fid_when_learnt(r: Matrix) -> float | None:
    """mean_j R[j][j]; None if some task was not followed by an evaluation, as in joint training."""
    return _mean([row[-1] for row in r]) if all(r) else None


def incremental_average_fid(r: Matrix) -> float | None:
    """mean_i mean_{j<=i} R[i][j]; None if some task was not followed by an evaluation, as in joint training."""
    return _mean([_mean(row) for row in r]) if all(r) else None


def forgetting(r: Matrix, divisor: int) -> float | None:
    """sum_j (R[T-1][j] - R[j][j]) / divisor; None for a single task, or if some R[j][j] was not measured."""
    if len(r) < 2 or not all(r):
        return None
    return sum(r[-1][j] - r[j][j] for j in range(len(r) - 1)) / divisor


def class_kl(predicted: Sequence[int], elsewhere: int, asked: Sequence[int]) -> float:
    """KL(p || q) in nats between the classes that a classifier predicts for a task's images and those asked for.

    The cells are the task's K classes and one for all classes of other tasks. predicted[c] and `elsewhere` count the
    predictions, asked[c] the classes that were asked for; N images in all. With half a count added to every cell,
        p_c = (predicted_c + 1/2) / (N + (K + 1) / 2),   q_c = (asked_c + 1/2) / (N + (K + 1) / 2),   KL = sum p ln(p/q)
    so it is 0 if and only if the counts agree, and stays finite. Images of other tasks count: if all are of other
    tasks, KL is about ln(2 N). (Without that cell a model that draws nothing of the task would have an even histogram
    over its classes.) It does not detect classes that trade places; accuracy does. It depends on N, so compare at equal
    counts only.
    """
    if sum(predicted) + elsewhere != sum(asked) or len(predicted) != len(asked):
        raise ValueError(
            f"predicted counts {list(predicted)} and {elsewhere} elsewhere, asked for {list(asked)}; "
            "both must be over the same classes and add up to the same number of images"
        )
    total = sum(asked) + (len(asked) + 1) / 2
    cells = zip([*predicted, elsewhere], [*asked, 0], strict=True)
    return max(0.0, sum((n + 0.5) / total * math.log((n + 0.5) / (m + 0.5)) for n, m in cells))


def headlines(r: Matrix, accuracy: Matrix, kl: Matrix) -> dict[str, Any]:
    """The numbers of a run by name, as in its summary.json."""
    forgotten = forgetting(accuracy, len(accuracy) - 1)
    return {
        "average_fid": average_fid(r),
        "fid_when_learnt": fid_when_learnt(r),
        "incremental_average_fid": incremental_average_fid(r),
        "forgetting": forgetting(r, len(r) - 1),
        "forgetting_divisor_t": forgetting(r, len(r)),
        "accuracy": _mean(accuracy[-1]),
        "accuracy_by_task": list(accuracy[-1]),
        "accuracy_forgetting": None if forgotten is None else -forgotten,
        "accuracy_task_1": accuracy[-1][0],
        "accuracy_task_1_when_learnt": accuracy[0][0] if accuracy[0] else None,
        "class_kl": _mean(kl[-1]) if kl[-1] else None,  # None: rows of an older version, without it
        "fid_matrix": r,
        "accuracy_matrix": accuracy,
        "class_kl_matrix": kl,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
