"""Files that cannot be read, all checkpoints damaged, files that disappear while a run writes them: no work is lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crl_diffusion import cli, files
from crl_diffusion.comparison import cells
from crl_diffusion.config.settings import Settings
from crl_diffusion.training import run as training_run
from crl_diffusion.training.plan import resolve
from helpers.permissions import permissions_hold
from helpers.trainer_runs import (
    NEWEST,
    SHORT,
    TrainCommand,
    at_call,
    contents,
    few_samples,
    require_one_line,
    same_folder,
)

pytestmark = [few_samples, pytest.mark.usefixtures("no_pictures")]
START = "checkpoints/01-00000000.safetensors"  # which the newest checkpoint needs


@pytest.mark.parametrize(
    ("name", "mode", "state"),
    [
        *((name, 0, "unfinished") for name in (NEWEST, START, "metrics.jsonl", "timings.jsonl", "config.json")),
        ("checkpoints", 0o300, "unfinished"),  # may be entered and written to, and not listed
        ("samples/after-task-1.safetensors", 0, "unfinished"),
        *((name, 0, "finished") for name in ("summary.json", "metrics.jsonl", "samples/after-task-2.safetensors")),
    ],
)
def test_what_cannot_be_read_is_one_line_and_nothing_is_written(
    name: str,
    mode: int,
    state: str,
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of(state)
    before, allowed = contents(out), (out / name).stat().st_mode
    (out / name).chmod(mode)
    with permissions_hold():
        code = train_command()
    (out / name).chmod(allowed)
    assert code == 2
    require_one_line(capsys.readouterr().err, str(out / name), "cannot be read (Permission denied); make it readable")
    assert contents(out) == {**before, ".lock": b""}
    assert train_command() == 0
    same_folder(finished, out)


def test_a_disk_that_cannot_read_a_checkpoint_for_a_moment_loses_nothing(
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of("unfinished")
    before = contents(out)

    def failing(path: Any, *arguments: Any) -> Any:
        if Path(path) == out / NEWEST:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return open(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", failing, raising=False)
        assert train_command() == 2
    require_one_line(capsys.readouterr().err, str(out / NEWEST), "cannot be read (Input/output error)")
    assert contents(out) == {**before, ".lock": b""}
    assert train_command() == 0
    same_folder(finished, out)


def test_another_number_of_threads_is_said(
    train_command: TrainCommand, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of("unfinished")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert train_command() == 0
    finally:
        torch.set_num_threads(threads)
    said = f"the run began in another environment (threads {threads} then, {threads + 1} now): the last bits of its"
    assert said in capsys.readouterr().out


def test_the_same_environment_is_not_remarked_on(
    train_command: TrainCommand, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copy_of("unfinished")
    assert train_command() == 0
    assert "another environment" not in capsys.readouterr().out


def test_a_run_without_a_good_checkpoint_is_not_repeated_without_consent(
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of("unfinished")
    for path in (out / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(out)
    assert train_command() == 2
    require_one_line(capsys.readouterr().err, "holds no good checkpoint", path.name, "or delete this folder")
    assert contents(out) == {**before, ".lock": b""}
    shutil.rmtree(out / "checkpoints")
    assert train_command() == 0
    same_folder(finished, out)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("metrics.jsonl", step) for step in (11, 12)),  # before the last checkpoint within the task, and after it
        *((name, 11) for name in ("timings.jsonl", "config.json", START, NEWEST, "samples/after-task-1.safetensors")),
    ],
)
def test_a_file_that_is_deleted_while_the_run_goes_on_is_no_loss(
    name: str,
    step: int,
    finished: Path,
    train_command: TrainCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, training_run, "training_step", step, (out / name).unlink)
        assert train_command() == 0
    output = capsys.readouterr()
    assert output.err == ""
    if name.endswith(".jsonl"):
        assert f"{str(out / name)!r} was deleted or changed by something else, and is written again" in output.out
    if name == START:
        assert not (out / START).exists()
        shutil.copy(finished / START, out / START)
    assert train_command() == 0
    same_folder(finished, out)


@pytest.mark.parametrize(
    ("name", "change", "kept"),
    [
        ("metrics.jsonl", lambda content: b"".join(content.splitlines(keepends=True)[:3]), "metrics.jsonl.changed"),
        ("timings.jsonl", lambda content: content + b"{}\n", "timings.jsonl.changed"),
        ("config.json", lambda content: content + b"\n", None),
    ],
)
def test_records_that_are_changed_while_the_run_goes_on_are_written_again(
    name: str,
    change: Callable[[bytes], bytes],
    kept: str | None,
    finished: Path,
    train_command: TrainCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run" / name
    changed: list[bytes] = []

    def rewrite() -> None:
        changed.append(change(path.read_bytes()))
        path.write_bytes(changed[0])

    with monkeypatch.context() as patch:
        at_call(patch, training_run, "training_step", 11, rewrite)
        assert train_command() == 0
    assert f"{str(path)!r} was deleted or changed by something else, and is written again" in capsys.readouterr().out
    if kept is not None:
        assert (tmp_path / "run" / kept).read_bytes().startswith(changed[0])
    assert train_command() == 0
    same_folder(finished, tmp_path / "run")


def test_tensorboards_folder_may_be_deleted_while_the_run_goes_on(
    finished: Path, train_command: TrainCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call(monkeypatch, training_run, "training_step", 11, lambda: shutil.rmtree(tmp_path / "run" / "tensorboard"))
    assert train_command() == 0
    same_folder(finished, tmp_path / "run")


@pytest.mark.parametrize(
    "foreign",
    [
        {"config.json": b'{"architectures": ["UNet"]}'},
        {"config.json": b"[1, 2]", "metrics.jsonl": b'{"loss": 1}\n'},
        {"config.json": b"\xff\0"},
        {"summary.json": b""},
        {"metrics.jsonl": b"no JSON"},
        {"metrics.jsonl": b'{"loss": 1}\n', "checkpoints/step-1.safetensors": b"", "samples/1.png": b""},
        {"config.json": b"{}", "summary.json": b'{"loss": 1}', "checkpoints/last.ckpt": b""},
        {"config.json/file": b"a folder of this name"},
    ],
    ids=str,
)
def test_folders_of_other_software_are_passed_over(
    foreign: dict[str, bytes], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(finished, out / "gd+rank1-seed0")
    for name, content in foreign.items():
        (out / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "other" / name).write_bytes(content)
    work = cells.cells(Settings(**SHORT), ["gd"], [0], out)
    for cell in work:
        cell.config = resolve(cell.config)
    cells.check_others(work, out)
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "checkpoints"])
def test_what_is_left_of_a_run_is_not_passed_over(
    left: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    shutil.copytree(finished, out / "gd+rank1-seed0")
    for path in (out / "gd+rank1-seed0").iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 2
    require_one_line(capsys.readouterr().err, str(out / "gd+rank1-seed0" / "config.json"), "is missing; put it back")
