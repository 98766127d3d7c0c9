"""Tasks: which images they have, in which order, and that they are views. What lies on disk is in test_catalog.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import catalog, images, tasks
from crl_diffusion.data.dataset import CatalogEntry, Dataset
from crl_diffusion.data.images import Images
from crl_diffusion.errors import OptionError
from crl_diffusion.training.plan import resolve
from torch import Tensor
from torch.nn import functional

UNUSED = Path("unused")


def config(**settings: Any) -> RunConfig:
    return resolve(RunConfig(method="fine-tune", **settings))


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a made-up set in the place of digits: images of 8 x 8 pixels whose first two pixels are their number."""

    def put(train: Tensor, test: Tensor, classes: int) -> None:
        def part(labels: Tensor) -> Images:
            pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
            number = torch.arange(len(labels))
            pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = number // 256, number % 256
            return Images(pixels, labels)

        dataset = Dataset("made-up", classes, part(train), part(test))
        monkeypatch.setitem(catalog.DATASETS, "digits", CatalogEntry(lambda root, size: dataset, (8,), 4))

    return put


def numbers(part: Images) -> list[int]:
    corner = part.pixels[:, 0, 0, :2].long()
    return (256 * corner[:, 0] + corner[:, 1]).tolist()


def test_pixels_survive_the_conversion_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = images.to_float(pixels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(images.to_pixels(floats), pixels)
    assert images.to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_digits_are_split_class_by_class(digits: tasks.Data) -> None:
    from sklearn.datasets import load_digits

    counts = torch.from_numpy(load_digits().target).bincount()
    assert torch.equal(digits.test.labels.bincount(), counts // 3)
    assert torch.equal(digits.train.labels.bincount() + digits.test.labels.bincount(), counts)
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert digits.train.pixels.dtype == torch.uint8


def test_tasks_are_pairs_of_classes_in_their_original_order(digits: tasks.Data) -> None:
    assert [task.classes for task in digits.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    for task in digits.tasks:
        assert set(task.train.labels.tolist()) == set(task.held_out.labels.tolist()) == set(task.classes)
        assert len(task.validation) == 0
    assert sum(len(task.train) for task in digits.tasks) == len(digits.train)


def test_a_shuffled_order_of_classes_deals_the_same_images_into_other_tasks() -> None:
    plain, shuffled = (tasks.load(config(class_order=order), UNUSED) for order in (-1, 7))
    order = [c for task in shuffled.tasks for c in task.classes]
    assert sorted(order) == list(range(10)) != order
    for task in shuffled.tasks:
        assert torch.equal(task.train.pixels, plain.train.of_classes(task.classes).pixels)
        assert torch.equal(task.held_out.pixels, plain.test.of_classes(task.classes).pixels)


def test_tasks_can_have_other_sizes() -> None:
    loaded = tasks.load(config(tasks=2, classes_per_task=5), UNUSED)
    assert [task.classes for task in loaded.tasks] == [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]


@pytest.mark.parametrize("per_class", [0, 3])
def test_validation_images_are_every_fourth_of_a_class_and_taken_before_the_cut(
    numbered: Callable[..., None], per_class: int
) -> None:
    labels = torch.arange(80) % 2
    numbered(labels, torch.tensor([0, 0, 1, 1]), 2)
    asked = config(tasks=1, held_out="validation", fisher_images="validation", per_class=per_class)
    loaded = tasks.load(asked, UNUSED)
    (task,) = loaded.tasks
    validation = [n for n in range(80) if n // 2 % 4 == 3]  # number n is the (n // 2)th image of class n % 2
    assert numbers(task.validation) == numbers(task.held_out) == validation
    rest = [n for n in range(80) if n not in validation]
    assert numbers(loaded.train) == rest
    assert numbers(task.train) == (rest[: 2 * per_class] if per_class else rest)
    assert len(loaded.test) == 4


def test_runs_that_use_no_validation_images_train_on_all() -> None:
    assert len(tasks.load(config(), UNUSED).train) > len(tasks.load(config(fisher_images="validation"), UNUSED).train)
    assert len(tasks.load(config(fisher_images="validation"), UNUSED).tasks[0].held_out) == len(
        tasks.load(config(), UNUSED).tasks[0].held_out
    )


def test_per_class_keeps_the_first_images_and_leaves_the_rest_to_the_extractor(numbered: Callable[..., None]) -> None:
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    numbered(labels, torch.tensor([0, 0, 1, 1]), 2)
    loaded = tasks.load(config(tasks=2, classes_per_task=1, per_class=2), UNUSED)
    assert [numbers(task.train) for task in loaded.tasks] == [[1, 2], [0, 3]]
    assert numbers(loaded.train) == list(range(8))
    assert numbers(loaded.training(loaded.tasks)) == [0, 1, 2, 3]  # the data set's order, not the tasks'
    assert [numbers(task.held_out) for task in loaded.tasks] == [[0, 1], [2, 3]]


def test_tasks_share_the_pixels_of_the_data_set() -> None:
    loaded = tasks.load(config(held_out="validation", per_class=20, class_order=1), UNUSED)
    for task in loaded.tasks:
        for part in (task.train, task.validation, task.held_out):
            assert part.storage is loaded.train.storage
    joined = images.join([task.train for task in loaded.tasks])
    assert joined.storage is loaded.train.storage
    assert joined.of_classes((3, 5)).storage is loaded.train.storage


def test_views_have_the_pixels_of_the_chosen_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 4, 4), generator=generator, dtype=torch.uint8)
    original = Images(pixels, torch.randint(0, 5, (50,), generator=generator))
    assert original.pixels is pixels
    view = original[torch.randperm(50, generator=generator)[:30]]
    index = torch.randint(0, 30, (7,), generator=generator)  # some twice
    for part in (original, view):
        for chosen in (part.take(index), part[index]):
            assert torch.equal(chosen.pixels, part.pixels[index])
            assert torch.equal(chosen.labels, part.labels[index])
        assert torch.equal(part.of_classes((4, 1)).pixels, part.pixels[(part.labels == 4) | (part.labels == 1)])
        assert len(part.of_classes((9,))) == len(part.of_classes(())) == 0
        batches = list(part.batches(8))
        assert {len(batch) for batch in batches[:-1]} == {8}
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), part.pixels)
    assert view.take(index).rows is None  # read, and no longer a view
    elsewhere = images.join([view, replace(original, storage=pixels.clone())])
    for joined in (images.join([view, original]), elsewhere):
        assert torch.equal(joined.pixels, torch.cat([view.pixels, pixels]))
        assert torch.equal(joined.labels, torch.cat([view.labels, original.labels]))


def test_ranks_count_the_earlier_images_of_the_class() -> None:
    labels = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(1))
    expected = [labels[:i].tolist().count(c) for i, c in enumerate(labels.tolist())]
    assert images.rank_in_class(labels).tolist() == expected
    assert images.rank_in_class(labels[:0]).tolist() == []


def test_smaller_is_the_mean_of_areas_and_larger_a_black_border() -> None:
    n = images.RESIZED_AT_ONCE + 1
    pixels = torch.randint(0, 256, (n, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    small = images.resize(pixels, 14)
    means = pixels.double().view(n, 1, 14, 2, 14, 2).mean((3, 5))
    assert (small.double() - means).abs().max() <= 0.5
    at_once = functional.interpolate(pixels.float(), size=(16, 16), mode="area").round().to(torch.uint8)
    assert torch.equal(images.resize(pixels, 16), at_once)
    large = images.resize(pixels, 32)
    assert torch.equal(large[..., 2:30, 2:30], pixels)
    assert int(large.long().sum()) == int(pixels.long().sum())


def test_a_size_that_is_not_offered_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--image-size is 9, but digits comes in 8 pixels"):
        tasks.load(config(image_size=9), UNUSED)


@pytest.mark.parametrize(
    ("train", "test", "classes", "settings", "message_parts"),
    [
        ([0, 1, 2], [0, 0, 1, 1, 2, 2], 3, {"tasks": 2}, ["--tasks is 2", "--classes-per-task is 2", "3 classes"]),
        ([0, 2, 2], [0, 0, 1, 1, 2, 2], 3, {"tasks": 1}, ["class 1, in task 1, has 0 training images"]),
        ([0, 1, 2], [0, 0, 1], 3, {"tasks": 1}, ["class 1, in task 1, has 1 held-out (test) images", "needs 2"]),
        (
            [0] * 8 + [1] * 4,
            [0, 0, 1, 1],
            2,
            {"tasks": 2, "classes_per_task": 1, "held_out": "validation"},
            ["class 1, in task 2, has 1 held-out (validation) images", "every 4th image validates"],
        ),
        (
            [0] * 4 + [1] * 3,
            [0, 0, 1, 1],
            2,
            {"tasks": 1, "fisher_images": "validation"},
            ["class 1, in task 1, has 0 validation images"],
        ),
    ],
)
def test_tasks_without_images_are_refused(
    numbered: Callable[..., None],
    train: list[int],
    test: list[int],
    classes: int,
    settings: dict[str, Any],
    message_parts: list[str],
) -> None:
    numbered(torch.tensor(train), torch.tensor(test), classes)
    with pytest.raises(OptionError) as caught:
        tasks.load(config(**settings), UNUSED)
    for part in message_parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
