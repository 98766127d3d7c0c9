"""Small classifiers of a data set, trained here and stored, whose features FIDs are measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from crl_diffusion.data.images import Images, to_float
from crl_diffusion.data.tasks import Data
from crl_diffusion.diffusion.noising import stream
from crl_diffusion.errors import OptionError
from crl_diffusion.evaluation.features import PART, Extractor, digest, one_line
from crl_diffusion.files import read_tensors, write_tensors

CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 400, 64, 3e-3  # the number of steps is a minimum
TOTAL_VARIANCE = 100.0


class Classifier(Extractor):
    """A classifier of the data set. Features are the inputs of its last layer, times `scale`; `logits` has
    the shape (N, classes)."""

    kind: str
    file: str
    epochs: int
    total_variance: float | None
    body: nn.Sequential
    head: nn.Linear
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.test_accuracy = float("nan")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images) * self.scale
        return features

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def predictions(self, pixels: Tensor) -> Tensor:
        """Most likely class of each uint8 image, (N,) int64."""
        return torch.cat([self.logits(to_float(part)).argmax(1) for part in pixels.split(PART)])

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of uint8 images whose prediction is their label."""
        return int((self.predictions(pixels) == labels).sum()) / len(labels)

    def about(self) -> str:
        return f"{super().about()}, test accuracy {self.test_accuracy:.3f}"


class Cnn(Classifier):
    """Three convolutions, 32 features."""

    kind, file, num_features, epochs, total_variance = "cnn32", "cnn", 32, 2, TOTAL_VARIANCE

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        stride = 1 if size <= 8 else 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1, stride=stride),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, classes)


class LeNet(Classifier):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling: 5x5 convolutions to 6 and 16 channels, then 120 and 84.

    Images are resized to its 32x32 pixels (bilinear). Grey digits and clothes are far from what InceptionV3 was trained
    on, so FIDs of MNIST-like sets are often measured on such a network (Binkowski et al., arXiv 1801.01401). There is
    no published set of weights: these are trained here, three epochs, so values do not compare with any paper's.
    """

    kind, file, num_features, epochs, total_variance = "lenet84", "lenet", 84, 3, None

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Upsample(size=(32, 32), mode="bilinear"),
            nn.Conv2d(channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 25, 120),
            nn.ReLU(),
            nn.Linear(120, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, classes)


CLASSIFIERS: dict[str, Callable[[int, int, int], Classifier]] = {"cnn": Cnn, "lenet": LeNet}


def classifier(data: Data, folder: Path, chosen: str = "cnn") -> Classifier:
    """The data set's classifier, read from `folder`, or trained and stored there. It does not depend on a run's seed.

    The name of its file has a digest of the training images, so one folder serves several data sets.
    """
    channels, size, _ = data.shape
    model = CLASSIFIERS[chosen](channels, size, data.classes)
    steps = max(CLASSIFIER_STEPS, model.epochs * len(data.train.labels) // CLASSIFIER_BATCH)
    images = digest(*(tensor for part in data.train.batches(PART) for tensor in (part.pixels, part.labels)))
    recipe = f"{steps} steps of {CLASSIFIER_BATCH}"
    subject = {"data": data.name, "size": str(size), "recipe": recipe, "images": images}
    path = folder / f"{model.file}-{data.name}-{size}px-{images[:8]}.safetensors"
    if path.exists():
        _read(model, path, subject)
    else:
        _fit(model, data.train, steps)
        model.test_accuracy = model.accuracy(data.test.pixels, data.test.labels)
        write_tensors(path, model.state_dict(), {**subject, "test_accuracy": repr(model.test_accuracy)})
    model.name = f"{model.kind}-{data.name}-{size}px-{digest(*model.state_dict().values())[:8]}"
    return model.eval().requires_grad_(False)


def _read(model: Classifier, path: Path, subject: dict[str, str]) -> None:
    try:
        metadata, tensors = read_tensors(path)
        model.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise OptionError(
            f"the extractor {str(path)!r} is damaged ({one_line(error)}); delete it, and it is made anew"
        ) from None
    differ = [key for key, value in subject.items() if metadata.get(key) != value]
    if differ:
        changes = ", ".join(f"{key} {metadata.get(key)!r} there, {subject[key]!r} here" for key in differ)
        raise OptionError(f"the extractor {str(path)!r} was made for something else ({changes}); delete it")
    try:
        model.test_accuracy = float(metadata["test_accuracy"])
    except (KeyError, ValueError):
        raise OptionError(
            f"the extractor {str(path)!r} does not say its test accuracy; delete it, and it is made anew"
        ) from None


def _fit(model: Classifier, train: Images, steps: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(0, "extractor weights").initial_seed())
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), CLASSIFIER_LR, fused=True)
    for step in range(steps):
        index = torch.randint(len(train.labels), (CLASSIFIER_BATCH,), generator=stream(0, "extractor batch", 0, step))
        optimizer.param_groups[0]["lr"] = CLASSIFIER_LR * (1 - step / steps)
        batch = train.take(index)
        loss = functional.cross_entropy(model.logits(to_float(batch.pixels)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if model.total_variance is not None:
        with torch.no_grad():
            features = torch.cat([model(to_float(part.pixels)) for part in train.batches(PART)])
            model.scale.copy_((model.total_variance / features.double().var(0).sum()).sqrt())
