"""The summary of a run: the matrix of FIDs and the averages of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crl_diffusion.evaluation import metrics
from crl_diffusion.files import Row
from crl_diffusion.run_folder.readers import read_config, read_metrics, read_timings, sha256_of

# Keys of a summary that come from timings.jsonl: milliseconds of a step, seconds of what a task's end makes.
TIMES = ("penalty_ms", "step_ms", "step_cpu_ms", "task_end_seconds", "task_end_cpu_seconds")


def fid_matrix(rows: Sequence[Row], key: str = "fid") -> list[list[float]]:
    """R (or, with key="accuracy", the same for accuracies) from a run's rows; see metrics.Matrix."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    tasks = max(row["after_task"] for row in evaluations)
    matrix: list[list[float]] = [[] for _ in range(tasks)]
    for row in evaluations:
        if key in row:  # rows of an earlier version have fewer keys
            matrix[row["after_task"] - 1].append(row[key])
    return matrix


def _typical(average: Callable[[list[float]], Any], rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return float(average(values)) if values else None


def summarise(run: Path) -> Row:
    """A run's headline numbers, from its config.json, metrics.jsonl and timings.jsonl.

    `step_ms` is the median of all tasks; `step_cpu_ms` that of later tasks, with replays and penalty.
    """
    config, rows, timings = read_config(run)["run"], read_metrics(run), read_timings(run)
    r, accuracy, kl = fid_matrix(rows), fid_matrix(rows, "accuracy"), fid_matrix(rows, "class_kl")
    measured = [row for row in rows if row["kind"] == "evaluation"]
    last, tasks = measured[-1], {row["task"]: row for row in measured}
    state = [row["state_bytes"] for row in rows if "state_bytes" in row]
    later = [row for row in timings if row.get("stage", 0) > 1]
    return {
        "method": config["method"],
        "seed": config["seed"],
        **metrics.headlines(r, accuracy, kl),
        "extractor": last["extractor"],
        "classifier": last.get("classifier", last["extractor"]),
        "samples_per_task": last["samples"],
        "held_out": last.get("held_out", "test"),
        "held_out_images": [tasks[task].get("held_out_images") for task in sorted(tasks)],
        "sampler": f"{last['sampler']}, {last['sampler_steps']} steps",
        "penalty_ms": _typical(np.median, timings, "penalty_ms"),
        "step_ms": _typical(np.median, timings, "step_ms"),
        "step_cpu_ms": _typical(np.median, later or timings, "step_cpu_ms"),
        "task_end_seconds": _typical(np.mean, timings, "task_end_seconds"),
        "task_end_cpu_seconds": _typical(np.mean, timings, "task_end_cpu_seconds"),
        "state_bytes": state[-1] if state else 0,
        "metrics_sha256": sha256_of(run / "metrics.jsonl"),
    }
