"""Finished runs in one file, a line of JSON each, from which another machine can restore their run folders.

A line holds what a report needs: the run's configuration and origin, its summary, and statistics of its Fisher
matrices. It omits checkpoints, images and losses, and what would identify the machine. `compare` treats a restored
folder as a finished run, and does not run it again.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

from crl_diffusion.files import Log, Row, read_rows, write_json
from crl_diffusion.methods.penalties import STATISTICS
from crl_diffusion.reporting.runs import Finished, find

from ..common.measure import processor

ORIGIN = ("run", "data_name", "extractor", "classifier", "git")  # parts of config.json, with the environment's versions
FISHER = ("kind", "task", *STATISTICS, "state_bytes", "curvatures")
AT_THE_END_OF_A_TASK = ("movement", "held_out_loss", "memory", "adapters")  # kinds of rows
DIGITS = 6  # of their numbers


def as_line(run: Finished, folder: str) -> Row:
    environment = {key: value for key, value in run.record.get("environment", {}).items() if key != "platform"}
    environment.setdefault("processor", processor())
    record = {key: run.record[key] for key in ORIGIN if key in run.record}
    rows = read_rows(run.path / "metrics.jsonl")
    return {
        "folder": folder,
        "date": date.today().isoformat(),
        "record": record | {"environment": environment},
        "summary": run.summary,
        "fisher": [{key: row[key] for key in FISHER if key in row} for row in rows if row["kind"] == "fisher"],
        "stages": [_shortened(row) for row in rows if row["kind"] in AT_THE_END_OF_A_TASK],
    }


def _shortened(value: Any) -> Any:
    """The same JSON value with fewer digits."""
    if isinstance(value, dict):
        return {key: _shortened(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shortened(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def record(ledger: Path, root: Path) -> int:
    """Append the finished runs of `root`/STAGE/RUN that have no line yet; returns how many.

    The program ends if a run and its line differ, because a report may be based on either."""
    ledger.parent.mkdir(parents=True, exist_ok=True)
    rows, log = {row["folder"]: row for row in read_rows(ledger)}, Log(ledger)
    log.keep(len(rows))  # drops a line that a crash has cut short
    for stage in sorted(path for path in root.iterdir() if path.is_dir()):
        for run in find([stage])[0]:
            folder = str(run.path.relative_to(root))
            if folder not in rows:
                log.append(as_line(run, folder))
            elif differing := [key for key, value in rows[folder]["summary"].items() if run.summary.get(key) != value]:
                sys.exit(
                    f"{str(run.path)!r} and its line in {str(ledger)!r} differ in {', '.join(differing)}; remove the "
                    "line if the run was repeated, or the folder to restore it from the line"
                )
    log.sync()
    return log.count - len(rows)


def restore(ledger: Path, root: Path) -> int:
    """Restore the folders of all lines that are not in `root`; returns how many."""
    count = 0
    for row in read_rows(ledger):
        folder = root / row["folder"]
        if (folder / "summary.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[Any] = [*row["fisher"], *row.get("stages", [])]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(part) + "\n" for part in rows), encoding="utf-8")
        write_json(folder / "config.json", row["record"])
        write_json(folder / "summary.json", row["summary"])  # last: it marks the run as finished
        count += 1
    return count
