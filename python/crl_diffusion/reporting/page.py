"""The values of the HTML page, whose words and order are in `page.html.jinja`: tables, pictures, and the sentences that
depend on the runs."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Mapping
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crl_diffusion.config.settings import DATA_PLANS
from crl_diffusion.errors import visible
from crl_diffusion.reporting import charts, effects, findings, penalty_tables, provenance, seeds, tables
from crl_diffusion.reporting.canvas import Drawing
from crl_diffusion.reporting.runs import Groups, runs_of

SCREEN = 0.7  # screen pixels per pixel of a picture, so that text has one size in all of them


def render(parts: Mapping[str, Groups], baseline: str) -> tuple[str, list[Drawing]]:
    """The page of all runs by data set, and the pictures on it that get files."""
    runs = [run for groups in parts.values() for run in runs_of(groups)]
    several = len(parts) > 1
    methods, seed_count = len({run.label for run in runs}), len({run.seed for run in runs})
    seed_words = f"{seed_count} seeds" if seed_count > 1 else f"seed {runs[0].seed} only"
    scores = _scores(parts)
    # A name of this version begins names of files; another one may have any characters.
    files = [f"{name if name in DATA_PLANS else f'data-{i}'}-" * several for i, name in enumerate(parts, start=1)]
    data_sets = [
        _data_set(name, groups, baseline, several, file)
        for (name, groups), file in zip(parts.items(), files, strict=True)
    ]
    templates = Environment(
        loader=PackageLoader("crl_diffusion.reporting", "."),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"breakable": breakable, "image": image, "keep_signs": keep_signs}
    html = templates.get_template("page.html.jinja").render(
        title=f"Continual diffusion: {', '.join(parts)}",
        lead=f"{len(runs)} finished run{'s' * (len(runs) != 1)}: {methods} method{'s' * (methods != 1)}, {seed_words}.",
        baseline=baseline,
        several=several,
        scores=scores,
        methods={name: text for groups in parts.values() for name, text in findings.methods(groups).items()},
        data_sets=data_sets,
        environment=provenance.environment(runs),
        limitations=limitations(parts.values()),
    )
    return visible(html), [
        value for values in (scores, *data_sets) for value in values.values() if isinstance(value, Drawing)
    ]


def breakable(name: str) -> Markup:
    """A method's name that a browser may break after + : @ and commas."""
    return Markup(re.sub("([+:,@])", r"\1<wbr>", escape(name)))


def keep_signs(text: str) -> str:
    """A column's title or a number, not broken between a sign and its word."""
    return re.sub("(?<=[÷−±]) | (?=[−↓↑])", "\N{NO-BREAK SPACE}", text)


def image(drawing: Drawing) -> dict[str, Any]:
    """The attributes of a picture's element, with the picture in them."""
    width, height = (round(pixels * SCREEN) for pixels in struct.unpack(">II", drawing.png[16:24]))
    source = f"data:image/png;base64,{base64.b64encode(drawing.png).decode('ascii')}"
    return {"src": source, "width": width, "height": height, "alt": drawing.alt}


def _scores(parts: Mapping[str, Groups]) -> dict[str, Any]:
    """Scores that several data sets have in common; empty without them."""
    scores = tables.across(parts) if len(parts) > 1 else {}
    if not scores:
        return {}
    data = [name for name in parts if any(name in by_data for by_data in scores.values())]
    return {"drawing": effects.across(scores, data, "across"), "sheet": tables.across_sheet(scores, data)}


def _data_set(name: str, groups: Groups, baseline: str, several: bool, file: str) -> dict[str, Any]:
    """The tables, pictures and sentences of one data set, one of several or the only one. `file`: how the names of its
    pictures begin."""
    runs = runs_of(groups)
    common_settings, differing_settings = provenance.settings(groups)
    fisher_rows = penalty_tables.fisher_rows(groups)
    one_task = len(runs[0].summary["fid_matrix"]) == 1
    paired = tables.several(runs)
    with_state = any(run.lam is not None or run.summary.get("state_bytes") for run in runs)
    return {
        "name": name,
        "prefix": f"{name}: " if several else "",
        "found": findings.found(groups, baseline),
        "conclusions": findings.conclusions(groups, baseline),
        "headline": tables.headline(groups),
        "by_seed": tables.by_seed(groups),
        "forest": effects.forest(groups, baseline, file + "forest") if paired else None,
        "differences": tables.differences(groups, baseline) if paired else None,
        "average_curves": None if one_task else charts.average_curves(groups, file + "average_fid"),
        "fid_matrices": charts.fid_matrices(groups, file + "fid_matrices"),
        "task_curves": charts.task_curves(groups, file + "task_fid"),
        "final_samples": charts.final_samples(groups, file + "samples"),
        "sample_grids": charts.sample_grids(groups),
        "lam_sweep": effects.lam_sweep(groups, file + "lam_sweep"),
        "costs": penalty_tables.costs(groups) if with_state else None,
        "fisher_rows": fisher_rows,
        "fisher_warning": penalty_tables.warning(fisher_rows),
        "fisher_warnings": penalty_tables.warnings(fisher_rows),
        "fisher_drawing": effects.fisher(fisher_rows, file + "fisher"),
        "fisher": penalty_tables.fisher(fisher_rows),
        "summary": runs[0].summary,
        "held_out": tables.held_out(runs[0]),
        "compare_command": provenance.compare_command(groups),
        "commands": [provenance.command(run) for run in runs],
        "recipes": provenance.methods(groups),
        "differing_settings": differing_settings,
        "common_settings": common_settings,
    }


def limitations(parts: Collection[Groups]) -> list[str]:
    """Limits of what can be concluded, which depend on how many runs of each kind there are."""
    runs = [run for groups in parts for run in runs_of(groups)]
    counts = sorted({len(group) for groups in parts for group in groups.values()})
    fewest = counts[0]
    seed_range = f"{fewest}" if len(counts) == 1 else f"{fewest} to {counts[-1]}"
    smallest_p = (
        f"With {fewest} seeds no sign-flip p value can be below {2 / 2**fewest:.2g}. "
        if 1 < fewest <= seeds.EXACT_SEEDS
        else ""
    )
    sentences = [
        "One seed of each method: any difference may be chance. Run several seeds before concluding anything."
        if counts == [1]
        else f"The replicate is the seed, and there are {seed_range} a method; tasks within a run are not independent "
        f"and are not counted. {smallest_p}Intervals assume that differences over seeds are roughly normal.",
        "Intervals cover seeds: initial weights, batches, noise and evaluation latents. They do not cover another data "
        "set, model, length of training, class order or extractor for FID.",
        "FIDs from as many images as named above are biased upwards, and those on another network's features than "
        "Inception's are not those of papers.",
        "Whoever picks the best of many methods or strengths on these numbers will find it less good on new seeds.",
    ]
    if {run.settings["held_out"] for run in runs} == {"validation"}:
        sentences.append("All evaluations used validation images, for choosing; they are not test results.")
    if len({run.config.get("device") for run in runs}) > 1:
        sentences.append(
            "Runs were made on different devices: their times do not compare, and their numbers are not paired to the "
            "last bit."
        )
    return sentences
