"""Extractors: the networks on whose features FIDs are measured, chosen by name or brought by the caller.

    cnn        a small classifier of the same data set, trained on the spot and kept; 32 features whose variances over
               the training images add up to 100, so that an FID of 100 is as far as the data set is wide
    lenet      LeNet-5, trained on the spot and kept; its 84 penultimate features, as they are
    inception  the InceptionV3 of the literature, 2048 features, from a weights file that the user has downloaded
    Custom     any callable, from Python
FIDs compare within one data set and one extractor, and nothing else: every row and table names the extractor and the
first digits of its weights' sha256. Conditional accuracy and class histograms always come from the `cnn`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from crl_diffusion.checkpoint import write_tensors
from crl_diffusion.data import Data, Images, to_float, to_pixels
from crl_diffusion.diffusion import stream
from crl_diffusion.method import ExtractorName, OptionError

PART = 1000  # images that go through a classifier at a time
CLASSIFIER_STEPS, CLASSIFIER_BATCH, CLASSIFIER_LR = 400, 64, 3e-3  # steps: at least so many
TOTAL_VARIANCE = 100.0
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


def digest(*tensors: Tensor) -> str:
    """sha256 of the tensors' bytes, in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


class Extractor(nn.Module):
    """(N, C, S, S) float32 in [-1, 1], on the CPU -> features (N, num_features), on the CPU.

    `name` stands beside every FID. `keep` says that the name determines the features, so that statistics of real
    images may be kept on disk under it; `part` is how many images it is given at a time.
    """

    num_features: int
    name = "untrained"
    keep = True
    part = PART

    def about(self) -> str:
        """What there is to say of it in one line."""
        return f"feature extractor {self.name}: {self.num_features} features"


class Classifier(Extractor):
    """A classifier of the data set: features are what its last layer sees, times `scale`; `logits` -> (N, classes)."""

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
        """Share of uint8 images that are taken for what their label says."""
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


class Inception(Extractor):
    """torchmetrics' InceptionV3, which is torch-fidelity's: 2048 features of the last pooling layer.

    As torchmetrics does it, uint8 images are resized to 299x299 by the network itself (bilinear, with antialiasing);
    grey images are repeated into three channels. Runs on `device`; about 0.2 s an image on one CPU core.
    """

    kind = "inception2048"
    num_features = 2048
    part = 50  # its largest layer, 147 x 147 x 64, is 277 MB of float32 for 50 images

    def __init__(self, folder: Path, device: str) -> None:
        super().__init__()
        path, found = _inception_weights(folder)
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            metric = FrechetInceptionDistance(self.num_features, feature_extractor_weights_path=str(path))
        except ModuleNotFoundError:
            raise OptionError(
                "--extractor is inception, whose network is torch-fidelity's, and that is not installed; "
                "pip install 'crl-kernels[inception]' (or torch-fidelity), or choose --extractor cnn"
            ) from None
        except (RuntimeError, ValueError, AttributeError, TypeError, EOFError, UnpicklingError) as error:
            raise OptionError(
                f"--extractor is inception, but torchmetrics does not take {str(path)!r} for its weights "
                f"({_one_line(error)}); get {INCEPTION_URL}, and torchmetrics 1.6.1 or later"
            ) from None
        self.network = metric.inception.to(device)
        self.device = device
        self.name = f"{self.kind}-{found[:8]}"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        pixels = to_pixels(images).to(self.device)
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        features: Tensor = self.network(pixels)
        return features.cpu()

    def about(self) -> str:
        published = self.name.endswith(INCEPTION_FILE.split("-")[-1].removesuffix(".pth"))
        return super().about() + ("" if published else "; these are NOT the weights of the literature")


class Custom(Extractor):
    """The caller's own: a callable from images (N, C, S, S), float32 in [-1, 1] on the CPU, to features (N, d).

    `name` is the caller's word for it, and all that tells it apart from others in records.
    """

    keep = False

    def __init__(self, name: str, features: Callable[[Tensor], Tensor], part: int = PART) -> None:
        super().__init__()
        self.name, self.features, self.part = name, features, part

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).cpu()

    def probe(self, images: Images) -> None:
        """Learn `num_features` from two images."""
        found = self(to_float(images.take(torch.arange(2)).pixels))
        if found.dim() != 2 or len(found) != 2 or not found.is_floating_point():
            raise OptionError(
                f"the feature extractor {self.name!r} made {tuple(found.shape)} {found.dtype} of two images; "
                "it must return floating-point features, (N, d)"
            )
        self.num_features = found.shape[1]


CLASSIFIERS: dict[str, Callable[[int, int, int], Classifier]] = {"cnn": Cnn, "lenet": LeNet}
KINDS = {"cnn": Cnn.kind, "lenet": LeNet.kind, "inception": Inception.kind}  # how the names of extractors begin


def extractor(chosen: ExtractorName | Custom, data: Data, folder: Path, device: str = "cpu") -> Extractor:
    """The extractor of that name for a data set. `folder` is where trained ones are kept and where inception's weights
    are looked for; `device` is where inception runs."""
    if isinstance(chosen, Custom):
        chosen.probe(data.train)
        return chosen.eval()
    if chosen == "inception":
        return Inception(folder, device).eval().requires_grad_(False)
    if chosen not in CLASSIFIERS:
        raise OptionError(f"--extractor is {chosen!r}; choose one of {', '.join(get_args(ExtractorName))}")
    return classifier(data, folder, chosen)


def classifier(data: Data, folder: Path, chosen: str = "cnn") -> Classifier:
    """The data set's classifier: read from `folder`, or trained and kept there. It does not depend on a run's seed.

    Its file is named by the training images, so that one folder serves several data sets.
    """
    channels, size, _ = data.shape
    model = CLASSIFIERS[chosen](channels, size, data.classes)
    steps = max(CLASSIFIER_STEPS, model.epochs * len(data.train.labels) // CLASSIFIER_BATCH)
    images = digest(*(tensor for part in data.train.batches(PART) for tensor in (part.pixels, part.labels)))
    recipe = f"{steps} steps of {CLASSIFIER_BATCH}"
    made_for = {"data": data.name, "size": str(size), "recipe": recipe, "images": images}
    path = folder / f"{model.file}-{data.name}-{size}px-{images[:8]}.safetensors"
    if path.exists():
        _read(model, path, made_for)
    else:
        _fit(model, data.train, steps)
        model.test_accuracy = model.accuracy(data.test.pixels, data.test.labels)
        write_tensors(path, model.state_dict(), {**made_for, "test_accuracy": repr(model.test_accuracy)})
    model.name = f"{model.kind}-{data.name}-{size}px-{digest(*model.state_dict().values())[:8]}"
    return model.eval().requires_grad_(False)


def _read(model: Classifier, path: Path, made_for: dict[str, str]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, OSError) as error:
        raise OptionError(
            f"the extractor {str(path)!r} cannot be read ({_one_line(error)}); delete it, and it is made anew"
        ) from None
    differ = [key for key, value in made_for.items() if metadata.get(key) != value]
    if differ:
        what = ", ".join(f"{key} {metadata.get(key)!r} there, {made_for[key]!r} here" for key in differ)
        raise OptionError(f"the extractor {str(path)!r} was made for something else ({what}); delete it")
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


def _inception_weights(folder: Path) -> tuple[Path, str]:
    """The weights file in `folder` and its sha256, which its name must end with, as names of downloads do."""
    found = sorted(folder.glob("*inception*.pth"))
    if len(found) != 1:
        what = "no file *inception*.pth" if not found else " and ".join(path.name for path in found)
        raise OptionError(
            f"--extractor is inception, but --extractor-folder {str(folder)!r} holds {what}; put {INCEPTION_FILE} "
            f"there (and only that), from {INCEPTION_URL}"
        )
    with open(found[0], "rb") as file:
        sha256 = hashlib.sha256()
        while block := file.read(1 << 20):
            sha256.update(block)
    claimed = found[0].stem.rsplit("-", 1)[-1]
    if len(claimed) != 8 or not sha256.hexdigest().startswith(claimed):
        raise OptionError(
            f"the sha256 of {str(found[0])!r} begins with {sha256.hexdigest()[:8]}, but its name ends with {claimed}: "
            f"it is torn, or another file; get it anew from {INCEPTION_URL}"
        )
    return found[0], sha256.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
