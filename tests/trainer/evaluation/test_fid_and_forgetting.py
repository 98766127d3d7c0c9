"""Metrics: hand-made matrices and counts; FID against torchmetrics called by hand, and against chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from crl_diffusion.data import images, tasks
from crl_diffusion.evaluation import fid, metrics
from crl_diffusion.evaluation.classifiers import Classifier
from torch import Tensor

R = [[10.0], [14.0, 20.0], [19.0, 22.0, 30.0]]
A = [[0.9], [0.7, 1.0], [0.5, 0.8, 0.95]]
JOINT: list[list[float]] = [[], [], [1.0, 2.0, 3.0]]


def test_average_fid_is_the_last_row() -> None:
    assert metrics.average_fid(R) == pytest.approx((19 + 22 + 30) / 3)


def test_incremental_average_is_the_mean_of_all_rows_means() -> None:
    assert metrics.incremental_average_fid(R) == pytest.approx((10 + (14 + 20) / 2 + (19 + 22 + 30) / 3) / 3)


def test_average_fid_is_fid_when_learnt_plus_forgetting() -> None:
    learnt, forgotten = metrics.fid_when_learnt(R), metrics.forgetting(R, divisor=3)
    assert learnt == (10 + 20 + 30) / 3
    assert forgotten is not None
    assert learnt + forgotten == pytest.approx(metrics.average_fid(R))


def test_forgetting_under_both_divisors() -> None:
    assert metrics.forgetting(R, divisor=2) == pytest.approx(((19 - 10) + (22 - 20)) / 2)
    assert metrics.forgetting(R, divisor=3) == pytest.approx(((19 - 10) + (22 - 20)) / 3)


def test_numbers_that_were_not_measured_are_none() -> None:
    assert metrics.average_fid(JOINT) == 2.0
    assert metrics.forgetting(JOINT, 2) is None
    assert metrics.incremental_average_fid(JOINT) is metrics.fid_when_learnt(JOINT) is None
    assert metrics.forgetting([[1.0]], 1) is None


def test_headlines_name_every_number() -> None:
    numbers = metrics.headlines(R, A, [[0.1], [0.2, 0.3], [0.4, 0.5, 0.9]])
    assert numbers["average_fid"] == metrics.average_fid(R)
    assert numbers["fid_when_learnt"] == metrics.fid_when_learnt(R)
    assert numbers["incremental_average_fid"] == metrics.incremental_average_fid(R)
    assert (numbers["forgetting"], numbers["forgetting_divisor_t"]) == pytest.approx((11 / 2, 11 / 3))
    assert numbers["accuracy"] == pytest.approx((0.5 + 0.8 + 0.95) / 3)
    assert numbers["accuracy_by_task"] == A[2]
    assert (numbers["accuracy_task_1"], numbers["accuracy_task_1_when_learnt"]) == (0.5, 0.9)
    assert numbers["accuracy_forgetting"] == pytest.approx(((0.9 - 0.5) + (1.0 - 0.8)) / 2)
    assert numbers["class_kl"] == pytest.approx(0.6)
    joint = metrics.headlines(JOINT, JOINT, [[], [], []])
    assert joint["accuracy_forgetting"] is joint["forgetting"] is joint["class_kl"] is None


# Class histograms


def test_class_kl_is_zero_only_for_the_counts_that_were_asked_for() -> None:
    assert metrics.class_kl([50, 50], 0, [50, 50]) == 0
    assert metrics.class_kl([30, 70], 0, [30, 70]) == 0
    for predicted, elsewhere in (([49, 51], 0), ([50, 49], 1), ([100, 0], 0), ([0, 0], 100)):
        assert metrics.class_kl(predicted, elsewhere, [50, 50]) > 0


def test_class_kl_by_hand() -> None:
    p, q = [3.5 / 7.5, 1.5 / 7.5, 2.5 / 7.5], [3.5 / 7.5, 3.5 / 7.5, 0.5 / 7.5]
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert metrics.class_kl([3, 1], 2, [3, 3]) == pytest.approx(by_hand)
    assert sum(p) == sum(q) == pytest.approx(1)


def test_class_kl_is_worst_for_images_of_other_tasks() -> None:
    """An even histogram of nothing is not taken for an even histogram."""
    collapsed, foreign = metrics.class_kl([200, 0], 0, [100, 100]), metrics.class_kl([0, 0], 200, [100, 100])
    assert collapsed == pytest.approx(math.log(2), abs=0.03)
    assert foreign == pytest.approx(math.log(400), abs=0.1)


def test_class_kl_refuses_counts_that_do_not_match() -> None:
    with pytest.raises(ValueError, match=r"\[3, 1\] and 1 elsewhere, asked for \[3, 3\]"):
        metrics.class_kl([3, 1], 1, [3, 3])


# FID


def _by_hand(extractor: Classifier, real: Tensor, generated: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=extractor, normalize=True)
    metric.update(real.float() / 127.5 - 1, real=True)
    metric.update(generated.float() / 127.5 - 1, real=False)
    return float(metric.compute())


def test_fid_is_torchmetrics_fid_to_the_bit(extractor: Classifier, digits: tasks.Data, tmp_path: Path) -> None:
    real, generated = digits.tasks[0].held_out.pixels, digits.tasks[1].train.pixels
    expected = _by_hand(extractor, real, generated)
    assert expected > 50
    assert fid.fid(extractor, fid.real_statistics(extractor, real), generated) == expected
    for _ in range(2):  # computed and kept, then read
        kept = fid.kept_statistics(extractor, real, tmp_path, {"task": "0 1"})
        assert fid.fid(extractor, kept, generated) == expected
    alike = digits.tasks[0].train.pixels
    assert fid.fid(extractor, kept, alike) == _by_hand(extractor, real, alike) < 5


def test_in_parts_fid_is_torchmetrics_fid(extractor: Classifier, digits: tasks.Data) -> None:
    real, generated = digits.train.pixels, digits.test.pixels.flip(3)  # more than a thousand, in two parts
    value = fid.fid(extractor, fid.real_statistics(extractor, real), generated)
    assert value == pytest.approx(_by_hand(extractor, real, generated), rel=1e-4)


def test_kept_statistics_are_means_and_covariances(extractor: Classifier, digits: tasks.Data, tmp_path: Path) -> None:
    pixels = digits.tasks[0].held_out.pixels
    total, products, count = fid.kept_statistics(extractor, pixels, tmp_path, {})
    features = extractor(images.to_float(pixels)).double()
    assert (total.dtype, products.dtype, int(count)) == (torch.float64, torch.float64, len(pixels))
    mean = total / count
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close((products - count * torch.outer(mean, mean)) / (count - 1), features.T.cov())


def test_statistics_are_stored_and_replaced_if_they_do_not_match(
    extractor: Classifier, digits: tasks.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = fid.real_statistics

    def counted(classifier: Classifier, pixels: Tensor) -> fid.Statistics:
        computed.append(len(pixels))
        return original(classifier, pixels)

    monkeypatch.setattr(fid, "real_statistics", counted)
    first, second = (task.held_out.pixels for task in digits.tasks[:2])
    statistics = fid.kept_statistics(extractor, first, tmp_path, {"part": "test"})
    (path,) = (tmp_path / "real-statistics").iterdir()
    again = fid.kept_statistics(extractor, first, tmp_path, {"part": "test"})
    assert computed == [len(first)]
    assert all(torch.equal(a, b) for a, b in zip(statistics, again, strict=True))

    # Other images, or the same under another name: another file.
    fid.kept_statistics(extractor, second, tmp_path, {"part": "test"})
    fid.kept_statistics(extractor, first, tmp_path, {"part": "validation"})
    assert computed == [len(first), len(second), len(first)]
    assert len(list((tmp_path / "real-statistics").iterdir())) == 3

    # Torn, or one bit of a number altered: computed again, and put right.
    content = path.read_bytes()
    altered = bytearray(content)
    altered[-1000] ^= 1
    for damaged in (content[:-100], bytes(altered)):
        path.write_bytes(damaged)
        computed.clear()
        again = fid.kept_statistics(extractor, first, tmp_path, {"part": "test"})
        assert computed == [len(first)]
        assert all(torch.equal(a, b) for a, b in zip(statistics, again, strict=True))
        fid.kept_statistics(extractor, first, tmp_path, {"part": "test"})
        assert computed == [len(first)]


def test_real_against_real_is_chance_and_noise_is_not(extractor: Classifier, digits: tasks.Data) -> None:
    """FIDs of 200 random halves of a task's held-out images show what chance makes of 59 images against 59."""
    task, generator = digits.tasks[0], torch.Generator().manual_seed(0)
    n = len(task.held_out.labels) // 2

    def halves() -> tuple[Tensor, Tensor]:
        order = torch.randperm(2 * n, generator=generator)
        return task.held_out.pixels[order[:n]], task.held_out.pixels[order[n:]]

    def against(real: Tensor, generated: Tensor) -> float:
        return fid.fid(extractor, fid.real_statistics(extractor, real), generated)

    first, second = halves()
    chance = sorted(against(*halves()) for _ in range(200))
    low, high = chance[4], chance[195]  # the central 95 %
    assert 0 < low < against(first, second) < high
    # Images that the extractor was trained on are no nearer than others.
    train = task.train.pixels[torch.randperm(len(task.train.labels), generator=generator)[:n]]
    assert low < against(first, train) < high
    noise = torch.randint(0, 256, second.shape, generator=generator, dtype=torch.uint8)
    assert against(first, noise) > 3 * high
    assert against(first, digits.tasks[1].held_out.pixels[:n]) > 3 * high
    repeated = second[:1].expand_as(second)  # a model that draws one image only
    assert against(first, repeated) > high
