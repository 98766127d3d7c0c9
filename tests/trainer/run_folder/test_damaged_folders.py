"""Damage to a run folder: the same command ends with the same bits, or with one line that names the file, and code 2.

Each case damages a copy of one folder, of the finished run or of that run as it was in its second task.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from crl_diffusion import cli
from crl_diffusion.run_folder import checkpoint
from helpers.trainer_runs import (
    NEWEST,
    SHORT,
    TrainCommand,
    contents,
    crl_diffusion,
    few_samples,
    options,
    require_one_line,
    same_folder,
    train_words,
)
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

pytestmark = few_samples
Damage = Callable[[Path], None]

# Kinds of damage to a file


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by(size: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:-size])  # type: ignore[return-value]


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nuls(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def not_utf8(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"', b'"\xff', 3))


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    if path.is_file():
        path.unlink()
    path.mkdir()


def a_file(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("")


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def text(value: Any) -> Damage:
    return lambda path: path.write_text(json.dumps(value))  # type: ignore[return-value]


def changed(**values: Any) -> Damage:
    """Other values of some keys of a JSON object."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")  # type: ignore[return-value]


def without(key: str) -> Damage:
    def damage(path: Path) -> None:
        value = json.loads(path.read_text())
        del value[key]
        path.write_text(json.dumps(value))

    return damage


def rows(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    """Other lines of a log, each with its newline."""
    return lambda path: path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))  # type: ignore[return-value]


def row(number: int, line: bytes) -> Damage:
    return rows(lambda lines: [*lines[:number], line, *lines[number + 1 :]])


def lost(number: int) -> Damage:
    return rows(lambda lines: [line for i, line in enumerate(lines) if i != number % len(lines)])


def value(number: int, **values: Any) -> Damage:
    """Other values in a row, which stays a good one."""
    return rows(
        lambda lines: [
            json.dumps({**json.loads(line), **values}).encode() + b"\n" if i == number % len(lines) else line
            for i, line in enumerate(lines)
        ]
    )


def tensors(**named: np.ndarray) -> Damage:
    return lambda path: save_file(named, path)


def metadata(**values: str) -> Damage:
    """Another header of a checkpoint, around the same tensors."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata()
        save_tensors(content, path, {**header, **{name.replace("__", "/"): value for name, value in values.items()}})

    return damage


def renamed(name: str) -> Damage:
    return lambda path: path.rename(path.with_name(name))  # type: ignore[return-value]


# The table


class Case(NamedTuple):
    """What is damaged and how, of a run in its second task and of the finished run; `says` is what the line says beside
    the file's name, None if the run ends with the same bits."""

    file: str
    damage: Damage
    says: str | None = None
    states: tuple[str, ...] = ("unfinished",)


FINISHED, BOTH = ("finished",), ("unfinished", "finished")
FIRST_ROWS = "is missing, or does not begin with the rows of any checkpoint; put it back"
FOLDER = "is a folder, expected a file; move it away"
CASES: dict[str, Case] = {
    # config.json is in every checkpoint.
    "config truncated": Case("config.json", truncated, None, BOTH),
    "config empty": Case("config.json", empty),
    "config of NULs": Case("config.json", nuls, None, FINISHED),
    "config not UTF-8": Case("config.json", not_utf8),
    "config nested": Case("config.json", nested),
    "config a list": Case("config.json", text([1, 2])),
    "config without a run": Case("config.json", without("run")),
    "config with a run of another shape": Case("config.json", changed(run={"method": ["gd"]}), None, FINISHED),
    "config missing": Case("config.json", missing, None, BOTH),
    "config changed": Case("config.json", changed(command="rm"), "is not what it was", BOTH),
    "config a folder": Case("config.json", a_folder, FOLDER),
    # summary.json follows from the other records.
    "summary truncated": Case("summary.json", truncated, None, FINISHED),
    "summary empty": Case("summary.json", empty, None, FINISHED),
    "summary of NULs": Case("summary.json", nuls, None, FINISHED),
    "summary not UTF-8": Case("summary.json", not_utf8, None, FINISHED),
    "summary a text": Case("summary.json", text("finished"), None, FINISHED),
    "summary without numbers": Case("summary.json", changed(average_fid=None), None, FINISHED),
    "summary with a number changed": Case("summary.json", changed(average_fid=1.5), None, FINISHED),
    "summary with NaN": Case("summary.json", changed(forgetting=float("nan")), None, FINISHED),
    "summary of another run": Case("summary.json", changed(seed=1), None, FINISHED),
    "summary missing": Case("summary.json", missing, None, FINISHED),
    "summary a folder": Case("summary.json", a_folder, FOLDER, FINISHED),
    # metrics.jsonl: rows after a checkpoint are made again from it.
    "metrics with its last row lost": Case("metrics.jsonl", lost(-1), None, BOTH),
    "metrics with a row lost": Case("metrics.jsonl", lost(7)),
    "metrics with a row changed": Case("metrics.jsonl", value(7, loss=0.5), None, BOTH),
    "metrics with a row of NULs": Case("metrics.jsonl", row(7, bytes(80) + b"\n")),
    "metrics with a row not UTF-8": Case("metrics.jsonl", row(7, b'{"kind": "\xff"}\n')),
    "metrics with a row of another shape": Case("metrics.jsonl", row(7, b"[1]\n"), None, FINISHED),
    "metrics with an empty row": Case("metrics.jsonl", row(7, b"\n")),
    "metrics with its last line cut off": Case("metrics.jsonl", cut_by(9)),
    "metrics with a line cut off after it": Case("metrics.jsonl", rows(lambda lines: [*lines, b'{"kind": "st'])),
    "metrics with bad rows after the checkpoint": Case(
        "metrics.jsonl", rows(lambda lines: [*lines, b"\0\0\n", b"{}\n"])
    ),
    "metrics with rows swapped": Case("metrics.jsonl", rows(lambda x: [*x[:7], x[8], x[7], *x[9:]]), None, FINISHED),
    "metrics with its first row lost": Case("metrics.jsonl", lost(0), FIRST_ROWS),
    "metrics with its first row changed": Case("metrics.jsonl", value(0, loss=0.5), FIRST_ROWS),
    "metrics with other line ends": Case(
        "metrics.jsonl", rows(lambda lines: [x[:-1] + b"\r\n" for x in lines]), FIRST_ROWS
    ),
    "metrics empty": Case("metrics.jsonl", empty, FIRST_ROWS),
    "metrics of NULs": Case("metrics.jsonl", nuls, FIRST_ROWS, FINISHED),
    "metrics missing": Case("metrics.jsonl", missing, FIRST_ROWS, BOTH),
    "metrics a folder": Case("metrics.jsonl", a_folder, FOLDER),
    # timings.jsonl: nothing makes wall-clock times again.
    "timings truncated": Case("timings.jsonl", truncated, "does not begin with the"),
    "timings with a row changed": Case("timings.jsonl", value(1, step_ms=1.5), "does not begin with"),
    "timings with a row of another shape": Case("timings.jsonl", value(1, step_ms="x"), "delete it"),
    "timings of NULs": Case("timings.jsonl", nuls, "delete it"),
    "timings with its last line cut off": Case("timings.jsonl", rows(lambda lines: [*lines, b'{"sta'])),
    "timings missing": Case("timings.jsonl", missing, None, BOTH),
    "timings a folder": Case("timings.jsonl", a_folder, FOLDER),
    # Samples are drawn again by the model that drew them.
    "samples truncated": Case("samples/after-task-1.safetensors", truncated),
    "samples empty": Case("samples/after-task-1.safetensors", empty),
    "samples of NULs": Case("samples/after-task-2.safetensors", nuls, None, FINISHED),
    "samples with one bit changed": Case("samples/after-task-1.safetensors", one_bit, None, BOTH),
    "samples of another shape": Case(
        "samples/after-task-1.safetensors", tensors(pixels=np.zeros((2, 2), dtype=np.uint8))
    ),
    "samples missing": Case("samples/after-task-1.safetensors", missing),
    "samples a folder": Case("samples/after-task-1.safetensors", a_folder, FOLDER),
    "samples' folder a file": Case("samples", a_file, "is a file, expected a folder; move it away"),
    # Checkpoints: the one before it.
    "checkpoint truncated": Case(NEWEST, truncated),
    "checkpoint empty": Case(NEWEST, empty),
    "checkpoint of NULs": Case(NEWEST, nuls),
    "checkpoint with one bit changed": Case(NEWEST, one_bit),
    "checkpoint with another number of rows": Case(NEWEST, metadata(rows__metrics="6")),
    "checkpoint with another digest of rows": Case(NEWEST, metadata(**{"sha256__metrics.jsonl": "0"})),
    "checkpoint renamed": Case(NEWEST, renamed("01-00000005.safetensors")),
    "checkpoint missing": Case(NEWEST, missing),
    "checkpoint a folder": Case(NEWEST, a_folder, FOLDER),
    "checkpoints' folder missing": Case("checkpoints", lambda path: shutil.rmtree(path)),
    "checkpoints' folder a file": Case("checkpoints", a_file, "is a file, expected a folder; move it away"),
    # The rest
    "lock a folder": Case(".lock", a_folder, FOLDER),
    "a picture a folder": Case("curves.png", a_folder, FOLDER),
    "tensorboard a file": Case("tensorboard", a_file, "is a file, expected a folder; move it away"),
    "the run a file": Case("", a_file, "is not a folder; give another place"),
}


def test_there_are_thirty_kinds_of_damage_or_more() -> None:
    assert len(CASES) >= 30


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("name", "state"), [(name, state) for name, case in CASES.items() for state in case.states], ids=str
)
def test_a_damaged_run_ends_with_the_same_bits_or_one_line(
    name: str,
    state: str,
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES[name]
    out = copy_of(state)
    case.damage(out / case.file)
    before = contents(out)
    code = train_command()
    output = capsys.readouterr()
    if case.says is None:
        assert (code, output.err) == (0, "")
        same_folder(finished, out)
        assert train_command() == 0
        assert "is finished already" in capsys.readouterr().out
    else:
        assert code == 2
        require_one_line(output.err, str(out / case.file), case.says)
        assert {key: x for key, x in contents(out).items() if key != ".lock"} == {
            key: x for key, x in before.items() if key != ".lock"
        }


# What report and diagnose read


READ: dict[str, tuple[str, Damage, str]] = {
    "config truncated": ("config.json", truncated, "is damaged (no JSON: "),
    "config not UTF-8": ("config.json", not_utf8, "is damaged (no UTF-8 at byte 5)"),
    "config nested": ("config.json", nested, "is damaged (no JSON of this package: nested too deeply)"),
    "config without a run": ("config.json", without("run"), "is damaged (it has no run); put it back from a copy"),
    "config with a run of another shape": ("config.json", changed(run=[]), "its run is [], expected an object"),
    "config missing": ("config.json", missing, "is missing; put it back from a copy, or delete it and give"),
    "config a folder": ("config.json", a_folder, FOLDER),
    "summary empty": ("summary.json", empty, "is damaged (no JSON: "),
    "summary of NULs": ("summary.json", nuls, "is damaged (no JSON: "),
    "summary a list": ("summary.json", text([]), "expected a JSON object"),
    "summary with a text for a number": ("summary.json", changed(accuracy="1"), "expected a finite number); delete it"),
    "summary with infinity": ("summary.json", changed(forgetting=float("inf")), "its forgetting is inf, expected"),
    "summary with a huge number": ("summary.json", changed(forgetting=10**400), "expected a finite number"),
    "summary with a matrix of another shape": ("summary.json", changed(fid_matrix=[[1.0, 2.0]]), "lower triangular"),
    "summary with a number changed": ("summary.json", changed(average_fid=1.5), "does not follow from"),
    "summary of another run": ("summary.json", changed(seed=1), "is of a run with another seed"),
    "metrics missing": ("metrics.jsonl", missing, "is missing; put it back"),
    "metrics empty": ("metrics.jsonl", empty, "lacks rows or has others"),
    "metrics with a row lost": ("metrics.jsonl", lost(2), "lacks rows or has others"),
    "metrics with a row changed": ("metrics.jsonl", value(2, loss=0.5), "lacks rows or has others"),
    "metrics with a row of NULs": ("metrics.jsonl", row(4, bytes(9) + b"\n"), "is damaged in row 5 (no JSON: "),
    "metrics with NaN": ("metrics.jsonl", value(0, loss=float("nan")), "in row 1 (its loss is nan, expected a finite"),
    "metrics of an unknown kind": ("metrics.jsonl", value(1, kind="x"), "in row 2 (its kind is 'x', expected one of"),
    "metrics without an evaluation": ("metrics.jsonl", lost(10), "lacks rows before row 11 (the evaluation of task 2"),
    "movement without a displacement": (
        "metrics.jsonl",
        value(12, displacement=None),
        "row 13 (it has no displacement)",
    ),
    "movement with a text for a drift": (
        "metrics.jsonl",
        value(12, drift=["x"]),
        "its drift is ['x'], expected a list,",
    ),
    "movement without a list of drifts": ("metrics.jsonl", value(12, drift=None), "in row 13 (it has no drift)"),
    "movement with infinity": (
        "metrics.jsonl",
        value(12, precision=float("inf")),
        "its precision is inf, expected a fin",
    ),
    "movement of no task": ("metrics.jsonl", value(12, task=0), "its task is 0, expected the number of a task, from 1"),
    "held-out losses with NaN": (
        "metrics.jsonl",
        value(13, by_band=[float("nan")]),
        "in row 14 (its by_band is [nan], e",
    ),
    "held-out losses without numbers": (
        "metrics.jsonl",
        value(14, by_band=0.5),
        "its by_band is 0.5, expected a list, e",
    ),
    "held-out losses of no task": ("metrics.jsonl", value(14, after_task=None), "in row 15 (it has no after_task)"),
    "timings with a text for a number": ("timings.jsonl", value(1, step_ms="x"), "its step_ms is 'x', expected"),
    "timings truncated": ("timings.jsonl", rows(lambda x: [*x[:3], x[3][:9] + b"\n"]), "in row 4 (no JSON: "),
    "samples truncated": ("samples/after-task-1.safetensors", truncated, "is missing or not what the run has drawn"),
    "samples with one bit changed": ("samples/after-task-2.safetensors", one_bit, "is missing or not what the run"),
    "samples missing": ("samples/after-task-1.safetensors", missing, "is missing or not what the run has drawn"),
}


@pytest.mark.parametrize("name", READ)
def test_report_names_the_damaged_file_and_what_to_do(
    name: str, copy_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage, says = READ[name]
    out = copy_of("finished")
    damage(out / file)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    require_one_line(capsys.readouterr().err, str(out / file), says)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "is damaged (PROBLEM)"),
        (tensors(pixels=np.zeros((4, 1, 8, 8), np.float32), labels=np.zeros(4, np.int64)), "expected pixels uint8 (N,"),
        (
            tensors(pixels=np.zeros((4, 1, 8, 8), np.uint8), labels=np.zeros(3, np.int64)),
            "labels int64 (3,), pixels uint8 (4, 1, 8, 8), expected",
        ),
        (tensors(labels=np.zeros(3, np.int64)), "it holds labels int64 (3,), expected pixels"),
        (a_folder, FOLDER),
    ],
)
def test_report_checks_samples_also_without_checkpoints(
    damage: Damage, says: str, copy_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of("finished")
    shutil.rmtree(out / "checkpoints")
    damage(out / "samples/after-task-2.safetensors")
    assert cli.main(["report", str(out), "--out", str(tmp_path / "report")]) == 2
    require_one_line(capsys.readouterr().err, "after-task-2.safetensors", says.replace("PROBLEM)", ""))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("config.json", empty, "is damaged (no JSON: "),
        ("config.json", nuls, "is damaged (no JSON: "),
        ("config.json", missing, "holds no run"),
        ("config.json", a_folder, FOLDER),
        ("config.json", changed(run={}), "it has no method"),
        ("checkpoints", a_file, "is a file, expected a folder"),
        ("checkpoints", shutil.rmtree, "has no good checkpoint"),
        ("checkpoints/02-00000000.safetensors", a_folder, FOLDER),
    ],
)
def test_diagnose_names_the_damaged_file_and_what_to_do(
    file: str, damage: Damage, says: str, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of("finished")
    damage(out / file)
    assert cli.main(["diagnose", str(out), "--device", "cpu"]) == 2
    require_one_line(capsys.readouterr().err, str(out), says)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schedule", "sinus", "its schedule is 'sinus', expected one of linear, cosine"),
        ("steps", "six", "its steps is 'six', expected an integer"),
        ("clip", -1.0, "--clip is -1.0"),
        ("tasks", None, "its run has no tasks"),
        ("steps", "null", "its run has no steps"),
        ("steps", 7, "has no good checkpoint"),
    ],
)
def test_diagnose_refuses_a_configuration_that_is_not_the_checkpoints(
    key: str, value: object, says: str, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of("finished")
    record = json.loads((out / "config.json").read_text())
    record["run"][key] = None if value == "null" else value
    if value is None:
        del record["run"][key]
    (out / "config.json").write_text(json.dumps(record))
    assert cli.main(["diagnose", str(out), "--device", "cpu"]) == 2
    require_one_line(capsys.readouterr().err, str(out), says)


# What the lines say to do


@pytest.mark.parametrize(
    ("file", "damage", "remedy"),
    [
        ("metrics.jsonl", lost(0), lambda out: shutil.rmtree(out / "checkpoints")),
        ("timings.jsonl", nuls, lambda out: (out / "timings.jsonl").unlink()),
        ("config.json", changed(command="rm"), lambda out: (out / "config.json").unlink()),
        ("checkpoints", a_file, lambda out: (out / "checkpoints").unlink()),
    ],
)
def test_the_remedy_in_the_message_repairs_the_run(
    file: str,
    damage: Damage,
    remedy: Callable[[Path], None],
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
) -> None:
    out = copy_of("unfinished")
    damage(out / file)
    assert train_command() == 2
    remedy(out)
    assert train_command() == 0
    same_folder(finished, out, ("samples.png", "fid_matrix.png", "curves.png"))


def test_a_damaged_finished_run_without_checkpoints_is_not_repeated_without_consent(
    train_command: TrainCommand, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of("finished")
    shutil.rmtree(out / "checkpoints")
    assert train_command() == 0
    lost(3)(out / "metrics.jsonl")
    before = (out / "metrics.jsonl").read_bytes()
    assert train_command() == 2
    require_one_line(capsys.readouterr().err, str(out), "without a good checkpoint", "delete summary.json")
    assert (out / "metrics.jsonl").read_bytes() == before


def of_an_earlier_version(path: Path) -> None:
    """A checkpoint as it was written before it knew the run's records."""
    with safe_open(path, framework="pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {k: v for k, v in file.metadata().items() if not k.startswith("sha256/") and k != "config"}
    header["digest"] = checkpoint._digests(content, {})[1]
    if "start" in header:
        header["start"] = checkpoint._metadata(path.with_name("01-00000000.safetensors"))["digest"]
    save_tensors(content, path, header)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        (".lock", missing, None),
        ("samples/after-task-1.safetensors", truncated, None),
        ("metrics.jsonl", lost(-1), None),
        ("metrics.jsonl", row(7, bytes(9) + b"\n"), None),
        ("metrics.jsonl", missing, FIRST_ROWS),
        ("config.json", truncated, "is damaged (no JSON"),
    ],
)
def test_checkpoints_of_an_earlier_version_resume_and_detect_damage_to_rows(
    file: str,
    damage: Damage,
    says: str | None,
    finished: Path,
    train_command: TrainCommand,
    copy_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = copy_of("unfinished")
    for path in sorted((out / "checkpoints").iterdir()):
        of_an_earlier_version(path)
    damage(out / file)
    code = train_command()
    if says is None:
        assert code == 0
        same_folder(finished, out)
    else:
        assert code == 2
        require_one_line(capsys.readouterr().err, str(out / file), says)


def test_samples_that_no_checkpoint_can_draw_again_are_reported(
    train_command: TrainCommand, copy_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of("finished")
    truncated(out / "samples/after-task-1.safetensors")
    truncated(out / "checkpoints/01-00000000.safetensors")
    assert train_command() == 0
    assert "no checkpoint has the model that drew its images" in capsys.readouterr().out.replace("\n", " ")
    assert not (out / "samples/after-task-1.safetensors").exists()
    assert train_command() == 0
    assert "is finished already" in capsys.readouterr().out
    assert cli.main(["report", str(out), "--out", str(out.parent / "report")]) == 0


@pytest.mark.parametrize("name", ["train", "compare", "report", "diagnose"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_place_that_is_no_folder_is_an_error(
    name: str, inside: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "run" if inside else tmp_path / "file"
    words = {"train": ["--method", "gd"], "compare": ["--methods", "gd"]}.get(name, [str(finished)])
    assert cli.main([name, *words, "--out", str(out)]) == 2
    require_one_line(capsys.readouterr().err, "--out is", str(tmp_path / "file"), "is not a folder; give another place")
    assert (tmp_path / "file").read_text() == "kept"


def test_compare_refuses_damaged_records_before_it_trains(
    finished: Path, extractor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--methods", "gd", *options(SHORT), "--out", str(tmp_path)]
    for file, damage, says in [
        ("metrics.jsonl", lost(3), "lacks rows or has others"),
        ("summary.json", nuls, "is damaged (no JSON"),
        ("config.json", truncated, "is damaged (no JSON"),
    ]:
        shutil.rmtree(tmp_path / "gd+rank1-seed0", ignore_errors=True)
        shutil.copytree(finished, tmp_path / "gd+rank1-seed0")
        damage(tmp_path / "gd+rank1-seed0" / file)
        assert cli.main([*words, "--extractor-folder", str(extractor_folder)]) == 2
        require_one_line(capsys.readouterr().err, str(tmp_path / "gd+rank1-seed0" / file), says)
    assert not (tmp_path / "gd-seed0").exists()


def test_a_process_prints_the_same_message(finished: Path, extractor_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    lost(0)(tmp_path / "run" / "metrics.jsonl")
    done = crl_diffusion(*train_words(tmp_path / "run", extractor_folder))
    assert done.returncode == 2, done.stderr
    require_one_line(done.stderr, str(tmp_path / "run" / "metrics.jsonl"), "put it back from a copy, or delete")
