"""`crl-diffusion sample` and `export` as a user gives them: what is printed, what is refused, and names of classes from
a folder of images to its pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from crl_diffusion import cli
from helpers.image_folders import write_tree
from helpers.trainer_runs import SHORT, crl_diffusion, options, require_one_line


def test_images_are_drawn_and_the_run_is_not_changed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    words = ["sample", str(finished), "--out", str(tmp_path / "out"), "--count", "2", "--device", "cpu"]
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    assert "gd+rank1 on digits, seed 0, after task 2: 8 images, 2 of each class, seed 0, 2 DDIM steps" in output
    assert "not finished" not in output
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(files) == 2 * 4 + 2
    assert cli.main(words) == 0  # the same command again
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert cli.main([*words, "--seed", "1"]) == 2
    require_one_line(capsys.readouterr().err, "holds results with another seed", "give a new or an empty folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--count", "0"], ["--count is 0", "at least 1"]),
        (["--seed", "-1"], ["--seed is -1", "at least 0"]),
        (["--steps", "0"], ["--steps is 0", "between 1 and 1000"]),
        (["--steps", "1001"], ["--steps is 1001", "between 1 and 1000"]),
        (["--classes", "4"], ["--classes has '4'", "not been learnt after task 2", "choose among 0, 1, 2 and 3"]),
        (["--task", "1", "--classes", "0", "2"], ["--classes has '2'", "not been learnt after task 1"]),
        (["--task", "0"], ["--task is 0", "ends its tasks with 1, 2"]),
    ],
)
def test_an_impossible_option_is_one_line_and_nothing_is_written(
    words: list[str], parts: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", str(finished), "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    require_one_line(output.err, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sample", "export", "diagnose"])
def test_a_folder_of_runs_is_refused_and_its_runs_are_named(
    command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gd-seed0", "gd-seed1"):
        (tmp_path / "compared" / name).mkdir(parents=True)
        shutil.copy(finished / "config.json", tmp_path / "compared" / name)
    out = ["--out", str(tmp_path / "out")]
    assert cli.main([command, str(tmp_path / "compared"), *out]) == 2
    require_one_line(capsys.readouterr().err, "holds gd-seed0, gd-seed1; give one of them", "compared/gd-seed0'")
    assert cli.main([command, str(tmp_path / "nowhere"), *out]) == 2
    require_one_line(capsys.readouterr().err, "nowhere' holds no run; give a folder written by `train`")
    assert cli.main([command, str(tmp_path / "compared" / "gd-seed0"), *out]) == 2
    require_one_line(capsys.readouterr().err, "has no good checkpoint")
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_is_drawn_from_and_said_to_be_unfinished(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "02-00000000.safetensors").unlink()
    assert cli.main(["sample", str(run), "--out", str(tmp_path / "out"), "--count", "1", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert f"{run} is not finished" in output
    assert "after step 6 of task 2: 4 images, 1 of each class" in output


@pytest.mark.filterwarnings("error:.*missing from font")
def test_names_of_folders_go_from_the_data_to_records_pictures_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("$x^$ <b>", "café au lait", "naïve bird", "日本")  # in the order of their labels
    write_tree(tmp_path / "images", names, n=6, side=(8, 8))
    run, out, exported = (tmp_path / name for name in ("run", "out", "exported"))
    settings = {**SHORT, "data": "folder", "data_root": tmp_path / "images", "image_size": 8, "classes_per_task": 2}
    settings |= {"model": "mini", "steps": 2}
    assert cli.main(["train", "--method", "fine-tune", "--out", str(run), *options(settings)]) == 0
    assert json.loads((run / "config.json").read_text())["class_names"] == list(names)
    assert (run / "samples.png").exists()

    asked = ["--classes", "日本", names[0], "--count", "1", "--device", "cpu"]
    assert cli.main(["sample", str(run), "--out", str(out), *asked]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("0-x-b-seed0-0000.png", "class-3-seed0-0000.png", "sheet.png", "samples.json")
    }
    assert cli.main(["export", str(run), "--out", str(exported)]) == 0
    assert json.loads((exported / "model_card.json").read_text())["class_names"] == list(names)
    readme = (exported / "README.md").read_text(encoding="utf-8")
    assert "    3  task 2  日本" in readme
    assert cli.main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Task 1: $x^$ &lt;b&gt;, café au lait; task 2: naïve bird, 日本." in page
    assert "<b>" not in page
    assert "Task 1: $x^$ &lt;b>, café au lait" in (tmp_path / "report" / "comparison.md").read_text(encoding="utf-8")


def test_a_process_says_the_same(finished: Path, tmp_path: Path) -> None:
    result = crl_diffusion("sample", finished, "--out", tmp_path / "out", "--count", 1, "--classes", "7")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "crl-diffusion: error: --classes has '7', but class 7 has not been learnt after task 2; choose among 0, 1, 2 "
        "and 3\n"
    )
