"""FID between the real images of a task and generated ones, on an extractor's features, by torchmetrics.

    FID = |mu_r - mu_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2))
with means mu and covariances C (divisor N - 1) of the features. torchmetrics keeps, for each side, the sum of features,
the sum of their outer products and the count, in float64; mean and covariance follow from these. For the real side they
are computed once and kept, and given back to torchmetrics as its states, which gives the same bits as doing all anew.
With few images FID is biased upwards, the more the more features there are: compare at equal counts only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from crl_diffusion.data.images import to_float
from crl_diffusion.evaluation.features import Extractor, digest
from crl_diffusion.files import write_tensors

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance


class Statistics(NamedTuple):
    """What FID needs of a set of images with d features."""

    total: Tensor  # (d,) float64, sum of the features
    products: Tensor  # (d, d) float64, sum of their outer products
    count: Tensor  # () int64, number of images


def real_statistics(extractor: Extractor, pixels: Tensor) -> Statistics:
    """Of uint8 images (N, C, S, S), N >= 2."""
    metric = _metric(extractor)
    _update(metric, extractor, pixels, real=True)
    return Statistics(metric.real_features_sum, metric.real_features_cov_sum, metric.real_features_num_samples)


def fid(extractor: Extractor, real: Statistics, generated: Tensor) -> float:
    """FID of uint8 images (N, C, S, S), N >= 2, against real ones."""
    metric = _metric(extractor)
    metric.real_features_sum, metric.real_features_cov_sum, metric.real_features_num_samples = real
    _update(metric, extractor, generated, real=False)
    return float(metric.compute())


def kept_statistics(extractor: Extractor, pixels: Tensor, folder: Path, made_for: dict[str, str]) -> Statistics:
    """`real_statistics`, read from `folder`, or computed and kept there.

    `made_for` says in words what the images are (data, size, task, part); extractor, images and the statistics
    themselves are known by their digests, and a file that is not what is asked for is made anew.
    """
    if not extractor.keep:
        return real_statistics(extractor, pixels)
    made_for = {**made_for, "extractor": extractor.name, "images": digest(pixels)}
    key = hashlib.sha256(repr(sorted(made_for.items())).encode()).hexdigest()
    path = folder / "real-statistics" / f"{extractor.name}-{key[:12]}.safetensors"
    found = _read(path, made_for) if path.exists() else None
    if found is None:
        found = real_statistics(extractor, pixels)
        write_tensors(path, found._asdict(), {**made_for, "digest": digest(*found)})
    return found


def _read(path: Path, made_for: dict[str, str]) -> Statistics | None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            found = Statistics(*(file.get_tensor(name) for name in Statistics._fields))
    except (SafetensorError, OSError):
        return None
    return found if metadata == {**made_for, "digest": digest(*found)} else None


def _metric(extractor: Extractor) -> FrechetInceptionDistance:
    # torchmetrics takes a second to import; commands that only read results do without it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process measures for all of a run: a metric that waited for the others' states would wait for ever.
    return FrechetInceptionDistance(feature=extractor, normalize=True, sync_on_compute=False)


def _update(metric: FrechetInceptionDistance, extractor: Extractor, pixels: Tensor, real: bool) -> None:
    for part in pixels.split(extractor.part):
        metric.update(to_float(part), real=real)
