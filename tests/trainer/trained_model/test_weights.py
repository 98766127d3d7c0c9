"""The model of a run: the weights that its evaluations use, from whichever checkpoint is the newest or asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crl_diffusion.data.images import to_pixels
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.readers import read_samples
from crl_diffusion.trained_model import weights
from helpers.trainer_runs import SHORT, Short, train


def silent(line: str) -> None:
    raise AssertionError(f"nothing was to be said: {line}")


def test_the_model_draws_the_images_of_the_last_evaluation(finished: Path) -> None:
    trained = weights.read(finished, None, "cpu", silent)
    pixels, labels = read_samples(finished, 2) or pytest.fail("the run keeps no samples")
    label = torch.from_numpy(labels)
    latents = sampling.draw_latents(trained.config.seed, "evaluation", label, trained.shape)
    schedule = noising.SCHEDULES[trained.config.schedule]
    drawn = [
        sampling.draw_share(trained.model, schedule, latents[part], label[part], SHORT["eval_steps"])
        for part in torch.arange(len(label)).split(len(label) // 2)  # an evaluation draws task by task
    ]
    assert np.array_equal(to_pixels(torch.cat(drawn)).numpy(), pixels)
    assert (trained.shape, trained.classes, trained.learnt) == ((1, 8, 8), 10, [0, 1, 2, 3])
    assert trained.moment == "after task 2"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("settings", [{"model": "tiny"}, {"model": "mlp", "precision": "fp64"}], ids=["unet", "mlp"])
def test_within_a_task_the_average_stands_for_the_weights_as_at_its_end(
    settings: dict[str, str], short: Short, tmp_path: Path, extractor_folder: Path
) -> None:
    out = tmp_path / "run"
    train(short("fine-tune", ema=0.5, **settings), out, extractor_folder)
    ended = weights.read(out, None, "cpu", silent).model.state_dict()
    (out / "checkpoints" / "02-00000000.safetensors").unlink()
    lines: list[str] = []
    within = weights.read(out, None, "cpu", lines.append)  # the last step of the task, before the end of the task
    assert within.moment == "after step 6 of task 2"
    assert len(lines) == 1
    assert "is not finished" in lines[0]
    unaveraged = checkpoint.load(out / "checkpoints" / "01-00000006.safetensors").part("model")
    assert any(not torch.equal(value, ended[name]) for name, value in unaveraged.items())
    for name, value in within.model.state_dict().items():
        assert torch.equal(value, ended[name])


def test_a_task_has_the_weights_of_its_end(finished: Path) -> None:
    first = weights.read(finished, 1, "cpu", silent)
    saved = checkpoint.load(finished / "checkpoints" / "01-00000000.safetensors").part("model")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, saved[name])
    assert (first.learnt, first.moment) == ([0, 1], "after task 1")
    assert first.sha256 != weights.read(finished, 2, "cpu", silent).sha256


def test_a_task_that_a_run_has_no_weights_of_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--task is 3, .* ends its tasks with 1, 2"):
        weights.read(finished, 3, "cpu", silent)
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    end = copy / "checkpoints" / "02-00000000.safetensors"
    end.write_bytes(end.read_bytes()[:-1])
    with pytest.raises(RecordError, match=r"02-00000000\.safetensors' is damaged .*give another --task"):
        weights.read(copy, 2, "cpu", silent)
    lines: list[str] = []
    assert weights.read(copy, None, "cpu", lines.append).moment == "after step 6 of task 2"
    assert "02-00000000.safetensors is damaged" in lines[0]
    end.unlink()
    with pytest.raises(OptionError, match=r"--task is 2, but there is no 02-00000000\.safetensors"):
        weights.read(copy, 2, "cpu", silent)
