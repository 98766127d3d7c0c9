"""Extractors: the networks on whose features FIDs are measured, chosen by name or given by the caller.

    cnn        a small classifier of the same data set, trained here and stored; 32 features whose variances over the
               training images add up to 100, so an FID of 100 is a distance as large as the spread of the data set
    lenet      LeNet-5, trained here and stored; its 84 penultimate features, not scaled
    inception  the InceptionV3 of the literature, 2048 features, from a weights file that the user has downloaded
    Custom     any callable, from Python
FIDs compare only within one data set and one extractor. Every row and table names the extractor and the first digits
of its weights' sha256. Conditional accuracy and class histograms always come from the `cnn`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import get_args

import torch
from torch import Tensor

from crl_diffusion.config.settings import ExtractorName
from crl_diffusion.data.images import Images, to_float, to_pixels
from crl_diffusion.data.tasks import Data
from crl_diffusion.errors import OptionError
from crl_diffusion.evaluation.classifiers import CLASSIFIERS, Cnn, LeNet, classifier
from crl_diffusion.evaluation.features import PART, Extractor, one_line
from crl_diffusion.run_folder.layout import require_place

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


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
        path, sha256 = _inception_weights(folder)
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
                f"({one_line(error)}); get {INCEPTION_URL}, and torchmetrics 1.6.1 or later"
            ) from None
        self.network = metric.inception.to(device)
        self.device = device
        self.name = f"{self.kind}-{sha256[:8]}"

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
    """A callable of the caller from images (N, C, S, S), float32 in [-1, 1] on the CPU, to features (N, d).

    `name` is chosen by the caller. Records identify the extractor by it alone.
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
        features = self(to_float(images.take(torch.arange(2)).pixels))
        if features.dim() != 2 or len(features) != 2 or not features.is_floating_point():
            raise OptionError(
                f"the feature extractor {self.name!r} made {tuple(features.shape)} {features.dtype} of two images; "
                "it must return floating-point features, (N, d)"
            )
        self.num_features = features.shape[1]


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


def require_folder(chosen: ExtractorName | Custom, folder: Path) -> None:
    """OptionError if `folder` cannot be the folder of extractors, or lacks the weights of inception."""
    require_place("--extractor-folder", folder)
    if chosen == "inception":
        _inception_weights(folder)


def _inception_weights(folder: Path) -> tuple[Path, str]:
    """The weights file in `folder` and its sha256, which its name must end with, as names of downloads do."""
    paths = sorted(folder.glob("*inception*.pth"))
    if len(paths) != 1:
        content = "no file *inception*.pth" if not paths else " and ".join(path.name for path in paths)
        raise OptionError(
            f"--extractor is inception, but --extractor-folder {str(folder)!r} holds {content}; put {INCEPTION_FILE} "
            f"there (and only that), from {INCEPTION_URL}"
        )
    sha256 = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    claimed = paths[0].stem.rsplit("-", 1)[-1]
    if len(claimed) != 8 or not sha256.startswith(claimed):
        raise OptionError(
            f"the sha256 of {str(paths[0])!r} begins with {sha256[:8]}, but its name ends with {claimed}: "
            f"it is torn, or another file; get it anew from {INCEPTION_URL}"
        )
    return paths[0], sha256
