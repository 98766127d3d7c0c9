"""The command line: help, and a clear message with exit code 2 for options that cannot be used."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crl_diffusion import cli
from crl_diffusion.cli import commands, options, parser
from crl_diffusion.config.method import METHODS
from crl_diffusion.errors import OptionError
from helpers.run_folders import fabricate
from helpers.trainer_runs import crl_diffusion, require_one_line

import crl_kernels

ROOT = Path(__file__).parents[3]
# The extra `trainer`, by the names that Python imports.
IMPORTED_AS = {"scikit-learn": "sklearn"}
EXTRA = [
    IMPORTED_AS.get(name, name)
    for name in re.findall(
        r'^    "([\w-]+)',
        re.search(r"^trainer = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1],
        re.M,
    )
]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tran"], ["tran"]),
        (["train", "--method", "gd"], ["Missing", "--out"]),
        (["train", "--method", "gd", "--out", "x", "--stpes", "3"], ["Perhaps you meant", "--steps"]),
        (["train", "--method", "gd", "--out", "x", "--steps", "many"], ["--steps", "'many'"]),
        (["train", "--method", "gd", "--out", "x", "--lam", "3"], ["Unrecognized", "--lam"]),
        (["train", "--method", "gd", "--out", "x", "--model", "unet"], ["--model", "'unet'", "mlp"]),
        (["train", "--method", "gd", "--out", "x", "--optimizer", "adamw"], ["--optimizer", "'adamw'", "sgd"]),
        (["compare", "--out", "x", "--pool-latents", "same"], ["--pool-latents", "'same'", "shared"]),
        (["report", "--preset", "demo", "x"], ["Unrecognized", "--preset"]),
    ],
)
def test_options_that_tyro_cannot_read_end_with_its_message_and_exit_code_2(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in parts:
        assert part in printed.err


def test_no_word_at_all_prints_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for command in ("train", "compare", "report", "diagnose", "sample", "export", "list"):
        assert f" {command} " in printed.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--method", "gd+rank0", "--out", "x"], ["method 'gd+rank0'", "rank1"]),
        (["train", "--method", "gd", "--out", "x", "--steps", "0"], ["--steps is 0", "at least 1"]),
        (["train", "--method", "gd:lam=3", "--out", "x"], ["method 'gd:lam=3'", "gd has no penalty", "rank1"]),
        (
            ["train", "--method", "gd", "--out", "x", "--lr-later", "0"],
            ["--lr-later is 0.0", "a finite number above 0"],
        ),
        (
            ["compare", "--out", "x", "--methods", "gd", "rank1:preconditioned", "--optimizer", "sgd"],
            ["--optimizer is sgd", "rank1:preconditioned", "Adam's second moments", "use --optimizer adam"],
        ),
        (["train", "--method", "gd", "--out", "x", "--preset", "papers"], ["--preset is 'papers'", "paper-cifar10"]),
        (["train", "--method", "gd", "--out", "x", "--preset=demo", "--preset"], ["--preset is ''"]),
        (["train", "--method", "gd", "--out", "x", "--image-size", "9"], ["--image-size is 9", "8 pixels"]),
        (["train", "--method", "gd", "--out", "x", "--data", "mnist", "--data-root", "none"], ["none/MNIST/raw"]),
        (["compare", "--out", "x", "--methods", "gd", "gd"], ["--methods is 'gd gd'", "none twice"]),
        (["compare", "--out", "x", "--seeds", "0", "-1"], ["--seed is -1"]),
        (["compare", "--out", "x", "--jobs", "-1"], ["--jobs is -1"]),
        (["compare", "--out", "x", "--baseline", "gdd"], ["method 'gdd'"]),
        (["compare", "--out", "x", "--methods", "gd", "gd+rank501"], ["gd+rank501 it must be at least 1002"]),
        (
            ["compare", "--out", "x", "--methods", "gd", "rank50", "--fisher-samples", "0", "--per-class", "9"],
            ["task 1 has 18 train images", "for rank50 needs 100"],
        ),
        (
            ["train", "--method", "rank10", "--out", "x", "--fisher-samples", "0", "--per-class", "9"],
            ["task 1 has 18 train images", "for rank10 needs 20"],
        ),
        (["compare", "--out", "x", "--methods", "gd", "rank1:gradient", "--lams", "inf"], ["needs a finite lam"]),
        (["compare", "--out", "x", "--methods", "gd", "gd@lr=1"], ["method 'gd@lr=1'", "gd@ema=0.999"]),
        (["compare", "--out", "x", "--methods", "gd", "gd@ema=1.5"], ["--ema is 1.5", "less than 1"]),
        (["compare", "--out", "x", "--methods", "gd", "gd@lr-later=nan"], ["--lr-later is nan", "above 0"]),
        (["compare", "--out", "x", "--baseline", "gd@ema=x"], ["method 'gd@ema=x'", "must be a number"]),
        (
            ["train", "--out", "x", "--method", "gd+rank1:lam=3@lr-later=0.3,ema=0.999"],
            ["'gd+rank1:lam=3@lr-later=0.3,ema=0.999'", "--method gd+rank1:lam=3 --lr-later 0.3 --ema 0.999\n"],
        ),
        (["train", "--out", "x", "--method", "gd@ema=x"], ["method 'gd@ema=x'", "must be a number"]),
        (["report", "nowhere"], ["'nowhere' is not a folder"]),
        (["report"], ["no folder"]),
        (
            ["train", "--method", "GD", "--out", "x"],
            ["method 'GD' is not known; choose fine-tune, joint, adapters<r>, replay, gd"],
        ),
        (["train", "--method", "gd+rank1:", "--out", "x"], ["'' is not an option of its penalty; choose among"]),
        (["train", "--method", "gd", "--out", ""], ["--out is ''; give a value", "a variable of the shell"]),
        (["train", "--method", "gd", "--out="], ["--out is ''; give a value"]),
        (["train", "--method", "gd", "--out", "x", "--extractor-folder", ""], ["--extractor-folder is ''"]),
        (["report", "x", ""], ["an argument is ''"]),
        (["train", "--method", "gd", "--out", "x", "--seed", str(2**63)], [f"--seed is {2**63}", f"and {2**63 - 1}"]),
        (["train", "--method", "gd", "--out", "x", "--steps", str(10**30)], [f"--steps is {10**30}", "between 1 and"]),
        (["train", "--method", "gd", "--out", "x", "--lr", "1e400"], ["--lr is inf", "a finite number above 0"]),
        (["train", "--method", "gd", "--out", "x", "--lr", "1e-400"], ["--lr is 0.0", "a finite number above 0"]),
        (["train", "--method", "gd", "--out", "x", "--ema", "nan"], ["--ema is nan", "less than 1"]),
        (["train", "--method", "gd", "--out", "x", "--preset", "Demo"], ["--preset is 'Demo'; choose one of demo"]),
        (["compare", "--out", "x", "--methods", "gd,rank1"], ["method 'gd,rank1' is not known"]),
        (
            ["compare", "--out", "x", "--methods", "gd", "--seeds", "0", "--methods", "rank1"],
            ["--methods is given twice; give it once, with all values after it"],
        ),
        (["compare", "--out", "x", "--methods", "--seeds", "0"], ["--methods is given without a value"]),
        (["diagnose", "x", "--timesteps"], ["--timesteps is given without a value"]),
        (["sample", "x", "--classes", "--out", "x"], ["--classes is given without a value"]),
        (["compare", "--out", "x", "--methods", "gd", "--lams", "3"], ["--lams is '3.0'", "has a penalty", "gd+rank1"]),
        (["compare", "--out", "x", "--lams", "3", "3"], ["--lams is '3.0 3.0'", "none twice"]),
        (["compare", "--out", "x", "--lams", "nan"], ["lam must be a number, 0 or more"]),
        (
            ["train", "--method", "gd", "--out", "x", "--extractor", "inception"],
            ["--extractor-folder 'x' holds no file"],
        ),
        (["compare", "--out", "x", "--extractor", "inception"], ["--extractor-folder 'x' holds no file"]),
        (["compare", "--out", "x", "--launcher", "slurm", "--slurm", "time"], ["--slurm has 'time'; write KEY=VALUE"]),
        (["sample", "x", "--out", "y"], ["'x' holds no run; give a folder written by `train`"]),
    ],
)
def test_an_impossible_option_is_one_line_and_exit_code_2(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    require_one_line(output.err, *parts)
    assert not any(sign in output.err for sign in "│╭╰\x1b")
    assert not list(tmp_path.iterdir())  # and nothing was begun


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "--method", "gd", "--out", "file"], ["--out is 'file', but 'file' is not a folder"]),
        (["train", "--method", "gd", "--out", "file/x"], ["--out is 'file/x'", "file' is not a folder"]),
        (["train", "--method", "gd", "--out", "x", "--extractor-folder", "file"], ["--extractor-folder is 'file'"]),
        (
            ["train", "--method", "gd", "--out", "x", "--data", "folder", "--data-root", "file"],
            ["there is no folder 'file'"],
        ),
        (["train", "--method", "gd", "--out", "compared"], ["which holds other runs, such as gd-seed0", "run's own"]),
        (["train", "--method", "gd", "--out", "compared/gd-seed0/x"], ["'gd-seed0' is the folder of a run"]),
        (["train", "--method", "rank1", "--out", "compared/gd-seed0"], ["method 'gd' there, 'rank1' asked for);"]),
        (["compare", "--out", "file"], ["--out is 'file', but 'file' is not a folder"]),
        (["compare", "--out", "compared/gd-seed0"], ["--out is", "'gd-seed0' is the folder of a run"]),
        (["compare", "--out", "x", "--extractor-folder", "file"], ["--extractor-folder is 'file'"]),
        (["report", "file"], ["'file' is not a folder; give one that `train` or `compare` has written"]),
        (["report", "compared/gd-seed0/config.json"], ["is not a folder"]),
        (["report", "compared", "--out", "file"], ["--out is 'file', but 'file' is not a folder"]),
        (["report", "compared", "--baseline", "masip"], ["--baseline is 'masip', but the runs are of gd; give one"]),
        (["report", "empty"], ["no finished run in 'empty'"]),
        (["diagnose", "file"], ["'file' holds no run"]),
        (["sample", "compared", "--out", "x"], ["'compared' is no run but holds gd-seed0"]),
        (["sample", "later", "--out", "x"], ["of another version of this package (its run has shiny", "began the run"]),
        (["export", "unreadable", "--out", "x"], ["unreadable/config.json' is damaged (no JSON"]),
    ],
)
def test_a_wrong_place_is_one_line_and_nothing_is_written(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fabricate(Path("compared/gd-seed0"), "gd", 0)
    record = json.loads(Path("compared/gd-seed0/config.json").read_text())
    for name, text in (("later", json.dumps({"run": {**record["run"], "shiny": 3}})), ("unreadable", "{oops")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    Path("empty").mkdir()
    Path("file").write_text("mine")

    def tree() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = tree()
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    require_one_line(output.err, *parts)
    assert tree() == before


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parser.parse(["train", "--method", "gd", "--out=~/runs/x", "--data-root=~/data"])
    assert isinstance(parsed, options.Train)
    assert (parsed.out, parsed.data_root, parsed.extractor_folder) == (tmp_path / "runs/x", tmp_path / "data", None)
    parsed = parser.parse(["report", "~/a", "b"])
    assert isinstance(parsed, options.Report)
    assert parsed.folders == (tmp_path / "a", Path("b"))


def test_a_process_says_the_same(tmp_path: Path) -> None:
    result = crl_diffusion("train", "--method", "gd", "--out", tmp_path / "x", "--clip", "-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "crl-diffusion: error: --clip is -1.0; it must be a finite number, 0 or more\n"


@pytest.mark.parametrize("name", ["train", "compare", "report", "diagnose", "sample", "export", "list"])
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    commands = {"train": options.Train, "compare": options.Compare, "report": options.Report}
    commands |= {"diagnose": options.Diagnose, "sample": options.Sample, "export": options.Export}
    commands["list"] = options.List
    for field in dataclasses.fields(commands[name]):
        option = f"--{field.name.replace('_', '-')} " if field.name not in ("folders", "run") else "PATH"
        assert option in text
        after = text.split(option, 1)[1]
        assert len(after.split("(default", 1)[0].split("(required", 1)[0].split()) > 4, f"{option} is not explained"


def test_every_method_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for name in METHODS:
        parsed = parser.parse(["train", "--method", name, "--out", "x"])
        assert isinstance(parsed, options.Train)
        assert parsed.method == name


def test_a_folder_of_another_run_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--method", "gd", "--out", str(finished)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "method 'gd+rank1' there, 'gd' asked for" in line


def test_without_arguments_the_help_goes_to_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(f"{name} " in printed.err for name in ("train", "compare", "report", "diagnose", "list"))


def test_the_version_is_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"crl-diffusion {crl_kernels.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["list"], ["list", "--markdown"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_read_enough_ends_a_command_quietly(arguments: list[str]) -> None:
    words = [sys.executable, "-m", "crl_diffusion", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (1, cli.CLOSED_PIPE)  # 1: rich ends the process itself


@pytest.mark.parametrize("closed", [(0, 1, 2), (1,), (2,)])
def test_a_closed_output_ends_no_command(closed: tuple[int, ...], tmp_path: Path) -> None:
    """The next file that is opened would take its number, and get what is printed."""
    words = [sys.executable, "-c", CLOSED, str(tmp_path / "file"), ",".join(map(str, closed))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_bytes() == b""


CLOSED = """
import os, sys
path, closed = sys.argv[1:]
for descriptor in map(int, closed.split(",")):
    os.close(descriptor)
    if descriptor:
        setattr(sys, ("", "stdout", "stderr")[descriptor], None)  # as Python does when it starts
from crl_diffusion import cli

def run(words):
    with open(path, "wb"):
        os.write(1, b"of a library\\n")
        os.write(2, b"") if 2 not in map(int, closed.split(",")) else os.write(2, b"of a library")
        print("line")
    return 0

cli.run = run
sys.exit(cli.main([]))
"""


def test_an_output_that_is_full_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OptionError, match=r"^standard output cannot be written to \(No space left on device\)"):
        commands.Output(file=Full()).print("line")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_an_output_takes_every_name_of_a_file(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding, errors="strict"))
    cli.encode_what_can_be()
    print("\udcff 犬 ±", flush=True)
    assert content.getvalue().decode(encoding) == {"utf-8": "? 犬 ±", "ascii": "? ? +-"}.get(encoding, "? ? ±") + "\n"


@pytest.mark.parametrize("command", ["report", "diagnose", "sample", "export"])
def test_a_folder_whose_name_is_not_in_utf_8_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors and TensorBoard cannot open files in it."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    fabricate(tmp_path / "run", "gd", 0, tasks=2)
    words = [command, str(tmp_path / "run"), "--out", out] if command == "report" else [command, out, "--out", "x"]
    assert cli.main(words) == 2
    require_one_line(capsys.readouterr().err, "is not in UTF-8")


def missing_line(name: str) -> str:
    return f'crl-diffusion: error: the Python package {name!r} is missing; type: pip install "crl-kernels[trainer]"\n'


@pytest.mark.parametrize("name", EXTRA)
def test_a_package_of_the_extra_that_is_missing_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr("crl_diffusion.cli.commands.list_choices", lambda command: importlib.import_module(name))
    assert cli.main(["list"]) == 2
    assert capsys.readouterr() == ("", missing_line(name))


WITHOUT = """
import sys
name, arguments = sys.argv[1], sys.argv[2:]
sys.modules[name] = None
from crl_diffusion.__main__ import main
sys.exit(main(arguments))
"""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tyro", ["--help"]),  # before the options are read
        ("rich", ["--help"]),
        ("filelock", ["report", "nowhere"]),  # after
        ("sklearn", ["compare", "--model", "mlp", "--out"]),  # when data are loaded
    ],
)
def test_a_missing_package_is_one_line_whenever_it_is_imported(name: str, arguments: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", WITHOUT, name, *arguments]
    words += [str(tmp_path / "out")] if arguments[-1] == "--out" else []
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", missing_line(name))


def test_a_missing_module_of_this_project_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "crl_diffusion.cli.parser", None)
    with pytest.raises(ModuleNotFoundError, match="crl_diffusion"):
        cli.main(["list"])
