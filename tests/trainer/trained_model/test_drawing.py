"""Images of a run: which classes are drawn, that an image depends on nothing beside it, and the names of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from crl_diffusion.data.images import to_pixels
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.errors import OptionError
from crl_diffusion.trained_model import drawing, weights
from crl_diffusion.trained_model.weights import TrainedModel
from helpers.named_runs import with_class_names
from PIL import Image

NAMES = ["café au lait", "naïve bird", "日本", "T-shirt/top", *"456789"]


def read(run: Path, task: int | None = None) -> TrainedModel:
    return weights.read(run, task, "cpu", lambda line: None)


@pytest.fixture
def named(finished: Path, tmp_path: Path) -> TrainedModel:
    return read(with_class_names(finished, tmp_path / "named", NAMES))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*-seed*.png")}


def test_an_image_is_the_same_bits_whatever_is_drawn_beside_it(finished: Path, tmp_path: Path) -> None:
    trained = read(finished)
    drawing.write_images(trained, tmp_path / "few", [3, 0], 3, seed=5, steps=4)
    drawing.write_images(trained, tmp_path / "many", [1, 0, 2, 3], 21, seed=5, steps=4)
    few, many = pictures(tmp_path / "few"), pictures(tmp_path / "many")
    assert (len(few), len(many)) == (6, 84)
    assert few == {name: many[name] for name in few}
    together = drawing.draw(trained, [0, 3, 1, 2, 3], [4, 0, 0, 0, 1], 5, 4)
    assert torch.equal(drawing.draw(trained, [3], [0], 5, 4)[0], together[1])
    assert len({hashlib.sha256(content).digest() for content in many.values()}) == 84


def test_the_images_are_ddim_samples_of_the_streams_of_their_own(finished: Path, tmp_path: Path) -> None:
    trained = read(finished)
    drawing.write_images(trained, tmp_path / "out", [2], 2, seed=7, steps=5)
    label = torch.tensor([2, 2])
    latents = torch.stack([torch.randn(1, 8, 8, generator=noising.stream(7, "sample, class 2", 0, n)) for n in (0, 1)])
    expected = to_pixels(sampling.draw_share(trained.model, noising.SCHEDULES["linear"], latents, label, 5)).numpy()
    for n in (0, 1):
        drawn = np.asarray(Image.open(tmp_path / "out" / f"class-2-seed7-000{n}.png"))
        assert np.abs(drawn.astype(int) - expected[n, 0]).max() <= 1  # batches of other sizes round in other ways


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ([], [0, 1, 2, 3]),
        (["日本", "café au lait"], [2, 0]),
        (["cafe\u0301 au lait"], [0]),  # as macOS writes the names of folders
        (["1-3", "T-shirt/top", "0"], [1, 2, 3, 0]),
    ],
)
def test_classes_are_asked_for_by_name_number_or_range(
    named: TrainedModel, words: list[str], labels: list[int]
) -> None:
    assert drawing.chosen_classes(words, named) == labels


def test_a_name_comes_before_a_number(finished: Path, tmp_path: Path) -> None:
    trained = read(with_class_names(finished, tmp_path / "run", ["10", "2", "0", "3", *"456789"]))
    assert drawing.chosen_classes(["0", "10", "1", "0-1"], trained) == [2, 0, 1]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bird", "there is no such class; choose among 0 'café au lait', 1 'naïve bird', 2 '日本' and 3 'T-shirt/top'"),
        ("4", "class 4 has not been learnt after task 2"),
        ("2-999999", "class 4 has not been learnt after task 2"),
        ("2-1", "there is no such class"),
        ("-1", "there is no such class"),
        ("", "there is no such class"),
        ("٣", "there is no such class"),
        ("9" * 40, "there is no such class"),
    ],
)
def test_a_class_that_the_model_does_not_know_is_refused(named: TrainedModel, word: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        drawing.chosen_classes(["0", word], named)
    assert f"--classes has {word!r}, but {message}" in str(caught.value)


def test_a_name_of_two_classes_is_refused(finished: Path, tmp_path: Path) -> None:
    trained = read(with_class_names(finished, tmp_path / "run", ["é", "e\u0301", "b", "c", *"456789"]))
    with pytest.raises(OptionError, match="the name of classes 0 and 1; give a number"):
        drawing.chosen_classes(["é"], trained)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("café au lait", "2-cafe-au-lait"),
        ("T-shirt/top", "2-T-shirt-top"),
        ("..\\..", "class-2"),
        ("日本", "class-2"),
        ("日本 bird", "2-bird"),
        ("a" * 300, "2-" + "a" * 60),
        ("con\x00.", "2-con"),
        ("", "class-2"),
        ("2", "class-2"),
        ("3", "2-3"),
    ],
)
def test_the_names_of_files_are_plain(finished: Path, tmp_path: Path, name: str, stem: str) -> None:
    trained = read(with_class_names(finished, tmp_path / "run", ["a", "b", name]))
    assert drawing.file_stem(trained, 2) == stem


def test_the_record_says_which_files_are_of_which_class(named: TrainedModel, tmp_path: Path) -> None:
    drawing.write_images(named, tmp_path / "out", [2, 3], 2, seed=0, steps=2)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [(c["label"], c["name"]) for c in record["classes"]] == [(2, "日本"), (3, "T-shirt/top")]
    for c in record["classes"]:
        assert len(list((tmp_path / "out").glob(c["files"]))) == 2
    assert len(list((tmp_path / "out").iterdir())) == 2 * 2 + len(["samples.json", "sheet.png"])


def test_a_sheet_is_drawn_without_a_warning_about_letters(named: TrainedModel, tmp_path: Path, recwarn) -> None:
    named = named._replace(data_name="folder-日本-01234567")
    drawing.write_images(named, tmp_path / "out", [0, 2, 3], 13, seed=0, steps=1)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 2 * sheet.height  # rows are classes
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]
