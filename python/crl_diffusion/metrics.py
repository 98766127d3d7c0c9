"""Metrics: FID of each task after each task (the matrix R), what is derived from it, and conditional accuracy.

R[i][j], j <= i, is the FID of task j's images after learning task i; lower is better. T is the number of tasks.
    average FID             mean_j R[T-1][j]
    incremental average     mean_i mean_{j<=i} R[i][j]
    forgetting              sum_{j<T-1} (R[T-1][j] - R[j][j]) / (T - 1);  positive is worse
    forgetting, divisor T   the same sum divided by T, as the rank-1 paper has it
FIDs are torchmetrics' FrechetInceptionDistance on the features of a small classifier of the same data set, trained on
the spot and scaled so that the variances of its features over the training images add up to 100: an FID of 100 is as
far as the whole data set is wide. They compare methods within one data set and one extractor, and nothing else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from crl_diffusion.checkpoint import sync_folder
from crl_diffusion.data import Data, Images, to_float
from crl_diffusion.diffusion import stream
from crl_diffusion.method import OptionError

Matrix = Sequence[Sequence[float]]  # row i holds tasks 0 .. i; rows of tasks that were not evaluated are empty

EXTRACTOR_STEPS, EXTRACTOR_EPOCHS, EXTRACTOR_BATCH, EXTRACTOR_LR = 400, 2, 64, 3e-3  # the longer of steps and epochs
TOTAL_VARIANCE = 100.0


def average_fid(r: Matrix) -> float:
    return sum(r[-1]) / len(r[-1])


def incremental_average_fid(r: Matrix) -> float | None:
    """None where some task was not followed by an evaluation, as in joint training."""
    if any(not row for row in r):
        return None
    return sum(sum(row) / len(row) for row in r) / len(r)


def forgetting(r: Matrix, divisor: int) -> float | None:
    """sum_j (R[T-1][j] - R[j][j]) / divisor; None for a single task, or where some R[j][j] was not measured."""
    if len(r) < 2 or any(not row for row in r):
        return None
    return sum(r[-1][j] - r[j][j] for j in range(len(r) - 1)) / divisor


class Extractor(nn.Module):
    """A small convolutional classifier: (N, C, S, S) in [-1, 1] -> features (N, 32); `logits` -> (N, classes)."""

    num_features = 32

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
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.name = "untrained"
        self.test_accuracy = float("nan")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images) * self.scale
        return features

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits

    @torch.no_grad()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Share of uint8 images that are taken for what their label says."""
        parts = zip(pixels.split(1000), labels.split(1000), strict=True)
        right = sum(int((self.logits(to_float(x)).argmax(1) == y).sum()) for x, y in parts)
        return right / len(labels)


def extractor(data: Data, path: Path) -> Extractor:
    """The data set's extractor: read from `path`, or trained and kept there. It does not depend on the run's seed."""
    channels, size, _ = data.shape
    steps = max(EXTRACTOR_STEPS, EXTRACTOR_EPOCHS * len(data.train.labels) // EXTRACTOR_BATCH)
    made_for = {"data": data.name, "size": str(size), "recipe": f"{steps} steps of {EXTRACTOR_BATCH}"}
    model = Extractor(channels, size, data.classes)
    if path.exists():
        _read(model, path, made_for)
    else:
        _fit(model, data.train, steps)
        model.test_accuracy = model.accuracy(*data.test)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(model.state_dict(), temporary, {**made_for, "test_accuracy": repr(model.test_accuracy)})
        os.replace(temporary, path)
        sync_folder(path.parent)
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()
    model.name = f"cnn32-{data.name}-{size}px-{digest[:8]}"
    return model.eval().requires_grad_(False)


def _read(model: Extractor, path: Path, made_for: dict[str, str]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, OSError) as error:
        raise OptionError(
            f"the extractor {str(path)!r} cannot be read ({error}); delete it, and it is made anew"
        ) from None
    if {key: metadata.get(key) for key in made_for} != made_for:
        raise OptionError(
            f"the extractor {str(path)!r} was made for {metadata.get('data')} at {metadata.get('size')} pixels, not "
            f"for {made_for['data']} at {made_for['size']}; use another folder, or delete it"
        )
    model.test_accuracy = float(metadata["test_accuracy"])


def _fit(model: Extractor, train: Images, steps: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(0, "extractor weights").initial_seed())
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), EXTRACTOR_LR, fused=True)
    for step in range(steps):
        index = torch.randint(len(train.labels), (EXTRACTOR_BATCH,), generator=stream(0, "extractor batch", 0, step))
        optimizer.param_groups[0]["lr"] = EXTRACTOR_LR * (1 - step / steps)
        loss = functional.cross_entropy(model.logits(to_float(train.pixels[index])), train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = torch.cat([model(to_float(part)) for part in train.pixels.split(1000)])
        model.scale.copy_((TOTAL_VARIANCE / features.double().var(0).sum()).sqrt())


def fid(features: Extractor, real: Tensor, generated: Tensor) -> float:
    """FID between two sets of uint8 images (N, C, S, S)."""
    # torchmetrics takes a second to import; commands that only read results do without it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    # One process measures alone: torchmetrics would wait for the others.
    metric = FrechetInceptionDistance(feature=features, normalize=True, sync_on_compute=False)
    for pixels, is_real in ((real, True), (generated, False)):
        for part in pixels.split(1000):
            metric.update(to_float(part), real=is_real)
    return float(metric.compute())
