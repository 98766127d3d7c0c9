"""FID between the real images of a task and generated ones, on an extractor's features, by torchmetrics.

    FID = |mu_r - mu_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2))
with means mu and covariances C (divisor N - 1) of the features. torchmetrics keeps, for each side, the sum of features,
the sum of their outer products and the count, in float64; mean and covariance follow from these. Those of the real
images are computed once, stored, and set as the states of later metrics, which gives the same bits as computing them
again. With few images FID is biased upwards, more so with more features: compare at equal counts only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from crl_diffusion.data.images import to_float
from crl_diffusion.errors import UnreadableError
from crl_diffusion.evaluation.features import Extractor, digest
from crl_diffusion.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


class Statistics(NamedTuple):
    """The statistics of a set of images, with d features, that FID depends on."""

    total: Tensor  # (d,) float64, sum of the features
    products: Tensor  # (d, d) float64, sum of their outer products
    count: Tensor  # () int64, number of images


def real_statistics(extractor: Extractor, pixels: Tensor) -> Statistics:
    """Statistics of uint8 images (N, C, S, S), N >= 2."""
    metric = _metric(extractor)
    _update(metric, extractor, pixels, real=True)
    return Statistics(metric.real_features_sum, metric.real_features_cov_sum, metric.real_features_num_samples)


def fid(extractor: Extractor, real: Statistics, generated: Tensor) -> float:
    """FID of uint8 images (N, C, S, S), N >= 2, against real ones."""
    metric = _metric(extractor)
    metric.real_features_sum, metric.real_features_cov_sum, metric.real_features_num_samples = real
    _update(metric, extractor, generated, real=False)
    return float(metric.compute())


def kept_statistics(extractor: Extractor, pixels: Tensor, folder: Path, subject: dict[str, str]) -> Statistics:
    """`real_statistics`, read from `folder`, or computed and stored there.

    `subject` describes the images (data, size, task, part). The file also holds digests of the extractor, the images
    and the statistics; a file that does not match is replaced.
    """
    if not extractor.keep:
        return real_statistics(extractor, pixels)
    subject = {**subject, "extractor": extractor.name, "images": digest(pixels)}
    key = hashlib.sha256(repr(sorted(subject.items())).encode()).hexdigest()
    path = folder / "real-statistics" / f"{extractor.name}-{key[:12]}.safetensors"
    statistics = _read(path, subject) if path.exists() else None
    if statistics is None:
        statistics = real_statistics(extractor, pixels)
        write_tensors(path, statistics._asdict(), {**subject, "digest": digest(*statistics)})
    return statistics


def _read(path: Path, subject: dict[str, str]) -> Statistics | None:
    try:
        metadata, tensors = read_tensors(path)
        statistics = Statistics(**tensors)
    except (UnreadableError, ValueError, TypeError):  # they are computed again
        return None
    return statistics if metadata == {**subject, "digest": digest(*statistics)} else None


def _metric(extractor: Extractor) -> FrechetInceptionDistance:
    # torchmetrics takes a second to import; commands that only read results do without it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process measures for all of a run: a metric that waited for the others' states would wait for ever.
    return FrechetInceptionDistance(feature=extractor, normalize=True, sync_on_compute=False)


def _update(metric: FrechetInceptionDistance, extractor: Extractor, pixels: Tensor, real: bool) -> None:
    for part in pixels.split(extractor.part):
        metric.update(to_float(part), real=real)
