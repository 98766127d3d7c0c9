"""The processes of a comparison: killed cells, cells that are added later, commands, and what it will take."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from crl_diffusion import signals
from crl_diffusion.cli import parser
from crl_diffusion.comparison import cells, progress, runner
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.errors import OptionError
from crl_diffusion.files import write_json
from crl_diffusion.run_folder.layout import comparing, writing
from crl_diffusion.training.plan import resolve
from filelock import FileLock
from helpers.trainer_runs import SHORT, child_environment, options
from rich.console import Console

FINISHES = "import sys, pathlib; pathlib.Path(sys.argv[1], 'summary.json').write_text('{}')"
DIES = "import os, signal; print('about to die', flush=True); os.kill(os.getpid(), signal.SIGKILL)"


def _run(
    work: list[cells.Cell], monkeypatch: pytest.MonkeyPatch, dying: str = ""
) -> tuple[list[cells.Cell], str, runner.Pool]:
    """Cells as processes that finish at once, or die."""
    pool = runner.Pool(
        2, lambda cell: [sys.executable, "-c", DIES if cell.name == dying else FINISHES, str(cell.folder)]
    )
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    output = io.StringIO()
    failed = runner.run(work, pool, Console(file=output, width=200), quiet=True)
    return failed, output.getvalue(), pool


def test_other_cells_continue_when_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = cells.cells(Settings(), ["gd", "rank1"], [0, 1], tmp_path)
    failed, output, pool = _run(work, monkeypatch, dying="rank1, seed 0")
    assert [cell.name for cell in failed] == ["rank1, seed 0"]
    done = {cell.name for cell in work if cell.finished}
    assert done == {cell.name for cell in work if cell not in failed}
    assert "rank1, seed 0: FAILED" in output
    assert "rank1, seed 1: finished" in output
    assert runner.tail(failed[0], pool).splitlines() == [
        "about to die",
        "(killed by signal 9, as systems do where memory runs out: give fewer --jobs)",
    ]

    again = cells.cells(Settings(), ["gd", "rank1"], [0, 1], tmp_path)  # the same command
    for cell in again:  # which reads the records of each: see test_damaged_folders.py
        cell.finished = cell.name in done
    before = {cell.name: (cell.folder / "summary.json").stat().st_mtime_ns for cell in again if cell.finished}
    failed, output, _ = _run(again, monkeypatch)
    assert failed == []
    assert output.count("already finished") == 3
    assert all(cell.finished for cell in again)
    assert {c.name: (c.folder / "summary.json").stat().st_mtime_ns for c in again if c.name in before} == before


def test_methods_and_seeds_can_be_added_and_other_settings_are_refused(tmp_path: Path) -> None:
    _begin(cells.cells(Settings(), ["gd"], [0], tmp_path))
    cells.check_others(cells.cells(Settings(), ["gd", "rank1:lam=3"], [0, 1], tmp_path), tmp_path)
    changed = cells.cells(Settings(lr=0.01), ["rank1"], [0], tmp_path)
    with pytest.raises(OptionError, match=r"gd-seed0 \(lr 0.002 there, 0.01 asked for\); use another folder"):
        cells.check_others(changed, tmp_path)


def test_a_variant_is_a_run_of_its_method_with_its_own_setting(tmp_path: Path) -> None:
    texts = ["gd", "gd@ema=0.999", "gd@lr-later=0.3,ema=0.999", "gd@lr-later=0.3", "gd@ema=0,lr-later=1", "gd@ema=.999"]
    work = cells.cells(Settings(steps=7), texts, [0, 3], tmp_path)
    assert {(cell.name, cell.config) for cell in work} == {
        (f"{label}, seed {seed}", RunConfig(method="gd", seed=seed, steps=7, **values))
        for seed in (0, 3)
        for label, values in (
            ("gd", {}),
            ("gd@ema=0.999", {"ema": 0.999}),
            ("gd@ema=0.999,lr-later=0.3", {"ema": 0.999, "lr_later": 0.3}),
            ("gd@lr-later=0.3", {"lr_later": 0.3}),
        )
    }
    assert len(work) == 8
    assert {cell.folder.name for cell in work if not cell.config.seed} == {
        *("gd-seed0", "gd@ema=0.999-seed0", "gd@ema=0.999_lr-later=0.3-seed0", "gd@lr-later=0.3-seed0")
    }
    # A setting of the command holds for methods without their own.
    work = cells.cells(Settings(ema=0.9), ["gd", "gd@ema=0", "gd@lr-later=0.3"], [0], tmp_path)
    assert {cell.config.label for cell in work} == {"gd@ema=0.9", "gd", "gd@ema=0.9,lr-later=0.3"}


def test_names_of_folders_are_allowed_everywhere_and_differ(tmp_path: Path) -> None:
    texts = ["gd+bands8:top,lam=60@ema=0.9,lr-later=0.3", "gd+bands8:top,lam=60@ema=0.9", "gd+bands8:top,lam=60"]
    texts += ["gd+bands8:top@ema=0.9", "gd+bands8:top@ema=0.90000001", "gd+bands8:top@lr-later=0.9"]
    names = [cell.folder.name for cell in cells.cells(Settings(), texts, [0], tmp_path)]
    assert len(set(map(str.lower, names))) == len(texts)
    assert all(re.fullmatch(r"[a-z0-9+_=@.-]+", name) for name in names)


def test_each_lam_is_run_in_each_variant(tmp_path: Path) -> None:
    work = cells.cells(Settings(), ["gd@ema=0.9", "gd+rank1", "gd+rank1@ema=0.9"], [0], tmp_path, [1, 20])
    labels = {"gd@ema=0.9", "gd+rank1:lam=1", "gd+rank1", "gd+rank1:lam=1@ema=0.9", "gd+rank1@ema=0.9"}
    assert {cell.config.label for cell in work} == labels


def _begin(work: list[cells.Cell]) -> None:
    for cell in work:
        cell.folder.mkdir()
        write_json(cell.folder / "config.json", {"run": cell.config.as_json()})


def test_variants_can_be_added_to_a_folder(tmp_path: Path) -> None:
    _begin(cells.cells(Settings(), ["gd", "gd@ema=0.9"], [0], tmp_path))
    cells.check_others(cells.cells(Settings(), ["gd+rank1@lr-later=0.3"], [0], tmp_path), tmp_path)
    with pytest.raises(OptionError, match=r"\(lr 0.002 there, 0.01 asked for\)"):
        cells.check_others(cells.cells(Settings(lr=0.01), ["gd@ema=0.99"], [0], tmp_path), tmp_path)


def test_a_run_that_is_in_the_folder_under_another_name_is_not_made_twice(tmp_path: Path) -> None:
    (cell,) = cells.cells(Settings(ema=0.9), ["gd"], [0], tmp_path)
    cell.folder = tmp_path / "gd-seed0"
    _begin([cell])
    again = cells.cells(Settings(), ["fine-tune", "gd@ema=0.9"], [0], tmp_path)
    with pytest.raises(OptionError, match=r"gd@ema=0.9, seed 0 in gd-seed0; rename .* to gd@ema=0.9-seed0"):
        cells.check_others(again, tmp_path)
    cells.check_others(cells.cells(Settings(), ["gd@ema=0.9"], [1], tmp_path), tmp_path)


def test_there_is_a_cell_for_each_method_seed_and_lam(tmp_path: Path) -> None:
    work = cells.cells(Settings(), ["gd", "rank1:gradient"], [0, 3], tmp_path, [1, 20])
    names = {f"{m}, seed {s}" for m in ("gd", "rank1:gradient,lam=1", "rank1:gradient") for s in (0, 3)}
    assert {cell.name for cell in work} == names  # 20 is its own
    assert len({cell.folder for cell in work}) == len(names)


def test_lams_are_not_rounded() -> None:
    names = cells.with_lams(["rank1"], [1234567.0, 1234568.0, 0.12345678])
    assert names == ["rank1:lam=1234567.0", "rank1:lam=1234568.0", "rank1:lam=0.12345678"]
    assert cells.with_lams(["rank1"], [3e4, 1e-5]) == ["rank1:lam=30000", "rank1:lam=1e-05"]


def test_options_give_the_configuration_back() -> None:
    config = RunConfig(method="gd+bands12:lam=0.1", seed=2, data="mnist", lr=1e-5, epochs=2, held_out="validation")
    parsed = parser.parse(["train", "--out", "x", *cells.options(config)])
    assert all(getattr(parsed, name) == value for name, value in vars(config).items())
    assert cells.options(RunConfig(method="gd")) == ["--method", "gd", "--seed", "0"]


def test_an_estimate_counts_the_remaining_passes(tmp_path: Path) -> None:
    work = cells.cells(Settings(tasks=2), ["fine-tune", "gd"], [0], tmp_path)
    for cell in work:
        cell.config, cell.stage_steps = resolve(cell.config), [300, 300]
    passes = 600 * 3 * 32 + (2 + 4) * 100 * 10, 300 * 4 * 32 + 2 * 100 * 10  # fine-tune, and what gd adds
    both, longest = 2 * passes[0] + passes[1], sum(passes)
    text = runner.estimate(work, 1, 0.001)
    assert text.startswith(f"estimated {both / 60_000:.0f} minutes: {both:.2g} forward passes of one image in 2 run(s)")
    assert text.endswith(f"the longest run takes {longest / 60_000:.0f} minutes" if longest > 90_000 else "seconds")
    next(cell for cell in work if cell.config.method == "gd").finished = True
    assert "in 1 run(s)" in runner.estimate(work, 1, 0.001)


def test_a_cell_that_another_process_writes_to_waits_and_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = cells.cells(Settings(), ["gd", "rank1"], [0], tmp_path)
    (busy,) = (cell for cell in work if cell.config.method == "gd")
    busy.folder.mkdir()
    lock = ExitStack()
    lock.enter_context(writing(busy.folder))
    shown: list[list[str]] = []
    original = progress._Lines.update

    def update(self: Any, running: list[cells.Cell]) -> None:
        original(self, running)
        shown.append([cell.name for cell in work if cell.finished])
        if len(shown) > 3 and shown[-1] == ["rank1, seed 0"]:
            lock.close()

    monkeypatch.setattr(progress._Lines, "update", update)
    failed, output, _ = _run(work, monkeypatch)
    assert failed == []
    assert all(cell.finished for cell in work)
    line = (
        rf"gd, seed 0: process {os.getpid()} on {socket.gethostname()} since .* writes to its folder; waiting for it\n"
    )
    assert len(re.findall(line, output)) == 1
    assert output.index("rank1, seed 0: finished") < output.index("gd, seed 0: running")


def test_a_process_that_finds_its_folder_taken_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has taken the folder between the look at its lock and the start."""
    (cell,) = cells.cells(Settings(), ["gd"], [0], tmp_path)
    cell.folder.mkdir()
    lock = ExitStack()
    commands = ["import sys; sys.exit(2)", FINISHES]

    def command(cell: cells.Cell) -> list[str]:
        if len(commands) == 2:
            lock.enter_context(writing(cell.folder))
        return [sys.executable, "-c", commands.pop(0), str(cell.folder)]

    def waits(path: Path) -> str:
        lock.close()
        return "somebody"

    monkeypatch.setattr(runner, "holder", waits)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    output = io.StringIO()
    assert runner.run([cell], runner.Pool(1, command), Console(file=output, width=200), quiet=True) == []
    assert cell.finished
    assert "FAILED" not in output.getvalue()


def test_a_run_of_compare_waits_for_a_process_that_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two ends first: it has not failed, and a look at the lock is no failure for anybody."""
    lines: list[str] = []
    other = ExitStack()

    def waits(line: str) -> None:
        lines.append(line)
        other.close()

    other.enter_context(writing(tmp_path))
    monkeypatch.setattr(signals._State, "of_compare", True)
    with writing(tmp_path, waits):
        assert re.fullmatch(rf"'{tmp_path}' is in use by process {os.getpid()} on .*; waiting for it", lines[0])
    monkeypatch.setattr(signals._State, "of_compare", False)
    looks = threading.Event()

    def look() -> None:
        with FileLock(tmp_path / ".lock"):
            looks.set()
            time.sleep(0.01)

    thread = threading.Thread(target=look)
    thread.start()
    assert looks.wait(10)
    with writing(tmp_path):
        pass
    thread.join()


def test_who_may_write_to_a_folder_deletes_what_a_killed_process_has_left(tmp_path: Path) -> None:
    token = "3f2a9c0100ff00ff"
    left = [f"config.json.{token}.tmp", f".lock.json.{token}.tmp", ".tmpcBB2ki"]
    left += [f"{folder}/a.safetensors.{token}.tmp" for folder in ("checkpoints", "samples", "real-statistics")]
    others = ["notes.20261130.tmp", ".tmp-mine", f"gd-seed0/config.json.{token}.tmp"]
    for number, lock in enumerate((writing, lambda out: comparing(out, print))):
        out = tmp_path / str(number)
        for name in (*left, *others):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).touch()
        with writing(out / "gd-seed0") if number else ExitStack():
            pass
        with lock(out):
            found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        kept = others[: 3 - number]  # a run may be writing to its own folder
        assert {name for name in found if ".lock" not in name} == set(kept)


def test_the_second_comparison_in_a_folder_waits_for_the_first(tmp_path: Path, extractor_folder: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(extractor_folder, out)
    words = ["compare", "--methods", "fine-tune", *options({**SHORT, "tasks": 1, "model": "mlp"}), "--out", str(out)]
    env = {**os.environ, **child_environment()}
    with comparing(out, print):
        second = subprocess.Popen(
            [sys.executable, "-m", "crl_diffusion", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        assert second.stderr is not None
        line = second.stderr.readline().decode()
        assert re.fullmatch(rf"crl-diffusion: '{out}' is in use by process {os.getpid()} on .*; waiting for it\n", line)
        assert not (out / "fine-tune-seed0").exists()
    printed, errors = second.communicate()
    assert (second.returncode, errors) == (0, b"")
    assert b"fine-tune, seed 0: finished" in printed


def test_the_lock_of_another_machine_names_it_and_what_to_do(tmp_path: Path) -> None:
    with writing(tmp_path):
        with (
            pytest.raises(OptionError, match=rf"\(process {os.getpid()} on \S+ since [^.]*\)$"),
            writing(tmp_path),
        ):
            pass
        write_json(tmp_path / ".lock.json", {"host": "node7", "process": 12, "since": "noon"})
        expected = re.escape(
            "; wait for it, or use another (process 12 on node7 since noon). If that process has ended, delete "
            f"{str(tmp_path / '.lock')!r}"
        )
        with pytest.raises(OptionError, match=expected), writing(tmp_path):
            pass
        (tmp_path / ".lock.json").write_text("[1")
        with (
            pytest.raises(OptionError, match=r"use another \(another process\)$"),
            writing(tmp_path),
        ):
            pass
    assert not (tmp_path / ".lock.json").exists()
    with writing(tmp_path):
        pass
