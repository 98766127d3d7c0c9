"""Evaluation: the content of a row, independence of the batches of the sampler, and what the commands print."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from crl_diffusion import cli
from crl_diffusion.data import tasks
from crl_diffusion.data.images import Images, to_pixels
from crl_diffusion.diffusion import sampling
from crl_diffusion.errors import OptionError
from crl_diffusion.evaluation import evaluate, fid
from crl_diffusion.evaluation.classifiers import Classifier
from crl_diffusion.files import Row, read_rows
from crl_diffusion.run_folder.layout import claim
from crl_diffusion.training.run import Run
from helpers.trainer_runs import SHORT, MakeRun, Short, options, train_words
from torch import Tensor


def test_a_row_names_extractor_sampler_and_counts(finished: Path, extractor: Classifier, digits: tasks.Data) -> None:
    rows = [row for row in read_rows(finished / "metrics.jsonl") if row["kind"] == "evaluation"]
    summary = json.loads((finished / "summary.json").read_text())
    for row in rows:
        task = digits.tasks[row["task"] - 1]
        assert row["extractor"] == row["classifier"] == extractor.name
        assert (row["samples"], row["sampler"], row["sampler_steps"], row["seed"]) == (8, "DDIM", 2, 0)
        assert (row["held_out"], row["held_out_images"]) == ("test", len(task.held_out.labels))
        assert sum(row["predicted"]) + row["predicted_elsewhere"] == row["samples"]
        assert 0 <= row["accuracy"] <= sum(row["predicted"]) / row["samples"]
        assert row["class_kl"] > 0
    assert summary["extractor"] == summary["classifier"] == extractor.name
    assert (summary["samples_per_task"], summary["sampler"], summary["seed"]) == (8, "DDIM, 2 steps", 0)
    assert summary["held_out"] == "test"
    assert summary["held_out_images"] == [len(task.held_out.labels) for task in digits.tasks[: SHORT["tasks"]]]
    assert summary["class_kl_matrix"] == [[rows[0]["class_kl"]], [rows[1]["class_kl"], rows[2]["class_kl"]]]
    assert summary["class_kl"] == pytest.approx((rows[1]["class_kl"] + rows[2]["class_kl"]) / 2)
    assert summary["accuracy_by_task"] == [rows[1]["accuracy"], rows[2]["accuracy"]]
    assert summary["accuracy_forgetting"] == pytest.approx(rows[0]["accuracy"] - rows[1]["accuracy"])


def test_the_row_of_chosen_images_is_as_computed_by_hand(
    extractor: Classifier, extractor_folder: Path, digits: tasks.Data, short: Short
) -> None:
    """Images of the wrong class count against accuracy; those of other tasks, against the histogram too."""
    tools = evaluate.instruments("cnn", digits, extractor_folder)
    right = {c: digits.train.pixels[digits.train.labels == c] for c in range(10)}
    right = {c: pixels[extractor.predictions(pixels) == c] for c, pixels in right.items()}
    drawn = [(0, 0, 5), (0, 1, 2), (0, 7, 1), (1, 1, 8)]  # asked for, drawn, how many
    pixels = torch.cat([right[drawn_class][:n] for _, drawn_class, n in drawn])
    label = torch.cat([torch.full((n,), asked) for asked, _, n in drawn])
    task = digits.tasks[0]
    row = evaluate.measure(tools, digits, short(), task, Images(pixels, label))
    assert (row["accuracy"], row["predicted"], row["predicted_elsewhere"]) == (13 / 16, [5, 10], 1)
    assert row["fid"] == fid.fid(extractor, fid.real_statistics(extractor, task.held_out.pixels), pixels)


@pytest.fixture
def run(make_run: MakeRun, short: Short) -> Run:
    """Its network has weights that draw something: as initialised it predicts zeros."""
    prepared = make_run(short("fine-tune", tasks=1, eval_samples=20, eval_steps=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    prepared.model.eval()
    return prepared


def test_evaluation_does_not_depend_on_the_samplers_batches(run: Run) -> None:
    drawn: dict[int, Tensor] = {}

    def rows(batch: int) -> list[Row]:
        def draw(latents: Tensor, label: Tensor) -> Tensor:
            pairs = zip(latents.split(batch), label.split(batch), strict=True)
            images = torch.cat([run.draw(x, y) for x, y in pairs])
            drawn[batch] = to_pixels(images)
            return images

        return evaluate.evaluate(draw, run.tools, run.data, run.config, 1, run.out)

    expected = run.evaluate(run.stages[0])
    assert rows(40) == expected
    (row,), (in_parts,) = expected, rows(7)
    assert in_parts.pop("fid") == pytest.approx(row.pop("fid"), rel=1e-3)
    assert in_parts == row
    # At most a rounding of some pixels by one of 255.
    difference = drawn[40].int() - drawn[7].int()
    assert int(difference.abs().max()) <= 1
    assert float((difference != 0).double().mean()) < 0.01
    assert float(drawn[40].double().std()) > 10  # they are images of something


def test_more_samples_begin_with_the_same_images() -> None:
    few, many = (
        sampling.draw_latents(0, "evaluation", torch.tensor([0, 1]).repeat_interleave(n), (1, 8, 8)) for n in (3, 9)
    )
    assert torch.equal(few[:3], many[:3])
    assert torch.equal(few[3:], many[9:12])


def test_features_of_real_images_are_extracted_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.evaluate(run.stages[0])

    def never(*_: object) -> None:
        raise AssertionError("features of real images were extracted again")

    monkeypatch.setattr(fid, "real_statistics", never)
    assert run.evaluate(run.stages[0]) == first


def test_a_process_without_instruments_only_draws(run: Run) -> None:
    asked: list[Tensor] = []

    def draw(latents: Tensor, label: Tensor) -> Tensor:
        asked.append(label)
        return latents

    assert evaluate.evaluate(draw, None, run.data, run.config, 1, run.out) == []
    assert [label.tolist() for label in asked] == [[0] * 20 + [1] * 20]
    assert not (run.out / "samples").exists()


# What the commands print


def test_train_prints_extractor_and_counts(
    extractor_folder: Path, extractor: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_words(tmp_path / "run", extractor_folder, "fine-tune", tasks=1, steps=2)
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"feature extractor {extractor.name}: 32 features, test accuracy {extractor.test_accuracy:.3f}" in output
    assert "a task's FID compares 8 images (DDIM, 2 steps) with 119 held-out test images" in output
    assert "8 images are fewer than 32 features: FIDs are biased far upwards" in output

    # And the report has it in its caption.
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    caption = (tmp_path / "run" / "comparison.md").read_text()
    for part in (extractor.name, "8 images a task", "DDIM, 2 steps", "119 held-out test images"):
        assert part in caption

    # A finished run is not passed off as measured with something else.
    capsys.readouterr()
    assert cli.main([*arguments, "--extractor", "lenet"]) == 2
    assert f"--extractor is lenet, but the run in '{tmp_path / 'run'}' was measured with {extractor.name}" in (
        capsys.readouterr().err
    )


def test_compare_prints_extractor_and_counts(
    finished: Path,
    extractor_folder: Path,
    extractor: Classifier,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, tmp_path / "gd+rank1-seed0")  # its only cell, so nothing is left to train
    arguments = ["compare", "--methods", "gd+rank1", *options(SHORT), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--extractor-folder", str(extractor_folder)]) == 0
    output = capsys.readouterr().out
    assert f"feature extractor {extractor.name}: 32 features" in output
    assert "a task's FID compares 8 images (DDIM, 2 steps) with 119 to 120 held-out test images" in output
    assert cli.main([*arguments, "--extractor", "inception"]) == 2
    assert "--extractor is inception, but the run in" in capsys.readouterr().err


def test_a_run_resumes_only_with_its_own_extractor_and_classifier(finished: Path, tmp_path: Path, short: Short) -> None:
    out = tmp_path / "run"
    out.mkdir()
    config = json.loads((finished / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config))
    names = {"extractor": config["extractor"], "classifier": config["classifier"]}
    claim(short(), out, "digits", names)
    for key in names:
        with pytest.raises(OptionError, match=f"the {key} is another, but .* was begun with cnn32-digits-8px-"):
            claim(short(), out, "digits", {**names, key: "another"})
