"""All files that the trainer leaves have the mode that the umask gives to new files, so that a group can share them."""

from __future__ import annotations

import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from crl_diffusion import cli, files
from crl_diffusion.errors import RecordError
from crl_diffusion.reporting.canvas import Drawing
from crl_diffusion.run_folder.layout import make_writable, require_layout
from helpers.permissions import permissions_hold
from helpers.run_folders import fabricate
from helpers.trainer_runs import contents, few_samples, train_words


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


def command(*words: object) -> str:
    """The exit code and the one line on stderr of a command to which modes of files apply."""
    with permissions_hold(), redirect_stderr(io.StringIO()) as errors, redirect_stdout(io.StringIO()) as output:
        code = cli.main([str(word) for word in words])
    return f"{code} {errors.getvalue() or output.getvalue()}"


@pytest.mark.parametrize("name", ["report", "diagnose", "sample", "export"])
def test_a_folder_that_may_not_be_written_to_is_one_line(name: str, finished: Path, tmp_path: Path) -> None:
    run, before = tmp_path / "run", contents(finished)
    shutil.copytree(finished, run)
    out = {"report": run, "diagnose": run / "diagnosis"}.get(name, tmp_path / "new")
    (tmp_path if out.parent == tmp_path and name in ("sample", "export") else run).chmod(0o555)
    said = command(name, run, *([] if name in ("report", "diagnose") else ["--out", out]))
    assert said.startswith(f"2 crl-diffusion: error: --out is {str(out)!r}, but "), said
    assert "cannot be written to (Permission denied); make it writable, or give another place" in said
    assert said.count("\n") == 1
    assert contents(run) == before


@pytest.mark.parametrize("part", ["summary.json", "metrics.jsonl", "checkpoints"])
def test_a_record_that_may_not_be_read_is_not_called_damaged(part: str, tmp_path: Path, finished: Path) -> None:
    """What helps is other rights; nothing is to be deleted."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / part).chmod(0)
    if part == "checkpoints":
        said = command("sample", tmp_path / "run", "--out", tmp_path / "out")
        assert f"{str(tmp_path / 'run' / part)!r} cannot be read (Permission denied); make it readable" in said
    else:
        said = command("report", tmp_path / "run", "--out", tmp_path / "out")
        assert f"{str(tmp_path / 'run' / part)!r} cannot be read (Permission denied); make it readable" in said
    assert said.startswith("2 crl-diffusion: error: ")
    assert said.count("\n") == 1


def test_a_run_that_may_not_be_looked_into_is_said_to_be_left_out(tmp_path: Path) -> None:
    for method in ("gd", "joint"):
        fabricate(tmp_path / "runs" / method, method, 0, tasks=2, classes_per_task=1)
    (tmp_path / "runs" / "joint").chmod(0)
    said = command("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert said.startswith(f"0 {tmp_path / 'runs' / 'joint'} cannot be read and is left out\n")


def test_an_error_while_a_file_is_written_names_it(tmp_path: Path) -> None:
    for raised, said in (
        (OSError(28, "No space left on device"), f"[Errno 28] No space left on device: {str(tmp_path / 'x.png')!r}"),
        (OSError("cannot write mode F as PNG"), "cannot write mode F as PNG"),
    ):
        with pytest.raises(OSError) as caught, files.replacing(tmp_path / "x.png"):  # noqa: PT011 - of any number
            raise raised
        assert str(caught.value) == said
    with pytest.raises(OSError) as caught, files.replacing(tmp_path / "no folder" / "x.png"):  # noqa: PT011
        pass
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(tmp_path / 'no folder' / 'x.png')!r}"


def test_a_lock_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(RecordError, match=r"\.lock' is no regular file"):
        make_writable(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "timings.jsonl"])
def test_a_link_to_nothing_in_a_run_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("elsewhere")
    with pytest.raises(RecordError, match=rf"{name}' is a link to 'elsewhere', which is not there"):
        require_layout(tmp_path)
