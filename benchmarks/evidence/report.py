"""RESULTS/EXPERIMENT.md: the result of the final runs, and how lambda was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from crl_diffusion import effects, tables
from crl_diffusion.method import in_order
from crl_diffusion.records import read_rows
from crl_diffusion.report import Finished, grouped

from .experiments import Experiment
from .tuning import BASELINE, Screened, Sweep, Tuning, finished, stages


def tuning_sheet(experiment: Experiment, screening: Mapping[str, Screened]) -> tables.Sheet:
    def cells(sweep: Sweep | None) -> list[str]:
        if sweep is None:
            return [tables.NONE, tables.NONE]
        finished = {lam: value for lam, value in sweep.values.items() if not math.isnan(value)}
        values = ", ".join(f"{lam:g}: {tables.number(value, 2)}" for lam, value in finished.items())
        excess = tables.NONE if math.isnan(sweep.excess) else tables.number(sweep.excess, 2, plus=True)
        return [values or "not run", excess]

    head = ["candidate", "coarse, lam: average FID", "best less baseline"]
    head += ["fine, lam: average FID", "best less baseline", "lam kept"]
    body = []
    for name, row in screening.items():
        last = row.fine or row.coarse
        reason = "not tuned yet" if math.isnan(last.excess) else experiment.ended.get(name, "dropped")
        kept = reason if row.lam is None else f"{row.lam:g}"
        body.append([f"`{name}`", *cells(row.coarse), *cells(row.fine), kept])
    text = (
        f"Average FID on validation images, one run each: coarse on seed {experiment.coarse_seed}, "
        + ("no fine stage" if experiment.fine_seed is None else f"fine on seed {experiment.fine_seed}")
        + ". Baseline: the same replay without a penalty"
        + (
            "."
            if experiment.margin is None
            else f"; dropped: not better than it by {experiment.margin:g}, unless required."
        )
        + " These are choices, not results."
    )
    return tables.Sheet(head, body, text)


def final_runs(experiment: Experiment, folder: Path) -> tuple[list[Finished], list[str]]:
    """The final runs that the tuning has chosen, and remarks on missing and excluded runs."""
    chosen: list[Finished] = []
    remarks: list[str] = []
    for stage, (methods, seeds) in stages(experiment, folder).items():
        runs = finished(folder / stage, seeds)
        chosen = [run for run in runs if run.method in methods.split()]
        missing = len(set(methods.split())) * len(seeds) - len(chosen)
        if missing and not remarks:
            later = "" if stage == "final" else ", and what follows from them"
            remarks.append(f"**Not finished**: {missing} of the {stage} runs{later}.")
        if stage == "final" and len(runs) > len(chosen):
            remarks.append(f"**Left out**: {len(runs) - len(chosen)} final runs, not chosen by the tuning.")
    return chosen, remarks  # `chosen` is the last stage's


def write_report(name: str, experiment: Experiment, folder: Path, lines: Path, results: Path) -> None:
    """RESULTS/NAME.md and its picture, from the runs that have finished."""
    screening, rows = Tuning(folder, experiment).screening(), read_rows(lines)
    machines = dict.fromkeys(row["record"]["environment"].get("processor", "unknown") for row in rows)
    parts = [
        f"# {name}",
        f"`python -m benchmarks.evidence {name}`; {len(rows)} runs, {min(row['date'] for row in rows)} to "
        f"{max(row['date'] for row in rows)}, {', '.join(machines)}; this page: {date.today()}. Every run's values: "
        f"[{lines.name}]({lines.name}).",
        f"Final runs: `crl-diffusion compare {experiment.options}`."
        + (f" Tuning runs: the same with `--held-out validation {experiment.tuning}`." if screening else ""),
    ]
    runs, remarks = final_runs(experiment, folder)
    parts += remarks
    if runs:
        order = in_order(run.method for run in runs)
        parts += ["## Result", tables.markdown_sheets(runs, BASELINE, order)]
        picture = effects.forest(grouped(runs, order), BASELINE, name) if tables.several(runs) else None
        if picture is not None:
            picture.save(results)
            parts += [f"![{picture.alt}]({name}.png)", picture.caption]
    if screening:
        parts += ["## How lambda was chosen", tables.markdown(tuning_sheet(experiment, screening))]
    (results / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
