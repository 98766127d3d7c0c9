"""RESULTS/REGIME.md and its pictures, from the runs that have finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from crl_diffusion.files import read_rows
from crl_diffusion.reporting import effects, seeds, tables
from crl_diffusion.reporting.canvas import Drawing
from crl_diffusion.reporting.runs import Finished
from crl_diffusion.reporting.tables import NONE, Sheet, cell, number

from . import pictures
from .definitions import BASELINE, LATER, RANK1
from .pictures import groups_of
from .predictions import LIMIT, Difference, Prediction, predictions
from .runs import Result, Runs

BASE = f"constant {BASELINE}"


def difference(results: Mapping[int, Result], base: Mapping[int, Result], name: str) -> list[str]:
    """Results less those of another arm, paired by seed: mean and interval, and p of the exact sign-flip test."""
    first, second = (tables.values([r.run for r in group.values()], name) for group in (results, base))
    paired = [*seeds.paired(first, second).values()]
    test = seeds.sign_flip(paired)
    return [interval(paired), NONE if test is None else f"{test.p:.2g}"]


def differences(results: Mapping[int, Result], base: Mapping[int, Result]) -> list[str]:
    return [*difference(results, base, "average_fid"), *difference(results, base, "forgetting")]


def results_sheet(runs: Runs, groups: Mapping[str, Mapping[int, Result]]) -> Sheet:
    """One row an arm: its numbers, and the differences to distillation alone at the constant rate."""
    head = ["setting, method", "lam", "seeds", "average FID ↓", "FID when learnt ↓", "forgetting ↓", "log rate"]
    head += ["moved", "average FID, difference", "p", "forgetting, difference", "p"]
    body = []
    for arm in runs.regime.arms:
        if arm.label not in groups:
            continue
        results = groups[arm.label]
        lam = runs.lam(arm)
        row = [arm.label, NONE if lam is None else f"{lam:g}", str(len(results))]
        for name, digits in (("average_fid", 2), ("fid_when_learnt", 2), ("forgetting", 2)):
            row.append(cell(tables.values([r.run for r in results.values()], name), digits, interval=False))
        moving = [r for r in results.values() if r.of_kind("movement")]
        adam = [r for r in moving if r.run.settings["optimizer"] == "adam"]
        row.append(number(seeds.estimate([r.log_rate for r in adam]).mean, 2) if adam else NONE)
        row.append(number(seeds.estimate([r.displacement for r in moving]).mean, 1) if moving else NONE)
        body.append(row + differences(results, {} if arm.label == BASE else groups.get(BASE, {})))
    text = (
        "Mean ± standard deviation over seeds. Differences: less distillation alone at the constant rate, paired by "
        "seed, mean and 95 % t interval; p of the exact two-sided sign-flip test. Forgetting is divided by T − 1. Log "
        "rate: mean log (lr / √v) of Adam's second moments v, with the peak of lr, at the end of a task; moved: "
        "distance between the weights at the start and at the end of a task; both are means over the tasks after the "
        "first. “same lam”, “same lam a”, “same precision”: lam is not tuned but taken from "
        f"`{RANK1.label}`."
    )
    return Sheet(head, body, text)


def recipes_sheet(runs: Runs, groups: Mapping[str, Mapping[int, Result]]) -> Sheet:
    """Continual arms with the memory that each takes, against rank 1 in the gradient; the lowest average FID first."""
    means, body = {}, {}
    for label, results in groups.items():
        if any(not result.of_kind("movement") for result in results.values()):
            continue  # joint training
        forgetting = seeds.estimate([result.forgetting for result in results.values()])
        means[label] = seeds.estimate([result.average_fid for result in results.values()]).mean
        kept = max(result.kept for result in results.values())
        body[label] = [label, f"{kept:.3g}", number(means[label], 2), number(forgetting.mean, 2)]
        model = {} if label == RANK1.label else groups.get(RANK1.label, {})
        body[label] += difference(results, model, "average_fid")
    text = (
        "Kept: bytes for each parameter at the end of the run, besides the model, the optimizer's state and the old "
        "model that distills: the penalties of all past tasks, or the average of the weights. Difference: less "
        f"`{RANK1.label}`, as the rank-1 paper has it, paired by seed."
    )
    head = ["setting, method", "kept", "average FID ↓", "forgetting ↓", "average FID, difference", "p"]
    return Sheet(head, [body[label] for label in sorted(means, key=lambda label: means[label])], text)


def within_sheet(runs: Runs, groups: Mapping[str, Mapping[int, Result]]) -> Sheet | None:
    """Arms of settings other than the constant one, less distillation alone in the same setting; None without any."""
    body = []
    for arm in runs.regime.arms:
        base = f"{arm.setting} {BASELINE}"
        if arm.setting != "constant" and arm.label != base and arm.label in groups and base in groups:
            body.append([arm.label, *differences(groups[arm.label], groups[base])])
    if not body:
        return None
    head = ["setting, method", "average FID, difference", "p", "forgetting, difference", "p"]
    return Sheet(head, body, "Differences: less distillation alone in the same setting, paired by seed.")


def interval(values: Sequence[float]) -> str:
    if not values:
        return NONE
    estimate = seeds.estimate(values)
    mean = number(estimate.mean, 2, plus=True)
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{number(estimate.low, 2, plus=True)}, {number(estimate.high, 2, plus=True)}]"


def prediction_part(number_: int, prediction: Prediction, finished: bool) -> str:
    def row(test: Difference) -> list[str]:
        return [test.text, interval(test.values), f"{test.p:.2g}", "shown" if test.shown else "not shown"]

    head = ["difference", "mean [95 % interval]", "p", f"p ≤ {LIMIT:g}"]
    sheet = Sheet(head, [row(test) for test in prediction.differences], f"Rule: {prediction.rule}.")
    verdict = prediction.verdict.capitalize() if finished else "No verdict before the last run"
    return f"### {number_}. {prediction.text} **{verdict}**\n\n{tables.markdown(sheet)}"


def candidate(pair: tuple[str, str]) -> str:
    """The name of an arm's candidate, without the setting if that is the common one."""
    setting, method = pair
    return method if setting == "constant" else f"{setting} {method}"


def tuning_part(runs: Runs) -> Sheet:
    """The average FID of every lam that was tried, by arm, and that of the same setting without a penalty."""
    body = []
    for arm in runs.regime.arms:
        if not arm.lams:
            continue
        setting = runs.setting(arm.setting)
        fids = dict(zip(arm.lams, runs.fids(runs.tried(arm).values()), strict=False))
        beside = arm.method.startswith(f"{BASELINE}+")  # else it is the penalty of another method
        base = number(runs.fids([runs.tuning_run(setting, BASELINE)])[0], 2) if setting and beside else NONE
        values = ", ".join(f"{lam:g}: {number(fid, 2)}" for lam, fid in fids.items())
        lam = runs.lam(arm)
        body.append([arm.label, base, values or "not run", NONE if lam is None else f"{lam:g}"])
    for arm in runs.regime.arms:
        if arm.candidates:
            fids = dict(zip(map(candidate, arm.candidates), runs.fids(runs.tried_candidates(arm)), strict=True))
            choice = runs.choice(arm)
            values = ", ".join(f"{name}: {number(fid, 2)}" for name, fid in fids.items())
            body.append([arm.label, NONE, values, NONE if choice is None else candidate(choice)])
    for name, candidates in runs.regime.chosen.items():
        fids = runs.fids(runs.tuning_run(candidate, BASELINE) for candidate in candidates)
        values = ", ".join(f"{c}: {number(fid, 2)}" for c, fid in zip(candidates, fids, strict=True))
        body.append([f"{name} {BASELINE}", NONE, values, runs.setting(name) or NONE])
    text = (
        f"Average FID on validation images, seed {runs.regime.tuning_seed}, one run each; nan: not run, inf: the loss "
        "was not finite. The lowest one is kept. These are choices, not results."
    )
    return Sheet(["setting, method", "no penalty", "lam: average FID", "kept"], body, text)


def lowered(runs: Runs) -> str:
    """The label of the lowered rate that the tuning seed prefers."""
    settings = [name for name in LATER if name in runs.regime.settings]
    fids = runs.fids(runs.tuning_run(name, BASELINE) for name in settings)
    return f"{min(zip(fids, settings, strict=True))[1]} {BASELINE}"


def words(setting: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items()) or "no difference"


def picture(drawing: Drawing, results: Path) -> list[str]:
    drawing.save(results)
    return [f"![{drawing.alt}]({drawing.name}.png)", drawing.caption]


def beginning(name: str, runs: Runs, lines: Path) -> list[str]:
    """The parts of a page that say what was run, when, and what is missing."""
    rows = read_rows(lines)
    machines = dict.fromkeys(row["record"]["environment"].get("processor", "unknown") for row in rows)
    parts = [
        f"# {name}",
        f"`python -m benchmarks.evidence {name}`; {len(rows)} runs, {min(row['date'] for row in rows)} to "
        f"{max(row['date'] for row in rows)}, {', '.join(machines)}; this page: {date.today()}. Every run's values: "
        f"[{lines.name}]({lines.name}).",
        "Settings of all runs: " + ", ".join(f"{key} {value}" for key, value in runs.regime.common.items()) + ". "
        "Settings by name: "
        + "; ".join(f"**{key}**: {words(value)}" for key, value in runs.regime.settings.items())
        + ".",
    ]
    if missing := runs.missing():
        parts.append(f"**Not finished**: {len(missing)} runs or more are missing.")
    return parts


def write_report(name: str, runs: Runs, lines: Path, results: Path) -> None:
    groups, missing = groups_of(runs), runs.missing()
    parts = beginning(name, runs, lines)
    drawn = [
        ("Training until it no longer helps", pictures.training(runs, f"{name}-steps")),
        ("Gain and Adam's effective rate", pictures.gain_and_rate(runs, f"{name}-rate")),
        ("Forgetting and movement", pictures.forgetting_and_movement(runs, f"{name}-movement")),
    ]
    compared: dict[str, list[Finished]] = {
        label: [result.run for result in by_seed.values()]
        for label, by_seed in groups.items()
        if not label.endswith(("fine-tune", "joint"))
    }
    if BASE in groups:
        parts += ["## Result", tables.markdown(results_sheet(runs, groups))]
        forest = effects.forest(compared, BASE, f"{name}-differences")
        if forest is not None:
            parts += picture(forest, results)
        parts += ["## Which to use", tables.markdown(recipes_sheet(runs, groups))]
        within = within_sheet(runs, groups)
        if within is not None:
            parts += ["## Within other settings", tables.markdown(within)]
        parts += ["## The six predictions"]
        tests = predictions(groups, lowered(runs), [arm.label for arm in runs.regime.arms])
        parts += [prediction_part(i, prediction, not missing) for i, prediction in enumerate(tests, start=1)]
    for title, drawing in drawn:
        if drawing is not None:
            parts += [f"## {title}", *picture(drawing, results)]
    parts += ["## How lam and rates were chosen", tables.markdown(tuning_part(runs))]
    (results / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
