"""RESULTS/systems.md: the systems of the literature in one table, from the runs that have finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from crl_diffusion.config.systems import SYSTEMS
from crl_diffusion.reporting import effects, seeds, tables
from crl_diffusion.reporting.tables import NONE, Sheet, cell, number

from .definitions import BASELINE, SYSTEM_ARMS
from .pictures import groups_of
from .report import BASE, beginning, interval, picture, tuning_part
from .runs import Result, Runs

FINE_TUNING = SYSTEM_ARMS["fine-tuning"].label
SCORES = (tables.AVERAGE, tables.FORGETTING, tables.ACCURACY)
TEXT = f"""\
Mean ± standard deviation over seeds and, in brackets, the 95 % t interval. Difference: less `{BASELINE}`, paired by \
seed, mean and 95 % t interval. Methods are as the tuning seed chose them. Kept: bytes for each parameter of the \
model that the last task needs of the tasks before it, besides the model and the optimizer's state: the old model (4), \
pools of images and what guides them, penalties; of adapters, those of all tasks. Step: CPU time of a step of the \
tasks after the first, relative to fine-tuning. Task's end: mean CPU time of what a task leaves for later ones (old \
model, pool, classifier, Fisher matrix; not the evaluation), relative to that of the steps of one task of fine-tuning. \
Both are ratios of medians over seeds within these runs, which shared their machines with other work."""


def median(results: Sequence[Result], key: str) -> float | None:
    """Of a summary's number, over the seeds that have it."""
    values = [result.run.summary[key] for result in results if result.run.summary.get(key) is not None]
    return float(np.median(values)) if values else None


def ratio(value: float | None, unit: float | None) -> str:
    return (
        NONE if value is None or not unit else f"{value / unit:.2g}" if value < 0.1 * unit else number(value / unit, 2)
    )


def systems_sheet(runs: Runs, groups: Mapping[str, Mapping[int, Result]]) -> Sheet:
    """One row a system that has a finished run."""
    base = groups[BASE]
    parameters = next(iter(base.values())).parameters
    step = median([*groups.get(FINE_TUNING, {}).values()], "step_cpu_ms")
    task = None if step is None else 1e-3 * step * runs.regime.common["steps"]
    head = ["system", "--method", "source", "seeds", *(column.title for column in SCORES), "average FID, difference"]
    head += ["kept", "step", "task's end"]
    body = []
    for name, arm in SYSTEM_ARMS.items():
        results = [*groups.get(arm.label, {}).values()]
        if not results:
            continue
        finished = [result.run for result in results]
        values = [tables.values(finished, column.key) for column in SCORES]
        row = [name, f"`{finished[0].method}`", SYSTEMS[name].source, str(len(results))]
        row += [cell(by_seed, max(column.digits, 2)) for by_seed, column in zip(values, SCORES, strict=True)]
        compared = tables.values([result.run for result in base.values()], SCORES[0].key)
        row.append(NONE if arm.label == BASE else interval([*seeds.paired(values[0], compared).values()]))
        row.append(f"{max(result.memory for result in results) / parameters:.3g}")
        row += [ratio(median(results, "step_cpu_ms"), step), ratio(median(results, "task_end_cpu_seconds"), task)]
        body.append(row)
    return Sheet(head, body, TEXT)


def write_systems(name: str, runs: Runs, lines: Path, results: Path) -> None:
    groups, parts = groups_of(runs), beginning(name, runs, lines)
    if BASE in groups:
        parts += ["## Result", tables.markdown(systems_sheet(runs, groups))]
        compared = {
            label: [result.run for result in by_seed.values()]
            for label, by_seed in groups.items()
            if not label.endswith(("fine-tune", "joint"))
        }
        forest = effects.forest(compared, BASE, f"{name}-differences")
        if forest is not None:
            parts += picture(forest, results)
        differing = {system: SYSTEMS[system].differs for system, arm in SYSTEM_ARMS.items() if arm.label in groups}
        rows = [[system, text] for system, text in differing.items()]
        parts += ["## What differs from the sources", tables.markdown(Sheet(["system", "what differs"], rows, ""))]
    parts += ["## How lam, ranks, guidance and shares were chosen", tables.markdown(tuning_part(runs))]
    (results / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
