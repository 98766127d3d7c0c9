"""Extractors: trained ones are kept, inception is torchmetrics', the caller's own is what the caller says."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import images, tasks
from crl_diffusion.errors import OptionError
from crl_diffusion.evaluation import classifiers, evaluate, extractors, features, fid
from crl_diffusion.evaluation.classifiers import Classifier
from crl_diffusion.evaluation.extractors import Custom
from crl_diffusion.files import read_json, read_rows
from crl_diffusion.training import loop
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def test_features_have_the_total_variance_that_is_promised(extractor: Classifier, digits: tasks.Data) -> None:
    features = extractor(images.to_float(digits.train.pixels)).double()
    assert features.shape == (len(digits.train.labels), extractor.num_features) == (len(digits.train.labels), 32)
    assert float(features.var(0).sum()) == pytest.approx(classifiers.TOTAL_VARIANCE, rel=1e-4)


@pytest.mark.parametrize(("chosen", "named", "parameters"), [("cnn", "cnn32", 89_034), ("lenet", "lenet84", 61_706)])
def test_classifiers_know_the_digits_and_are_kept(
    digits: tasks.Data, extractor_folder: Path, chosen: str, named: str, parameters: int
) -> None:
    trained = classifiers.classifier(digits, extractor_folder, chosen)
    assert trained.name.startswith(f"{named}-digits-8px-")
    assert features.digest(*trained.state_dict().values()).startswith(trained.name[-8:])
    assert trained.test_accuracy > 0.95
    assert trained.accuracy(digits.test.pixels, digits.test.labels) == trained.test_accuracy
    wrong = (digits.test.labels + 1) % 10
    assert trained.accuracy(digits.test.pixels, wrong) < 0.05
    assert trained.name in trained.about()
    assert f"{trained.num_features} features, test accuracy {trained.test_accuracy:.3f}" in trained.about()
    if chosen == "lenet":
        assert sum(p.numel() for p in trained.parameters()) == parameters  # LeNet-5's, as counted in 1998's layout
    before = {path: path.stat().st_mtime_ns for path in extractor_folder.glob("*.safetensors")}
    again = classifiers.classifier(digits, extractor_folder, chosen)
    assert again.name == trained.name
    assert {path: path.stat().st_mtime_ns for path in extractor_folder.glob("*.safetensors")} == before
    x = images.to_float(digits.test.pixels[:5])
    assert torch.equal(again(x), trained(x))


def _file(folder: Path) -> Path:
    """The first one that was trained; other tests may have added others."""
    return min(folder.glob("cnn-digits-8px-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


def test_other_training_images_have_an_extractor_of_their_own(
    digits: tasks.Data, extractor_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "CLASSIFIER_STEPS", 1)  # it need not be good
    train = images.Images(digits.train.pixels[:64], digits.train.labels[:64])
    before = set(extractor_folder.glob("*.safetensors"))
    classifiers.classifier(replace(digits, train=train), extractor_folder)
    (added,) = set(extractor_folder.glob("*.safetensors")) - before
    added.unlink()


def test_an_extractor_of_other_images_or_a_torn_one_is_refused(
    extractor_folder: Path, digits: tasks.Data, tmp_path: Path
) -> None:
    path = tmp_path / _file(extractor_folder).name
    content = _file(extractor_folder).read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(OptionError, match=r"is damaged .*delete it"):
        classifiers.classifier(digits, tmp_path)
    path.write_bytes(content)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "data": "mnist"})
    with pytest.raises(OptionError, match=r"for something else \(data 'mnist' there, 'digits' here\); delete it"):
        classifiers.classifier(digits, tmp_path)


def test_an_unknown_extractor_is_refused(digits: tasks.Data, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--extractor is 'vgg'; choose one of cnn, lenet, inception"):
        extractors.extractor("vgg", digits, tmp_path)  # type: ignore[arg-type]


# The caller's own


def _moments(images: Tensor) -> Tensor:
    """Mean, spread and middle pixel: (N, 3)."""
    return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images[:, 0, 4, 4]], 1)


def test_a_callable_measures_fid_under_its_given_name(
    extractor_folder: Path, digits: tasks.Data, tmp_path: Path, short: Callable[..., RunConfig]
) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    lines: list[str] = []
    config, mine = short("fine-tune", tasks=1, eval_samples=12), Custom("three-moments", _moments)
    summary = loop.train(config, tmp_path, features=mine, extractor_folder=extractor_folder, say=lines.append)
    (row,) = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "evaluation"]
    assert row["extractor"] == summary["extractor"] == "three-moments"
    assert row["classifier"].startswith("cnn32-digits-8px-")
    assert "feature extractor three-moments: 3 features" in lines
    assert read_json(tmp_path / "config.json")["classifier"] == row["classifier"]

    class Moments(torch.nn.Module):
        num_features = 3

        def forward(self, images: Tensor) -> Tensor:
            return _moments(images)

    metric = FrechetInceptionDistance(feature=Moments(), normalize=True)
    drawn = load_file(tmp_path / "samples" / "after-task-1.safetensors")  # all of them: 12 a class
    metric.update(images.to_float(digits.tasks[0].held_out.pixels), real=True)
    metric.update(images.to_float(drawn["pixels"]), real=False)
    assert row["fid"] == pytest.approx(float(metric.compute()), rel=1e-4)

    # Its code cannot be known from its name: nothing that was computed with it is kept on disk.
    assert not list((extractor_folder / "real-statistics").glob("three-moments*"))
    assert loop.train(config, tmp_path, features=mine) == summary
    with pytest.raises(OptionError, match=r"--extractor is cnn, but the run in .* was measured with three-moments"):
        loop.train(config, tmp_path)


def test_a_callable_that_returns_no_features_is_refused(digits: tasks.Data, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'flat' made \(2,\) torch.float32 of two images; .* \(N, d\)"):
        extractors.extractor(Custom("flat", lambda images: images.mean((1, 2, 3))), digits, tmp_path)


# Inception


def test_inception_without_weights_is_an_error_with_their_address(digits: tasks.Data, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        extractors.extractor("inception", digits, tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    for part in (str(tmp_path), "--extractor-folder", "pt_inception-2015-12-05-6726825d.pth", "https://github.com/"):
        assert part in text
    torn = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torn.write_bytes(b"half a download")
    with pytest.raises(
        OptionError, match=r"sha256 of .* begins with .{8}, but its name ends with 6726825d: it is torn"
    ):
        extractors.extractor("inception", digits, tmp_path)


def _honest(folder: Path, content: Path) -> Path:
    """A weights file under a name that ends with its digest, as the published one's does."""
    path = folder / f"inception-{hashlib.sha256(content.read_bytes()).hexdigest()[:8]}.pth"
    shutil.move(content, path)
    return path


def test_inception_without_its_package_is_an_error_with_what_to_install(
    digits: tasks.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    (tmp_path / "w").write_bytes(b"weights")
    _honest(tmp_path, tmp_path / "w")
    with pytest.raises(OptionError, match="torch-fidelity's, and that is not installed; pip install"):
        extractors.extractor("inception", digits, tmp_path)


def test_inception_is_torchmetrics_inception(
    digits: tasks.Data, extractor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Random weights: the architecture initialises itself and then wants a file, which is left out once.
    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        random = network.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty"))
    (tmp_path / "empty").unlink()
    for layer in random.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)  # as it initialises itself, images fade out on the way
    torch.save({name: value.half() for name, value in random.state_dict().items()}, tmp_path / "w")
    weights = _honest(tmp_path, tmp_path / "w")

    extractor = extractors.extractor("inception", digits, tmp_path)
    assert extractor.name == f"inception2048-{weights.stem[-8:]}"
    assert extractor.about().endswith("2048 features; these are NOT the weights of the literature")
    real, generated = digits.test.pixels[:4], digits.test.pixels[4:8]
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights))
    metric.update(real.repeat(1, 3, 1, 1), real=True)
    metric.update(generated.repeat(1, 3, 1, 1), real=False)
    expected = float(metric.compute())
    assert expected > 0.1
    assert fid.fid(extractor, fid.real_statistics(extractor, real), generated) == pytest.approx(expected, rel=1e-4)

    # Classes are still told apart by the data set's own classifier.
    shutil.copy(_file(extractor_folder), tmp_path)
    tools = evaluate.instruments("inception", digits, tmp_path)
    assert tools.classifier.name.startswith("cnn32-digits-8px-")
    config = RunConfig(method="gd", eval_samples=2)
    task = replace(digits.tasks[0], held_out=images.Images(real, digits.test.labels[:4]))
    row = evaluate.measure(tools, digits, config, task, images.Images(generated, torch.tensor([0, 0, 1, 1])))
    assert row["fid"] == pytest.approx(expected, rel=1e-4)
    assert (row["extractor"], row["classifier"]) == (extractor.name, tools.classifier.name)
    assert any("4 images are fewer than 2048 features" in line for line in tools.about(config, digits))

    # Not its weights at all.
    weights.unlink()
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "w")
    _honest(tmp_path, tmp_path / "w")
    with pytest.raises(OptionError, match=r"does not take .* for its weights"):
        extractors.extractor("inception", digits, tmp_path)
