"""Copies of runs whose classes have names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path


def with_class_names(run: Path, folder: Path, names: Sequence[str]) -> Path:
    """A copy of a run whose config.json has these names of its classes; returns the copy."""
    shutil.copytree(run, folder)
    name_classes(folder, names)
    return folder


def name_classes(run: Path, names: Sequence[str]) -> None:
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, "class_names": list(names)}))
