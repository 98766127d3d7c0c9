"""Metrics: hand-made matrices, and FID against torchmetrics called by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crl_diffusion import data, metrics
from crl_diffusion.method import OptionError

R = [[10.0], [14.0, 20.0], [19.0, 22.0, 30.0]]


def test_average_fid_is_the_last_row() -> None:
    assert metrics.average_fid(R) == pytest.approx((19 + 22 + 30) / 3)


def test_incremental_average_is_the_mean_of_all_rows_means() -> None:
    assert metrics.incremental_average_fid(R) == pytest.approx((10 + (14 + 20) / 2 + (19 + 22 + 30) / 3) / 3)


def test_forgetting_under_both_divisors() -> None:
    assert metrics.forgetting(R, divisor=2) == pytest.approx(((19 - 10) + (22 - 20)) / 2)
    assert metrics.forgetting(R, divisor=3) == pytest.approx(((19 - 10) + (22 - 20)) / 3)


def test_what_was_not_measured_is_none() -> None:
    joint = [[], [], [1.0, 2.0, 3.0]]
    assert metrics.average_fid(joint) == 2.0
    assert metrics.forgetting(joint, 2) is None
    assert metrics.incremental_average_fid(joint) is None
    assert metrics.forgetting([[1.0]], 1) is None


def test_fid_is_torchmetrics_fid(extractor: metrics.Extractor, digits: data.Data) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    real, generated = digits.tasks[0].test.pixels, digits.tasks[1].train.pixels
    metric = FrechetInceptionDistance(feature=extractor, normalize=True)
    metric.update(real.float() / 255 * 2 - 1, real=True)
    metric.update(generated.float() / 255 * 2 - 1, real=False)
    value = metrics.fid(extractor, real, generated)
    assert value == pytest.approx(float(metric.compute()), rel=1e-4)
    assert value > 50
    assert metrics.fid(extractor, real, digits.tasks[0].train.pixels) < 5


def test_features_have_the_total_variance_that_is_promised(extractor: metrics.Extractor, digits: data.Data) -> None:
    features = extractor(data.to_float(digits.train.pixels)).double()
    assert features.shape == (len(digits.train.labels), metrics.Extractor.num_features)
    assert float(features.var(0).sum()) == pytest.approx(metrics.TOTAL_VARIANCE, rel=1e-4)


def test_the_extractor_knows_the_digits_and_is_kept(
    extractor: metrics.Extractor, extractor_path: Path, digits: data.Data
) -> None:
    assert extractor.test_accuracy > 0.95
    assert extractor.accuracy(*digits.test) == extractor.test_accuracy
    wrong = (digits.test.labels + 1) % 10
    assert extractor.accuracy(digits.test.pixels, wrong) < 0.05
    again = metrics.extractor(digits, extractor_path)
    assert again.name == extractor.name
    x = data.to_float(digits.test.pixels[:5])
    assert torch.equal(again(x), extractor(x))


def test_an_extractor_of_other_images_or_a_torn_one_is_refused(
    extractor_path: Path, digits: data.Data, tmp_path: Path
) -> None:
    larger = data.Data("digits", data._resize(digits.train, 16), digits.test, digits.tasks)
    with pytest.raises(OptionError, match="was made for digits at 8 pixels, not for digits at 16"):
        metrics.extractor(larger, extractor_path)
    torn = tmp_path / "extractor.safetensors"
    torn.write_bytes(extractor_path.read_bytes()[:-100])
    with pytest.raises(OptionError, match=r"cannot be read .*delete it"):
        metrics.extractor(digits, torn)
