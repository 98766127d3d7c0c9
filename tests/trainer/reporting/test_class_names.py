"""Names of classes in pictures: where there is room for them, in letters that the font has, never as mathematics."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from crl_diffusion.reporting import canvas, charts, run_pictures, samples
from crl_diffusion.reporting.runs import find, grouped
from crl_diffusion.run_folder.class_names import UNNAMED, ClassNames
from helpers.named_runs import name_classes
from helpers.run_folders import fabricate
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

matplotlib.use("Agg")
LONG = ("a bird of paradise", "T-shirt/top", "café au lait with sugar and much more than that", "日本", "$x^$")


def shown(figure: Figure) -> list[Text]:
    """All texts of a figure that are not empty, after it was drawn."""
    figure.canvas.draw()
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def strips(count: int, names: ClassNames) -> Figure:
    labels = np.repeat(np.arange(count), 2)
    pixels = np.zeros((len(labels), 1, 8, 8), dtype=np.uint8)
    classes = samples.Classes.learnt(labels, 5, names)
    return samples.show_strips(samples.strips_of([("gd", (pixels, labels))], classes), classes, "Samples")


@pytest.mark.filterwarnings("error:.*missing from font")
@pytest.mark.parametrize("count", [5, 10, 15, 40])
@pytest.mark.parametrize("named", [True, False])
def test_heads_of_columns_overlap_neither_one_another_nor_the_tasks(count: int, named: bool) -> None:
    figure = strips(count, ClassNames(LONG * 8) if named else UNNAMED)
    texts = shown(figure)
    boxes = [text.get_window_extent() for text in texts]
    heads = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    tasks = [text for text in texts if isinstance(text, Annotation)]
    plt.close(figure)
    assert len(heads) == min(count, samples.DRAWN_CLASSES)
    assert any(head.startswith("T-shirt") for head in heads) == named
    assert len(tasks) >= 5
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("café au lait", "café au lait"),
        ("日本", "class 1"),
        ("bird \N{BIRD}", "class 1"),
        ("bell\a", "class 1"),
        ("", "class 1"),
        ("1", "class 1"),
        ("7", "7"),
        ("a long name of a class", "a long name…"),
    ],
)
def test_a_name_is_drawn_if_the_font_has_its_letters(name: str, label: str) -> None:
    assert canvas.class_label(ClassNames(("0", name)), 1, 12) == label


def test_the_tasks_of_a_run_have_the_names_of_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fabricate(tmp_path / "run", "gd", 0, tasks=2)
    named = fabricate(tmp_path / "named", "gd", 0, tasks=2)
    name_classes(named, LONG)
    figures: list[Figure] = []
    monkeypatch.setattr(plt, "close", figures.append)
    run_pictures.of_run(named)
    texts = {text.get_text() for figure in figures for text in shown(figure)}
    monkeypatch.undo()
    plt.close("all")
    assert {"1: a bird of paradise,…", "task 1: a bird of paradise,…", "class 3"} <= texts
    assert (named / "fid_matrix.png").read_bytes() != (run_pictures.of_run(run), run / "fid_matrix.png")[1].read_bytes()

    drawing = charts.final_samples(grouped(find([named])[0]), "samples")
    unnamed = charts.final_samples(grouped(find([run])[0]), "samples")
    assert drawing is not None
    assert unnamed is not None
    assert drawing.png != unnamed.png
