"""Images that a run's model draws: PNG files and a contact sheet.

Image n of class c with seed s starts from noise of its own, and the sampler works on BATCH images at a time, of which
the last may be copies that fill the batch. So on one machine an image is the same bit for bit, whatever is drawn beside
it: the rounding of the network's arithmetic depends on the size of a batch.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crl_diffusion.data.images import to_pixels
from crl_diffusion.diffusion import noising, sampling
from crl_diffusion.errors import OptionError, in_words
from crl_diffusion.files import Row, replacing
from crl_diffusion.trained_model.place import claim
from crl_diffusion.trained_model.weights import TrainedModel

BATCH = 16
RECORD = "samples.json"
PURPOSE = "sample"  # of the random streams
NAME_LENGTH = 60  # characters of a class's name in the name of a file


def chosen_classes(words: Sequence[str], trained: TrainedModel) -> list[int]:
    """The labels that `--classes` asks for: names, numbers, and ranges of numbers such as 0-4; all learnt classes
    without any. OptionError for a word that is none of these, and for a class that has not been learnt."""
    if not words:
        return trained.learnt
    known = trained.learnt
    choice = in_words([f"{c} {name!r}" if (name := trained.names.of(c)) != str(c) else name for c in known])
    result: dict[int, None] = {}
    for word in words:
        labels = _labels(word, trained)
        missing = [c for c in labels if c not in known]
        if not labels or missing:
            fault = f"class {missing[0]} has not been learnt {trained.moment}" if missing else "there is no such class"
            raise OptionError(f"--classes has {word!r}, but {fault}; choose among {choice}")
        result.update(dict.fromkeys(labels))
    return [*result]


def _labels(word: str, trained: TrainedModel) -> list[int]:
    """The classes of one word: a name comes before a number."""
    wanted = unicodedata.normalize("NFC", word)
    named = [c for c, name in enumerate(trained.names.names) if unicodedata.normalize("NFC", name) == wanted]
    if len(named) > 1:
        raise OptionError(f"--classes has {word!r}, the name of classes {in_words([*map(str, named)])}; give a number")
    if named:
        return named
    limits = re.fullmatch("([0-9]{1,6})(?:-([0-9]{1,6}))?", word)
    return list(range(int(limits[1]), int(limits[2] or limits[1]) + 1)) if limits else []


def draw(trained: TrainedModel, labels: Sequence[int], numbers: Sequence[int], seed: int, steps: int) -> Tensor:
    """Image `numbers[i]` of class `labels[i]`, (N, C, S, S) in [-1, 1], for at most BATCH images."""
    filled = [*zip(labels, numbers, strict=True)]
    filled += filled[-1:] * (BATCH - len(filled))
    latents = torch.stack([sampling.draw_latent(seed, PURPOSE, c, n, trained.shape) for c, n in filled])
    label = torch.tensor([c for c, _ in filled])
    schedule = noising.SCHEDULES[trained.config.schedule]
    with trained.precision.autocast():
        return sampling.draw_share(trained.model, schedule, latents, label, steps)[: len(labels)]


def file_stem(trained: TrainedModel, c: int) -> str:
    """How the names of the files of class c begin: its label and those letters of its name that every file system
    takes, or `class-3`."""
    digits = len(str(trained.classes - 1))
    name = trained.names.of(c)
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    plain = re.sub("[^0-9A-Za-z]+", "-", letters)[:NAME_LENGTH].strip("-")
    return f"{c:0{digits}}-{plain}" if plain and name != str(c) else f"class-{c:0{digits}}"


def write_images(
    trained: TrainedModel,
    out: Path,
    classes: Sequence[int],
    count: int,
    seed: int,
    steps: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw images 0 to count - 1 of each class into `out`: STEM-seedS-NNNN.png, sheet.png and samples.json. Returns
    the sheet and the record."""
    from crl_diffusion.reporting import canvas, samples  # matplotlib: not before it is needed

    torch.use_deterministic_algorithms(True, warn_only=True)
    stems = {c: file_stem(trained, c) for c in classes}
    record: Row = {
        **trained.origin(),
        "seed": seed,
        "count": count,
        "steps": steps,
        "classes": [
            {"label": c, "name": trained.names.of(c), "files": f"{stem}-seed{seed}-*.png"} for c, stem in stems.items()
        ],
    }
    claim(out, RECORD, record)
    spread = np.linspace(0, len(classes) - 1, min(len(classes), samples.SHEET_ROWS)).round().astype(int)
    shown: dict[int, list[np.ndarray]] = {classes[i]: [] for i in spread.tolist()}
    wanted = [(c, n) for c in classes for n in range(count)]
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        pixels = to_pixels(draw(trained, *zip(*part, strict=True), seed, steps)).numpy()
        for (c, n), image in zip(part, pixels, strict=True):
            _write_png(out / f"{stems[c]}-seed{seed}-{n:04d}.png", image)
            if c in shown and n < samples.SHEET_COLUMNS:
                shown[c].append(image)
        advance(start + len(part), len(wanted))
    rows = [(canvas.class_label(trained.names, c, 40), np.stack(images)) for c, images in shown.items()]
    config = trained.config  # the name of the data may have letters that the font lacks
    title = f"{config.label} on {config.data}, seed {config.seed}, {trained.moment}; images: seed {seed}, {steps} steps"
    return [canvas.drawing("sheet", samples.sheet(rows, title), "", "").save(out), out / RECORD]


def _write_png(path: Path, pixels: np.ndarray) -> None:
    """An image, uint8 (C, S, S), written completely or not at all."""
    with replacing(path, sync=False) as temporary:  # images can be drawn again
        Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)).save(temporary, "PNG")
