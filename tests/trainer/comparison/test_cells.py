"""The processes of a comparison: killed cells, cells that are added later, commands, and what it will take."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from crl_diffusion.cli import parser
from crl_diffusion.comparison import cells, runner
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.errors import OptionError
from crl_diffusion.files import write_json
from crl_diffusion.training.plan import resolve
from rich.console import Console

FINISHES = "import sys, pathlib; pathlib.Path(sys.argv[1], 'summary.json').write_text('{}')"
DIES = "import os, signal; print('about to die', flush=True); os.kill(os.getpid(), signal.SIGKILL)"


def _run(work: list[cells.Cell], monkeypatch: pytest.MonkeyPatch, dying: str = "") -> tuple[list[cells.Cell], str]:
    """Cells as processes that finish at once, or die."""

    def train_command(cell: cells.Cell, *places: Any) -> list[str]:
        return [sys.executable, "-c", DIES if cell.name == dying else FINISHES, str(cell.folder)]

    monkeypatch.setattr(runner, "train_command", train_command)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    output = io.StringIO()
    failed = runner.run(work, 2, Path("data"), "cnn", Path("e"), Console(file=output, width=200), quiet=True)
    return failed, output.getvalue()


def test_other_cells_continue_when_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = cells.cells(Settings(), ["gd", "rank1"], [0, 1], tmp_path)
    failed, output = _run(work, monkeypatch, dying="rank1, seed 0")
    assert [cell.name for cell in failed] == ["rank1, seed 0"]
    done = {cell.name for cell in work if cell.finished}
    assert done == {cell.name for cell in work if cell not in failed}
    assert "rank1, seed 0: FAILED" in output
    assert "rank1, seed 1: finished" in output
    assert runner.tail(failed[0]).splitlines() == ["about to die", "(killed by signal 9)"]

    again = cells.cells(Settings(), ["gd", "rank1"], [0, 1], tmp_path)  # the same command
    for cell in again:  # which reads the records of each: see test_damaged_folders.py
        cell.finished = cell.name in done
    before = {cell.name: (cell.folder / "summary.json").stat().st_mtime_ns for cell in again if cell.finished}
    failed, output = _run(again, monkeypatch)
    assert failed == []
    assert output.count("already finished") == 3
    assert all(cell.finished for cell in again)
    assert {c.name: (c.folder / "summary.json").stat().st_mtime_ns for c in again if c.name in before} == before


def test_methods_and_seeds_can_be_added_and_other_settings_are_refused(tmp_path: Path) -> None:
    for cell in cells.cells(Settings(), ["gd"], [0], tmp_path):
        cell.folder.mkdir()
        write_json(cell.folder / "config.json", {"run": cell.config.as_json()})
    cells.check_others(cells.cells(Settings(), ["gd", "rank1:lam=3"], [0, 1], tmp_path), tmp_path)
    changed = cells.cells(Settings(lr=0.01), ["rank1"], [0], tmp_path)
    with pytest.raises(OptionError, match=r"gd-seed0 \(lr 0.002 there, 0.01 asked for\); use another folder"):
        cells.check_others(changed, tmp_path)


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
