"""A wrong clock, folders and files that may not be written, few file descriptors, files that the system cuts off."""

from __future__ import annotations

import os
import random
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crl_diffusion import cli
from helpers.permissions import permissions_hold
from helpers.trainer_runs import (
    SHORT,
    TrainCommand,
    contents,
    few_samples,
    options,
    require_one_line,
    same_end,
    same_folder,
    unfinished_copy,
)

resource = pytest.importorskip("resource", reason="limits of a process need POSIX")
pytestmark = few_samples


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Neither the folder nor anything in it may be written to within the block."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with permissions_hold():
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.usefixtures("no_pictures")
def test_a_clock_that_jumps_changes_no_bit(
    finished: Path, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: clock.uniform(0.0, 4e9))  # from 1970 to 2096
    assert train_command() == 0
    same_end(finished, tmp_path / "run")


@pytest.mark.parametrize("command", ["train", "compare", "report", "diagnose", "sample"])
def test_a_place_that_may_not_be_written_to_is_one_line(
    command: str, finished: Path, extractor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    short = [*options(SHORT), "--extractor-folder", str(extractor_folder)]
    words = {
        "train": ["--method", "gd", *short],
        "compare": ["--methods", "gd", *short],
        "diagnose": [str(finished), "--samples", "48", "--device", "cpu"],
    }.get(command, [str(finished)])
    with read_only(place):
        code = cli.main([command, *words, "--out", str(place / "out" if command != "report" else place)])
    assert code == 2
    require_one_line(capsys.readouterr().err, str(place), "Permission denied")
    assert contents(place) == {}


@pytest.mark.parametrize("command", ["train", "report"])
def test_a_run_of_another_user_that_may_only_be_read_stays_as_it_is(
    command: str, finished: Path, train_command: TrainCommand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unfinished_copy(finished, tmp_path / "run") if command == "train" else finished
    before = contents(out)
    with read_only(out):
        code = train_command() if command == "train" else cli.main(["report", str(out)])
    assert code == 2
    require_one_line(capsys.readouterr().err, str(out), "Permission denied")
    assert contents(out) == before


def test_32_file_descriptors_are_enough(finished: Path, train_command: TrainCommand, tmp_path: Path) -> None:
    with limit(resource.RLIMIT_NOFILE, max(32, len(os.listdir("/dev/fd")) + 12)):
        assert train_command() == 0
        assert cli.main(["report", str(tmp_path / "run")]) == 0
    same_folder(finished, tmp_path / "run")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("size", [100, 1_000, 3_000, 30_000])
def test_files_that_the_system_cuts_off_are_one_line_and_no_loss(
    size: int,
    finished: Path,
    train_command: TrainCommand,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The limit of a file's size ends a write in its middle, as a full disk does."""
    with limit(resource.RLIMIT_FSIZE, size):
        code = train_command()
    assert code in (1, 2)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "File too large" in errors
    assert not list(tmp_path.rglob("*.tmp"))
    assert train_command() == 0
    same_folder(finished, tmp_path / "run")
