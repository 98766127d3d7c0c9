"""Comparing runs: end to end, and the statistics and refusals of reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, child_environment
from crl_diffusion import cli, compare, report
from crl_diffusion.method import RunConfig, Settings
from crl_diffusion.report import Finished
from PIL import Image
from scipy import stats

RANK1 = "gd+rank1_lam=7-seed0"
PICTURES = ("samples.png", "fid_matrices.png", "average_fid.png")


def _options(settings: dict[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    return colours is not None and len(colours) > 20


def test_two_methods_end_to_end(
    tmp_path: Path, extractor_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "comparison"
    out.mkdir()
    shutil.copy(extractor_path, out / "extractor.safetensors")
    arguments = ["compare", "--methods", "fine-tune", "gd+rank1", "--jobs", "2", "--lams", "7", *_options(SHORT)]
    arguments += ["--out", str(out)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    words = " ".join(said.split())
    for part in ("average", "forgetting", "conditional", "ms/step", "bytes", "One seed"):
        assert part in words
    for name in PICTURES:
        assert str(out / name) in said
        assert _is_picture(out / name)
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
    before = {
        path: path.stat().st_mtime_ns
        for cell in ("fine-tune-seed0", RANK1)
        for path in (out / cell).rglob("*")
    }
    assert cli.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "already finished" in capsys.readouterr().out

    # Other settings in the same folder: refused before anything starts.
    assert cli.main([*arguments, "--lr", "0.01"]) == 2
    assert "holds another run (lr 0.002 there, 0.01 asked for)" in capsys.readouterr().err


def test_a_failed_run_is_shown_and_the_others_are_kept(
    tmp_path: Path, extractor_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    shutil.copy(extractor_path, tmp_path / "extractor.safetensors")
    settings = {**SHORT, "tasks": 1, "lr": 1e30}
    assert cli.main(["compare", "--methods", "fine-tune", *_options(settings), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "fine-tune, seed 0 failed" in said
    assert "the loss is not finite at step" in said
    assert "give the same command again" in said


def test_the_command_of_a_cell_gives_its_configuration(tmp_path: Path) -> None:
    settings = Settings(steps=7, lr=0.005, data="mnist")
    for cell in compare.cells(settings, ["gd", "gd+rank1:gradient"], [0, 3], tmp_path):
        parsed = cli.parse(compare.command(cell, Path("data"), tmp_path / "e")[3:])
        assert isinstance(parsed, cli.Train)
        assert all(getattr(parsed, name) == value for name, value in vars(cell.config).items())


def test_report_reads_a_run_folder(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    assert cli.main(["report", str(finished), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    summary = json.loads((finished / "summary.json").read_text())
    assert "gd+rank1" in said
    assert f"{summary['average_fid']:,.1f}" in said
    for name in PICTURES:
        assert _is_picture(out / name)
    r = summary["fid_matrix"]
    assert summary["average_fid"] == pytest.approx((r[1][0] + r[1][1]) / 2)
    assert summary["forgetting"] == pytest.approx(r[1][0] - r[0][0])
    assert summary["forgetting_divisor_t"] == pytest.approx((r[1][0] - r[0][0]) / 2)


def test_report_names_what_is_unfinished(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "a")
    shutil.copytree(finished, tmp_path / "b")
    (tmp_path / "b" / "summary.json").unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert f"{tmp_path / 'b'} is not finished and is left out" in capsys.readouterr().out.replace("\n", " ")


@pytest.fixture
def run() -> Callable[..., Finished]:
    def make(method: str, seed: int, average_fid: float = 1.0, **summary: Any) -> Finished:
        config = RunConfig(method=method, seed=seed).as_json()  # type: ignore[arg-type]
        base = {
            "average_fid": average_fid,
            "forgetting": average_fid / 2,
            "accuracy": 0.5,
            "accuracy_task_1": 0.25,
            "penalty_ms": None,
            "step_ms": 10.0,
            "state_bytes": 0,
            "extractor": "e",
            "samples_per_task": 8,
            "sampler": "s",
        }
        return Finished(Path(f"{method}-{seed}"), config, {**base, **summary})

    return make


def test_differences_are_paired_by_seed_with_a_t_interval(run: Callable[..., Finished]) -> None:
    gd = {0: 10.0, 1: 20.0, 2: 30.0, 5: 99.0}
    rank1 = {0: 9.0, 1: 18.5, 2: 29.5, 7: -50.0}
    result = report.paired_difference(rank1, gd)
    assert result is not None
    mean, half, n = result
    differences = [-1.0, -1.5, -0.5]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert n == 3
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert report.paired_difference({0: 1.0}, {0: 2.0}) is None
    assert report.paired_difference({0: 1.0, 1: 2.0}, {2: 1.0, 3: 2.0}) is None

    runs = [run("gd", s, v) for s, v in gd.items()] + [run("gd+rank1", s, v) for s, v in rank1.items()]
    head, body, caption = report.table(runs, "gd", ("gd", "gd+rank1"))
    assert head[:3] == ["method", "seeds", "average FID"]
    assert body[1][-2] == f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    assert body[0][-2:] == ["-", "-"]
    assert "paired by seed" in caption
    spread = math.sqrt(sum((v - 39.75) ** 2 for v in gd.values()) / 3)
    assert body[0][2] == f"39.8 ± {spread:.1f}"


def test_one_seed_says_so_and_claims_no_interval(run: Callable[..., Finished]) -> None:
    head, body, caption = report.table([run("gd", 0), run("joint", 0, forgetting=None)], "gd")
    assert "seeds" not in head
    assert "differences may be chance" in caption
    assert body[1][head.index("forgetting")] == "-"


@pytest.mark.parametrize("key", ["extractor", "samples_per_task", "sampler"])
def test_numbers_that_do_not_compare_are_refused(run: Callable[..., Finished], key: str) -> None:
    with pytest.raises(report.OptionError, match=f"these runs differ in their {key}"):
        report.comparable([run("gd", 0), run("gd+rank1", 0, **{key: "another"})])


def test_two_runs_of_one_method_and_seed_are_refused(run: Callable[..., Finished]) -> None:
    twin = run("gd", 0)._replace(path=Path("elsewhere"))
    with pytest.raises(report.OptionError, match="are both gd with seed 0"):
        report.comparable([run("gd", 0), twin])
