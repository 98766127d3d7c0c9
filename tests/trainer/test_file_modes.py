"""All files that the trainer leaves have the mode that the umask gives to new files, so that a group can share them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crl_diffusion import cli, files
from crl_diffusion.reporting.canvas import Drawing
from helpers.trainer_runs import few_samples, train_words


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, mask: int) -> dict[str, str]:
    """The mode of each file and folder that has another one than the umask gives."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in modes}
    return {str(path.relative_to(folder)): oct(mode) for path, mode in modes.items() if mode != expected[path]}


def test_every_writer(mask: int, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    files.write_tensors(folder / "tensors.safetensors", {"a": torch.ones(2)})
    files.write_text(folder / "text.md", "text")
    files.write_json(folder / "value.json", {})
    files.Log(folder / "rows.jsonl").append({})
    Drawing("picture", b"png", "", "").save(folder)
    with files.locked(folder / ".lock"):
        pass
    assert len(list(folder.iterdir())) >= 5
    assert wrong_modes(folder, mask) == {}
    (folder / "text.md").chmod(0o600)
    files.write_text(folder / "text.md", "other text")
    assert wrong_modes(folder, mask) == {}


@few_samples
def test_a_run_and_its_report(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = tmp_path / "run"
        assert cli.main(train_words(out, tmp_path / "extractors", model="mlp")) == 0
        assert cli.main(["report", str(out)]) == 0
    finally:
        os.umask(before)
    assert list(out.rglob("*.safetensors"))
    assert list(out.rglob("*.png"))
    assert wrong_modes(out, 0o027) == {}
    assert wrong_modes(tmp_path / "extractors", 0o027) == {}


def test_an_error_within_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_text("old")

    def write_half() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert (list(tmp_path.iterdir()), path.read_text()) == ([path], "old")
