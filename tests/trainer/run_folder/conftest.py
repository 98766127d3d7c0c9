"""Copies of a finished run, to be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.trainer_runs import unfinished_copy


@pytest.fixture
def copy_of(finished: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the finished run, or of it as it was after four steps of its second task: `unfinished`."""

    def copied(state: str) -> Path:
        out = tmp_path / "run"
        if state == "unfinished":
            return unfinished_copy(finished, out)
        shutil.copytree(finished, out)
        return out

    return copied
