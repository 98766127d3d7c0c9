"""Pictures of one run, drawn from its folder: samples, the matrix of FIDs, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from crl_diffusion.config.spelling import label
from crl_diffusion.evaluation.summaries import fid_matrix
from crl_diffusion.files import Row
from crl_diffusion.reporting.canvas import (
    COLOURS,
    GREY,
    colour_bar,
    drawing,
    heatmap,
    limits,
    plain_log,
    task_lines,
    task_names,
    wrap,
)
from crl_diffusion.reporting.samples import grid_over_tasks
from crl_diffusion.run_folder.readers import read_config, read_metrics

matplotlib.use("Agg")  # pictures go to files, with or without a display


def of_run(run: Path) -> list[Path]:
    """Samples, R and curves of one run."""
    record, rows = read_config(run), read_metrics(run)
    config, tasks = record["run"], task_names(record)
    name = f"{label(config['method'], config)} on {config['data']}, seed {config['seed']}"
    r = fid_matrix(rows)
    drawings = []
    if (grid := grid_over_tasks(run, len(r), f"Samples of {name}")) is not None:
        drawings.append(drawing("samples", grid[0], "", ""))
    room = 0.08 * max(map(len, tasks), default=0)
    figure, axis = plt.subplots(figsize=(5.2 + room, 4.4), layout="constrained")
    colour_bar(figure, heatmap(axis, r, limits([r]), names=tasks), axis)
    axis.set(xlabel="FID of task", ylabel="after learning task")
    axis.set_title(wrap(name, 50), fontsize=10)
    drawings += [drawing("fid_matrix", figure, "", ""), drawing("curves", _curves(rows, r, name, tasks), "", "")]
    return [picture.save(run) for picture in drawings]


def _curves(rows: Sequence[Row], r: Sequence[Sequence[float]], name: str, tasks: Sequence[str]) -> Figure:
    """Left: losses over all steps. Right: FID of each task after each task."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [row for row in rows if row["kind"] == "step"]
    offset, start, x = 0, [0], []
    for before, row in zip([None, *steps], steps, strict=False):
        if before is not None and row["stage"] != before["stage"]:
            offset += before["step"]
            start.append(offset)
        x.append(offset + row["step"])
    left.plot(x, [row["loss"] for row in steps], color=COLOURS[0], label="real images")
    if any(row["replay_loss"] for row in steps):
        replayed = [row["replay_loss"] or float("nan") for row in steps]
        left.plot(x, replayed, color=COLOURS[1], linestyle="--", label="replayed images, weighted")
    for boundary in start[1:]:
        left.axvline(boundary, color=GREY, linewidth=0.8, linestyle=":")
    plain_log(left)
    left.set_xlabel("optimization step (dotted: a new task begins)")
    left.set_ylabel("loss, mean squared error per pixel")
    left.set_title("Training loss", fontsize=11)
    left.legend(frameon=False)
    task_lines(right, r, tasks)
    right.set_ylim(bottom=0)
    right.set(xlabel="after learning task", ylabel="FID (lower is better)")
    right.set_title("FID of each task", fontsize=11)
    many = len(r) > 10
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=2 if many else 1)
    figure.suptitle(name, fontsize=13)
    return figure
