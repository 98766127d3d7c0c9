"""Tables of a penalty's cost and of its Fisher matrices' statistics, from the logs of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from crl_diffusion.files import Row
from crl_diffusion.reporting.runs import Groups
from crl_diffusion.reporting.tables import MINUS, NONE, Sheet
from crl_diffusion.run_folder.readers import read_metrics, read_timings

FISHER = ("kappa", "rho", "signal_share", "samples_needed", "trace")
LOW_SIGNAL, LOW_RHO = 0.8, 0.1  # below these limits a direction is not reliable
LIMITS = (  # title, key, limit, and what a value below it means
    ("signal share", "signal_share", LOW_SIGNAL, "directions partly noise"),
    ("ρ", "rho", LOW_RHO, "directions that hold little of F"),
)


# Costs


def costs(groups: Groups) -> Sheet:
    """Time of a step and of its penalty, over the logged rows of all seeds after the first task, and of tasks' ends."""
    body = []
    for name, group in groups.items():
        timings = [row for run in group for row in read_timings(run.path)]
        rows = [row for row in timings if "step_ms" in row]
        ends = [row["task_end_seconds"] for row in timings if "task_end_seconds" in row]
        if not rows:
            continue
        with_penalty = [row for row in rows if row.get("penalty_ms") is not None]
        later = with_penalty or [row for row in rows if row["stage"] > 1] or rows
        size = max(float(run.summary.get("state_bytes") or 0) for run in group)
        cells = [_quantiles([row["step_ms"] for row in later])]
        if with_penalty:
            shares = [100 * row["penalty_ms"] / row["step_ms"] for row in later]
            cells += [_quantiles([row["penalty_ms"] for row in later]), _quantiles(shares)]
        else:
            cells += [NONE, NONE]
        cells.append(_quantiles(ends) if ends else NONE)
        body.append([name, str(len(later)), *cells, f"{size / 2**20:,.2f}" if size else NONE])
    head = ["method", "rows", "step, ms", "penalty, ms", "penalty, % of the step", "task's end, s", "state, MiB"]
    text = (
        "Median and, in brackets, 20th to 80th percentile over logged rows of all seeds, after the first task: a row "
        "is the mean step time since the row before it, and the median of its penalty times. The step includes the "
        "penalty. Task's end: what a task leaves for later ones (old model, pool of images, Fisher matrix), over all "
        "tasks but the last. Wall-clock times, taken beside whatever else the machine was doing. State: what the "
        "penalty keeps of all past tasks in the end, or the adapters of all tasks; 1 MiB = 2²⁰ bytes."
    )
    return Sheet(head, body, text)


def _quantiles(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8))
    digits = 1 if middle >= 10 else 2
    return f"{middle:,.{digits}f}\n[{low:,.{digits}f}, {high:,.{digits}f}]"


# Fisher diagnostics


def fisher_rows(groups: Groups) -> dict[str, list[list[Row]]]:
    """For each method with an estimated penalty, for each task in turn, the rows of all seeds."""
    result: dict[str, list[list[Row]]] = {}
    for name, group in groups.items():
        by_task: dict[int, list[Row]] = {}
        for run in group:
            for row in read_metrics(run.path):
                if row["kind"] == "fisher" and any(row.get(key) is not None for key in FISHER):
                    by_task.setdefault(row["task"], []).append(row)
        if by_task:
            result[name] = [by_task[task] for task in sorted(by_task)]
    return result


def mean_of(rows: Sequence[Row], key: str) -> float | None:
    """Mean over seeds of a row's number; None if none has it."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else None


def fisher(rows: Mapping[str, Sequence[Sequence[Row]]]) -> Sheet:
    """Statistics of each task's Fisher matrix, means over seeds; ranges over directions and seeds."""
    body = []
    ranged = [key for key in ("curvatures", "slopes") if any(row[key] for row in estimates_with(rows, key))]
    for name, tasks in rows.items():
        for task_rows in tasks:
            means = [mean_of(task_rows, key) for key in FISHER]
            cells = [NONE if value is None else f"{value:,.0f}" if value >= 1e3 else f"{value:.3g}" for value in means]
            ranges = [_range([value for row in task_rows for value in row.get(key) or ()]) for key in ranged]
            directions = max((len(row.get("curvatures") or ()) for row in task_rows), default=0)
            samples = mean_of(task_rows, "num_samples")
            head = [name, str(task_rows[0]["task"]), NONE if samples is None else f"{samples:,.0f}"]
            body.append([*head, *(cell.replace("-", MINUS) for cell in cells), str(directions or NONE), *ranges])
    head = ["method", "task", "samples", "κ", "ρ", "signal share", "samples needed", "trace of F"]
    text = "Means over seeds; for curvatures and slopes, smallest to largest over directions and seeds."
    return Sheet([*head, "directions", *ranged], body, text)


def _range(values: Sequence[float]) -> str:
    if not values:
        return NONE
    ends = [f"{value:.2g}" for value in (min(values), max(values))]
    return (ends[0] if ends[0] == ends[1] else " to ".join(ends)).replace("-", MINUS)


def estimates_with(rows: Mapping[str, Sequence[Sequence[Row]]], key: str) -> list[Row]:
    """The rows of all methods, tasks and seeds that have a value for a key."""
    return [row for tasks in rows.values() for task_rows in tasks for row in task_rows if row.get(key) is not None]


def warning(rows: Mapping[str, Sequence[Sequence[Row]]]) -> str:
    """One sentence for all methods together."""
    clauses = []
    for title, key, limit, meaning in LIMITS:
        estimates = estimates_with(rows, key)
        low = [row for row in estimates if row[key] < limit]
        if low:
            clauses.append(f"{title} is below {limit:g} in {len(low)} of {len(estimates)} estimates ({meaning})")
    return f"Not to be relied on: {', '.join(clauses)}."


def warnings(rows: Mapping[str, Sequence[Sequence[Row]]]) -> list[str]:
    """One sentence for each method and limit that some of its estimates are below."""
    sentences = []
    for name, tasks in rows.items():
        for title, key, limit, _ in LIMITS:
            estimates = estimates_with({name: tasks}, key)
            low = [row for row in estimates if row[key] < limit]
            if low:
                worst = min(low, key=lambda row: float(row[key]))
                value = f"{worst[key]:.2g}".replace("-", MINUS)
                samples = _needed(worst) if key == "signal_share" else ""
                share = f"{len(low)} of {len(estimates)} estimates"
                smallest = f"smallest {value}, after task {worst['task']}{samples}"
                sentences.append(f"{name}: {title} below {limit:g} in {share} ({smallest}).")
    return sentences


def _needed(row: Row) -> str:
    samples, needed = row.get("num_samples"), row.get("samples_needed")
    return f"; {samples:,.0f} samples, about {needed:,.0f} would do" if samples and needed else ""
