"""The summary of a run: the matrix of FIDs and the averages of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crl_diffusion.evaluation import metrics
from crl_diffusion.files import Row
from crl_diffusion.run_folder.readers import read_config, read_metrics, read_timings, sha256_of


def fid_matrix(rows: Sequence[Row], key: str = "fid") -> list[list[float]]:
    """R (or, with key="accuracy", the same for accuracies) from a run's rows; see metrics.Matrix."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    tasks = max(row["after_task"] for row in evaluations)
    matrix: list[list[float]] = [[] for _ in range(tasks)]
    for row in evaluations:
        if key in row:  # rows of an earlier version have fewer keys
            matrix[row["after_task"] - 1].append(row[key])
    return matrix


def summarise(run: Path) -> Row:
    """A run's headline numbers, from its config.json, metrics.jsonl and timings.jsonl."""
    config, rows, timings = read_config(run)["run"], read_metrics(run), read_timings(run)
    r, accuracy, kl = fid_matrix(rows), fid_matrix(rows, "accuracy"), fid_matrix(rows, "class_kl")
    measured = [row for row in rows if row["kind"] == "evaluation"]
    last, tasks = measured[-1], {row["task"]: row for row in measured}
    state = [row["state_bytes"] for row in rows if "state_bytes" in row]
    step = [row["step_ms"] for row in timings if "step_ms" in row]
    penalty = [row["penalty_ms"] for row in timings if "penalty_ms" in row]
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
        "penalty_ms": float(np.median(penalty)) if penalty else None,
        "step_ms": float(np.median(step)) if step else None,
        "state_bytes": state[-1] if state else 0,
        "metrics_sha256": sha256_of(run / "metrics.jsonl"),
    }
