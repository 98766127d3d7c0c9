"""A run as a folder of diffusers: loaded by diffusers alone, it draws what `crl-diffusion sample` draws."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.diffusion.noising import SCHEDULES
from crl_diffusion.trained_model import drawing, weights
from crl_diffusion.trained_model.export import BETAS
from diffusers import DDIMScheduler
from helpers.image_folders import folder_with_every_trap
from helpers.named_runs import name_classes
from helpers.trainer_runs import SHORT, TrainCommand, options, python, require_one_line
from PIL import Image

# After the blocks of the folder's README: images 0 and 1 of some classes with seed 4.
DRAW = """
import sys
import numpy
drawn = [draw(torch.stack([starting_noise(4, label, n) for n in (0, 1)]), label) for label in LABELS]
numpy.save(sys.argv[1], torch.cat(drawn).numpy())
assert not [name for name in sys.modules if name.startswith("crl_")]
print(class_names)
"""


def by_diffusers_alone(folder: Path, out: Path, labels: Sequence[int]) -> tuple[np.ndarray, str]:
    """What the code in the folder's README draws, in a process of its own, and what it prints."""
    blocks = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    script = out.with_suffix(".py")
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n" + "\n".join([*blocks, f"LABELS = {labels!r}"]) + DRAW)
    result = python(script, out)
    assert result.returncode == 0, result.stderr
    return np.load(out), result.stdout


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine", "eval_steps": 7, "ema": 0.5},
        {"precision": "fp64"},
        {"method": "adapters3", "precision": "fp64"},
    ],
    ids=["linear", "cosine", "fp64", "adapters"],
)
def test_diffusers_alone_draws_the_images_of_crl_diffusion_sample(
    settings: dict[str, Any], train_command: TrainCommand, tmp_path: Path
) -> None:
    run, exported, images = (str(tmp_path / name) for name in ("run", "exported", "images"))
    assert train_command(**{"method": "fine-tune", **settings}) == 0
    name_classes(Path(run), ["café au lait", "b", "日本", *"3456789"])
    assert cli.main(["export", run, "--out", exported]) == 0
    assert cli.main(["sample", run, "--out", images, "--classes", "0", "3", "--count", "2", "--seed", "4"]) == 0
    drawn, printed = by_diffusers_alone(Path(exported), tmp_path / "drawn.npy", [0, 3])

    trained = weights.read(Path(run), None, "cpu", print)
    wanted = drawing.draw(trained, [0, 0, 3, 3], [0, 1, 0, 1], 4, trained.config.eval_steps).numpy()
    assert drawn.dtype == wanted.dtype
    assert np.abs(drawn - wanted).max() < 1e-5
    names = [f"{stem}-seed4-000{n}.png" for stem in ("0-cafe-au-lait", "class-3") for n in (0, 1)]
    pixels = np.stack([np.asarray(Image.open(tmp_path / "images" / name)) for name in names])
    assert np.abs(pixels - (drawn[:, 0] + 1) * 127.5).max() < 0.5 + 1e-2
    assert printed.startswith("['café au lait', 'b', '日本', '3'")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_photos_as_they_are_are_trained_on_sampled_and_drawn_by_diffusers_alone(tmp_path: Path) -> None:
    photos = folder_with_every_trap(
        tmp_path / "Ferienfotos 2024 – 夏", importlib.util.find_spec("pillow_heif") is not None
    )
    run, exported, images = (str(tmp_path / name) for name in ("run", "exported", "images"))
    settings = {**SHORT, "tasks": 0, "image_size": 8, "steps": 2, "pool": 1, "pool_steps": 1, "out": run}
    words = ["train", "--data", "folder", "--data-root", str(photos.root), "--method", "gd", "--skip-unreadable"]
    assert cli.main([*words, *options(settings)]) == 0
    assert cli.main(["export", run, "--out", exported]) == 0
    assert cli.main(["sample", run, "--out", images, "--classes", "mäuse", "犬", "--count", "2", "--seed", "4"]) == 0

    drawn, printed = by_diffusers_alone(Path(exported), tmp_path / "drawn.npy", [0, 2])
    assert printed == "['mäuse', 'red cats', '犬']\n"
    assert sorted(path.name for path in Path(images).iterdir()) == [
        *(f"{stem}-seed4-000{n}.png" for stem in ("0-mause", "class-2") for n in (0, 1)),
        *("samples.json", "sheet.png"),
    ]
    paths = [Path(images, f"{stem}-seed4-000{n}.png") for stem in ("0-mause", "class-2") for n in (0, 1)]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert pixels.shape == (4, 8, 8, 3)
    assert np.abs(pixels - (drawn.transpose(0, 2, 3, 1) + 1) * 127.5).max() < 0.5 + 1e-2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_scheduler_has_the_noise_schedule_of_the_run(schedule: str) -> None:
    ours, theirs = SCHEDULES[schedule].alpha_bar, DDIMScheduler(**BETAS[schedule]).alphas_cumprod.double()
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=0)  # theirs is a product in float32


def test_the_card_names_the_classes_and_where_they_come_from(finished: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(finished), "--out", str(tmp_path / "out"), "--task", "1"]) == 0
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert card["tasks"] == [[0, 1]]
    assert card["class_names"] == [str(c) for c in range(10)]
    assert (card["run"], card["data"], card["moment"]) == ("gd+rank1", "digits", "after task 1")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.[jm][sd]*"))


@pytest.mark.usefixtures("no_pictures")
def test_an_mlp_is_refused_and_nothing_is_written(
    train_command: TrainCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(method="fine-tune", model="mlp") == 0
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    require_one_line(capsys.readouterr().err, "'mlp'", "--model mini, tiny, small, paper can be exported")
    assert not (tmp_path / "out").exists()
    assert cli.main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "images"), "--count", "1"]) == 0
    assert len(list((tmp_path / "images").glob("class-*.png"))) == 4
