"""Comparing runs, end to end: training, tables, pictures, the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from crl_diffusion import cli
from crl_diffusion.cli import parser
from crl_diffusion.cli.options import Train
from crl_diffusion.comparison import cells
from crl_diffusion.config.settings import Settings
from crl_diffusion.errors import WriteError
from crl_diffusion.evaluation import classifiers
from crl_diffusion.run_folder.readers import read_run_config
from helpers.run_folders import fabricate
from helpers.trainer_runs import SHORT, child_environment, options
from PIL import Image

RANK1 = "gd+rank1_lam=7-seed0"
PICTURES = ("samples.png", "fid_matrices.png", "average_fid.png")


def _is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    return colours is not None and len(colours) > 20


def test_two_methods_end_to_end(
    tmp_path: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "comparison"
    out.mkdir()
    shutil.copytree(extractor_folder, out, dirs_exist_ok=True)
    arguments = ["compare", "--methods", "fine-tune", "gd+rank1", "--jobs", "2", "--lams", "7", *options(SHORT)]
    arguments += ["--out", str(out)]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    words = " ".join(output.split())
    for part in ("average", "forgetting", "conditional", "ms/step", "bytes", "One seed"):
        assert part in words
    for name in PICTURES:
        assert str(out / name) in output
        assert _is_picture(out / name)
    assert str(out / "report.html") in output
    assert (out / "report.html").read_text().count("<img ") >= len(PICTURES)
    for cell in ("fine-tune-seed0", RANK1):
        for name in ("samples.png", "fid_matrix.png", "curves.png"):
            assert _is_picture(out / cell / name)
        assert list((out / cell / "tensorboard").iterdir())

    values = {run["method"]: run for run in json.loads((out / "comparison.json").read_text())["runs"]}
    assert list(values) == ["fine-tune", "gd+rank1:lam=7"]
    assert values["fine-tune"]["penalty_ms"] is None
    assert values["fine-tune"]["state_bytes"] == 0
    assert values["gd+rank1:lam=7"]["penalty_ms"] > 0
    assert values["gd+rank1:lam=7"]["state_bytes"] > 0
    # Before the first old class, all methods are one.
    assert values["fine-tune"]["fid_matrix"][0] == values["gd+rank1:lam=7"]["fid_matrix"][0]
    assert values["fine-tune"]["fid_matrix"][1] != values["gd+rank1:lam=7"]["fid_matrix"][1]
    config = json.loads((out / RANK1 / "config.json").read_text())["run"]
    assert config["recipe"]["penalty"]["lam"] == 7

    table = (out / "comparison.md").read_text()
    assert "| fine-tune |" in table
    assert f"{values['gd+rank1:lam=7']['average_fid']:,.1f}" in table

    # The same command again trains nothing.
    before = {path: path.stat().st_mtime_ns for cell in ("fine-tune-seed0", RANK1) for path in (out / cell).rglob("*")}
    assert cli.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "already finished" in capsys.readouterr().out

    # Other settings in the same folder: refused before anything starts.
    assert cli.main([*arguments, "--lr", "0.01"]) == 2
    assert "holds another run (lr 0.002 there, 0.01 asked for)" in capsys.readouterr().err


def test_a_method_and_its_variants_end_to_end(
    tmp_path: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    shutil.copytree(extractor_folder, tmp_path, dirs_exist_ok=True)
    arguments = ["compare", *options({**SHORT, "model": "mlp", "ema": 0.5}), "--jobs", "2", "--out", str(tmp_path)]
    arguments += ["--methods", "fine-tune", "fine-tune@ema=0,lr-later=0.3", "--baseline", "fine-tune"]
    assert cli.main(arguments) == 0
    assert "fine-tune@lr-later=0.3, seed 0: finished" in capsys.readouterr().out

    runs = {run["label"]: run for run in json.loads((tmp_path / "comparison.json").read_text())["runs"]}
    assert list(runs) == ["fine-tune@lr-later=0.3", "fine-tune@ema=0.5"]
    configs = [read_run_config(tmp_path / run["folder"]) for run in runs.values()]
    assert [(c.method, c.ema, c.lr_later) for c in configs] == [("fine-tune", 0.0, 0.3), ("fine-tune", 0.5, 1.0)]
    assert all(f"\n| {label} | 1 |" in (tmp_path / "comparison.md").read_text() for label in runs)
    # --ema holds for a baseline without its own, as it does for methods.
    assert '<tr class="baseline">\n<td>fine-tune@<wbr>ema=0.5</td>' in (tmp_path / "report.html").read_text()


def test_runs_measured_with_other_networks_are_refused_before_training(
    tmp_path: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "fine-tune-seed0"
    fabricate(old, "fine-tune", 0, **SHORT)
    arguments = ["compare", "--methods", "gd", *options(SHORT), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--extractor-folder", str(extractor_folder)]) == 2
    output = capsys.readouterr().err
    assert "the extractor is cnn32-digits-8px-" in output
    assert f"the run in {str(old)!r} was begun with cnn32-digits;" in output
    assert not (tmp_path / "gd-seed0").exists()


@pytest.mark.parametrize("command", [["compare", "--methods", "gd"], ["train", "--method", "gd"]])
def test_extractors_that_cannot_be_stored_are_a_one_line_error(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object) -> None:
        raise WriteError(f"{str(path)!r} cannot be written (no space left on device)")

    monkeypatch.setattr(classifiers, "write_tensors", full)
    monkeypatch.setattr(classifiers, "_fit", lambda *_: None)
    arguments = [*command, *options(SHORT), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--extractor-folder", str(tmp_path / "extractors")]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert f"(no space left on device); make {str(tmp_path / 'extractors')!r} writable, with room" in output


def test_a_failed_run_is_shown_and_the_others_are_kept(
    tmp_path: Path, extractor_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    shutil.copytree(extractor_folder, tmp_path, dirs_exist_ok=True)
    settings = {**SHORT, "tasks": 1, "lr": 1e30}
    assert cli.main(["compare", "--methods", "fine-tune", *options(settings), "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().err
    assert "fine-tune, seed 0 failed" in output
    assert "the loss is not finite at step" in output
    assert "give the same command again" in output


def test_the_command_of_a_cell_gives_its_configuration(tmp_path: Path) -> None:
    settings = Settings(steps=7, lr=0.005, data="mnist")
    for cell in cells.cells(settings, ["gd", "gd+rank1:gradient", "gd@ema=0.9,lr-later=0.3"], [0, 3], tmp_path):
        parsed = parser.parse(cells.train_command(cell, Path("data"), "cnn", tmp_path)[3:])
        assert isinstance(parsed, Train)
        assert all(getattr(parsed, name) == value for name, value in vars(cell.config).items())


def test_report_reads_a_run_folder(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert cli.main(["report", str(finished), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    summary = json.loads((finished / "summary.json").read_text())
    assert "gd+rank1" in output
    assert f"{summary['average_fid']:,.1f}" in output
    for name in PICTURES:
        assert _is_picture(out / name)
    r = summary["fid_matrix"]
    assert summary["average_fid"] == pytest.approx((r[1][0] + r[1][1]) / 2)
    assert summary["forgetting"] == pytest.approx(r[1][0] - r[0][0])
    assert summary["forgetting_divisor_t"] == pytest.approx((r[1][0] - r[0][0]) / 2)


def test_report_names_unfinished_runs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "a")
    shutil.copytree(finished, tmp_path / "b")
    (tmp_path / "b" / "summary.json").unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert f"{tmp_path / 'b'} is not finished and is left out" in capsys.readouterr().out.replace("\n", " ")
