"""Data sets for tests of reading: random images, folders of them, and a loader of any set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.data import tasks
from crl_diffusion.training.plan import resolve
from PIL import Image


def load(name: str, root: Path, **settings: Any) -> tasks.Data:
    return tasks.load(resolve(RunConfig(method="fine-tune", data=name, **settings)), root)  # type: ignore[arg-type]


def noise(seed: int, n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_tree(
    root: Path,
    classes: tuple[str, ...],
    n: int = 3,
    side: tuple[int, int] = (32, 32),
    held_out: str = "test",
    suffix: str = ".png",
) -> None:
    for part in ("train", held_out):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(noise(100 * c + i, side[1], side[0], 3)).save(folder / f"{i}{suffix}")
