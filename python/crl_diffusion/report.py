"""Reports: tables and pictures, from run folders only. Nothing here trains, samples or measures.

The replicate is the seed: one run gives one number of each kind. Several seeds are shown as mean and standard deviation
and, against a baseline, as the mean of the differences paired by seed with a 95 % Student t interval.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from crl_diffusion import metrics
from crl_diffusion.method import OptionError
from crl_diffusion.records import Row, read_json, read_rows, write_json


class Finished(NamedTuple):
    """One finished run."""

    path: Path
    config: dict[str, Any]
    summary: Row

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])


# Reading


def fid_matrix(rows: Sequence[Row], key: str = "fid") -> list[list[float]]:
    """R (or, with key="accuracy", the same for accuracies) from a run's rows; see metrics.Matrix."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    tasks = max(row["after_task"] for row in evaluations)
    matrix: list[list[float]] = [[] for _ in range(tasks)]
    for row in evaluations:
        matrix[row["after_task"] - 1].append(row[key])
    return matrix


def summarise(run: Path) -> Row:
    """A run's headline numbers, from its config.json, metrics.jsonl and timings.jsonl."""
    config, rows, timings = (
        read_json(run / "config.json")["run"],
        read_rows(run / "metrics.jsonl"),
        read_rows(run / "timings.jsonl"),
    )
    r, accuracy = fid_matrix(rows), fid_matrix(rows, "accuracy")
    last = [row for row in rows if row["kind"] == "evaluation"][-1]
    fishers = [row for row in rows if row["kind"] == "fisher"]
    penalty = [row["penalty_ms"] for row in timings if "penalty_ms" in row]
    return {
        "method": config["method"],
        "seed": config["seed"],
        "average_fid": metrics.average_fid(r),
        "incremental_average_fid": metrics.incremental_average_fid(r),
        "forgetting": metrics.forgetting(r, len(r) - 1),
        "forgetting_divisor_t": metrics.forgetting(r, len(r)),
        "accuracy": sum(accuracy[-1]) / len(accuracy[-1]),
        "accuracy_task_1": accuracy[-1][0],
        "accuracy_task_1_when_learnt": accuracy[0][0] if accuracy[0] else None,
        "fid_matrix": r,
        "accuracy_matrix": accuracy,
        "extractor": last["extractor"],
        "samples_per_task": last["samples"],
        "sampler": f"{last['sampler']}, {last['sampler_steps']} steps",
        "penalty_ms": float(np.median(penalty)) if penalty else None,
        "step_ms": float(np.median([row["step_ms"] for row in timings if "step_ms" in row])),
        "state_bytes": fishers[-1]["state_bytes"] if fishers else 0,
    }


def find(folders: Iterable[Path]) -> tuple[list[Finished], list[Path]]:
    """Finished runs at or below the folders, in the order of methods and seeds; and the unfinished ones."""
    runs: dict[Path, Finished] = {}
    unfinished = []
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"{str(folder)!r} is not a folder; give one that `train` or `compare` has written")
        for path in sorted({folder / "config.json", *folder.glob("*/config.json")}):
            run = path.parent
            if (run / "summary.json").exists():
                runs[run.resolve()] = Finished(run, read_json(path)["run"], read_json(run / "summary.json"))
            elif path.exists():
                unfinished.append(run)
    return list(runs.values()), unfinished


# Numbers over seeds


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and, from two values on, the sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> tuple[float, float, int] | None:
    """(mean, half width of the 95 % t interval, n) of value - baseline over the seeds of both; None below two."""
    from scipy import stats

    seeds = sorted(values.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    error = differences.std(ddof=1) / math.sqrt(len(seeds))
    return float(differences.mean()), float(stats.t.ppf(0.975, len(seeds) - 1) * error), len(seeds)


def grouped(runs: Sequence[Finished], order: Sequence[str] = ()) -> dict[str, list[Finished]]:
    """Runs by method: those of `order` first, then as found."""
    names = [name for name in order if any(run.method == name for run in runs)]
    names += [name for name in dict.fromkeys(run.method for run in runs) if name not in names]
    return {name: sorted((run for run in runs if run.method == name), key=lambda run: run.seed) for name in names}


def comparable(runs: Sequence[Finished]) -> None:
    """Refuse to put numbers side by side that were not measured in the same way."""
    for key in ("extractor", "samples_per_task", "sampler"):
        kinds = sorted({str(run.summary[key]) for run in runs})
        if len(kinds) > 1:
            raise OptionError(
                f"these runs differ in their {key} ({', '.join(kinds)}): their FIDs do not compare; report them apart"
            )
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        twin = seen.setdefault((run.method, run.seed), run.path)
        if twin != run.path:
            raise OptionError(
                f"{str(twin)!r} and {str(run.path)!r} are both {run.method} with seed {run.seed}; report them apart"
            )


class Column(NamedTuple):
    title: str
    key: str
    digits: int
    scale: float = 1.0


COLUMNS = (
    Column("average FID", "average_fid", 1),
    Column("forgetting", "forgetting", 1),
    Column("conditional accuracy", "accuracy", 3),
    Column("task 1 accuracy", "accuracy_task_1", 3),
    Column("penalty ms/step", "penalty_ms", 2),
    Column("state bytes", "state_bytes", 0),
)


def _cell(runs: Sequence[Finished], column: Column) -> str:
    values = [run.summary[column.key] for run in runs]
    if any(value is None for value in values):
        return "-"
    mean, spread = mean_and_spread(values)
    text = f"{mean:.{column.digits}f}"
    # Time and size are properties of the method, not observations of it.
    noisy = column.key not in ("penalty_ms", "state_bytes")
    return f"{text} ± {spread:.{column.digits}f}" if spread is not None and noisy else text


def table(runs: Sequence[Finished], baseline: str, order: Sequence[str] = ()) -> tuple[list[str], list[list[str]], str]:
    """Headings, rows and a caption that says how the numbers were made."""
    groups = grouped(runs, order)
    seeds = max(len(group) for group in groups.values())
    head = ["method", *(column.title for column in COLUMNS)]
    paired = baseline in groups and seeds > 1 and len(groups) > 1
    if seeds > 1:
        head.insert(1, "seeds")
    if paired:
        head += [f"average FID less {baseline}'s", f"forgetting less {baseline}'s"]
    body = []
    for name, group in groups.items():
        row = [name, *(_cell(group, column) for column in COLUMNS)]
        if seeds > 1:
            row.insert(1, str(len(group)))
        if paired:
            row += [_difference(group, groups[baseline], key) for key in ("average_fid", "forgetting")]
        body.append(row)
    first = runs[0]
    caption = (
        f"{first.config['data']}, {first.config['tasks']} tasks of {first.config['classes_per_task']} class(es), "
        f"{first.config['steps']} steps a task. "
        f"FID on the features of {first.summary['extractor']}, {first.summary['samples_per_task']} images a task, "
        f"{first.summary['sampler']}; forgetting = mean over tasks before the last of FID at the end "
        "less FID when learnt. Lower is better for both. Accuracy: images that the extractor takes for their label."
    )
    if seeds > 1:
        caption += " ± is the standard deviation over seeds"
        caption += "; brackets are 95 % t intervals of the differences paired by seed." if paired else "."
    else:
        caption += " One seed: differences may be chance."
    return head, body, caption


def _difference(group: Sequence[Finished], baseline: Sequence[Finished], key: str) -> str:
    values, reference = (
        {r.seed: r.summary[key] for r in part if r.summary[key] is not None} for part in (group, baseline)
    )
    result = paired_difference(values, reference)
    if result is None or group == baseline:
        return "-"
    mean, half, _ = result
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def rich_table(head: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> Table:
    result = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(head):
        two_lines = "\n".join(title.rsplit(" ", 1))
        result.add_column(two_lines, justify="left" if i == 0 else "right", overflow="fold")
    for row in body:
        result.add_row(*row)
    return result


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    return "\n".join([*lines, "", caption, ""])


def write(folders: Sequence[Path], out: Path, baseline: str, order: Sequence[str] = ()) -> tuple[Table, list[Path]]:
    """The table of all finished runs; the same as comparison.md and comparison.json, and the pictures, in `out`."""
    from crl_diffusion import pictures

    runs, _ = find(folders)
    if not runs:
        where = ", ".join(repr(str(folder)) for folder in folders)
        raise OptionError(f"no finished run in {where}; give folders that `train` or `compare` has written")
    comparable(runs)
    out.mkdir(parents=True, exist_ok=True)
    head, body, caption = table(runs, baseline, order)
    paths = pictures.comparison(runs, out, order)
    (out / "comparison.md").write_text(markdown(head, body, caption), encoding="utf-8")
    ordered = [run for group in grouped(runs, order).values() for run in group]
    values = [{**run.summary, "folder": os.path.relpath(run.path, out)} for run in ordered]
    write_json(out / "comparison.json", {"caption": caption, "runs": values})
    return rich_table(head, body, caption), [*paths, out / "comparison.md", out / "comparison.json"]
