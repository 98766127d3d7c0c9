"""The HTML page: one file with everything in it, that needs no network and no script. Numbers come from `tables.py`,
pictures from `charts.py`; here they are put in order, escaped, and told about."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Collection, Mapping
from html import escape

from crl_diffusion.reporting import charts, effects, penalty_tables, provenance, seeds, tables
from crl_diffusion.reporting.canvas import Drawing
from crl_diffusion.reporting.page_template import PAGE
from crl_diffusion.reporting.runs import Groups, runs_of
from crl_diffusion.reporting.tables import Sheet

SCREEN = 0.7  # screen pixels for a picture's pixel: text is as large in each of them
NAMED = 6  # methods up to which a sentence names them
OPEN_GRIDS = 4  # methods up to which all sample grids are shown unfolded

FISHER_WORDS = (
    "κ is the squared length of the mean gradient over the mean squared length of a sample's gradient: near 0, "
    "samples pull in different ways and their mean says little. ρ is the share of the trace of the Fisher matrix F "
    "that lies along the direction kept: how much of F a penalty on that direction can hold. Signal share is the "
    "expected squared cosine between the true mean gradient and its estimate, 1 without sampling noise; samples "
    "needed is the number that would make it 0.9. Unbiased estimates can fall below 0 where the mean gradient is no "
    "more than noise."
)


class _Contents:
    """Sections as they are written, and the list of them for the top of the page."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.drawings: list[Drawing] = []

    def heading(self, title: str) -> None:
        anchor = f"section-{len(self.links) + 1}"
        self.links.append((anchor, title))
        self.parts.append(f'<h2 id="{anchor}">{escape(title)}</h2>')

    def add(self, *parts: str) -> None:
        self.parts += parts

    def draw(self, drawing: Drawing | None, otherwise: str = "") -> None:
        """A picture or, where there is none, why."""
        if drawing is None:
            self.add(paragraph(otherwise) if otherwise else "")
            return
        self.drawings.append(drawing)
        self.add(figure(drawing))


def paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</p>"


def figure(drawing: Drawing) -> str:
    source = base64.b64encode(drawing.png).decode("ascii")
    width, height = (round(pixels * SCREEN) for pixels in struct.unpack(">II", drawing.png[16:24]))
    size = f'width="{width}" height="{height}"'
    image = f'<img src="data:image/png;base64,{source}" {size} alt="{escape(drawing.alt)}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{escape(drawing.caption)}</figcaption></figure>'


def sheet(table: Sheet, marked: str | None = None, text: bool = False) -> str:
    """A table that scrolls if it is wide; `marked` is the baseline's row, `text` sets cells to the left."""

    def cell(content: str, name: bool) -> str:
        first, *rest = content.split("\n")
        shown = re.sub("([+:,])", r"\1<wbr>", escape(first)) if name else escape(first)
        more = "".join(f"<br><small>{escape(line)}</small>" for line in rest)
        return f"<td>{shown}{more}</td>"

    kept = (re.sub("(?<=[÷−]) | (?=[−↓↑])", "\N{NO-BREAK SPACE}", title) for title in table.head)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in kept)
    rows = []
    for row in table.body:
        kind = ' class="baseline"' if marked is not None and row[0] == marked else ""
        rows.append(f"<tr{kind}>{''.join(cell(content, i == 0) for i, content in enumerate(row))}</tr>")
    kind = ' class="text"' if text else ""
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        f"{paragraph(table.caption, 'note')}"
    )


def folded(title: str, content: str, shown: bool = False) -> str:
    return f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>{content}</details>"


def render(parts: Mapping[str, Groups], baseline: str) -> tuple[str, list[Drawing]]:
    """The page of all runs by data set, and the pictures on it."""
    page = _Contents()
    runs = [run for groups in parts.values() for run in runs_of(groups)]
    several = len(parts) > 1
    if several:
        _across(page, parts)
    for data, groups in parts.items():
        _data_set(page, data if several else "", groups, baseline)
    page.heading("How it was made")
    for data, groups in parts.items():
        if several:
            page.add(f"<h3>{escape(data)}</h3>")
        _made(page, groups)
    page.add("<h3>Environment</h3>", sheet(provenance.environment(runs), text=True))
    page.heading("What this page does not show")
    limits = "\n".join(f"<li>{escape(text)}</li>" for text in not_shown(parts.values()))
    page.add(f"<ul>\n{limits}\n</ul>")

    title = f"Continual diffusion: {', '.join(parts)}"
    methods, count = len({run.method for run in runs}), len({run.seed for run in runs})
    seeds_said = f"{count} seeds" if count > 1 else f"seed {runs[0].seed} only"
    lead = f"{len(runs)} finished run{'s' * (len(runs) != 1)}: {methods} method{'s' * (methods != 1)}, {seeds_said}."
    links = "\n".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in page.links)
    top = [f"<h1>{escape(title)}</h1>", paragraph(lead)]
    for data, groups in parts.items():
        top.append(paragraph((f"{data}: " if several else "") + in_short(groups, baseline)))
    nav = f'<nav aria-label="Contents"><ul>\n{links}\n</ul></nav>'
    body = "\n".join(part for part in [*top, nav, *page.parts] if part)
    return PAGE.substitute(title=escape(title), body=body), page.drawings


def in_short(groups: Groups, baseline: str) -> str:
    """What the paired differences say, in a sentence or two, and no more than they say."""
    if baseline not in groups:
        return (
            f"No run here is of the baseline {baseline!r}, so there are no differences; name another with --baseline."
        )
    if not tables.several(runs_of(groups)):
        return "One seed: every difference between methods may be chance, and none is claimed."
    base, better, worse, unsure, single = tables.values(groups[baseline], "average_fid"), [], [], [], []
    for name, group in groups.items():
        found = list(seeds.paired(tables.values(group, "average_fid"), base).values())
        if name == baseline or not found:
            continue
        e = seeds.estimate(found)
        if e.low is None or e.high is None:
            single.append(name)
        else:
            (better if e.high < 0 else worse if e.low > 0 else unsure).append(name)
    said = [
        f"{title}: {', '.join(names) if len(names) <= NAMED else f'{len(names)} methods'}."
        for title, names in (
            (f"Average FID below {baseline}'s, the 95 % interval of the difference wholly below zero", better),
            (f"Average FID above {baseline}'s, the interval wholly above zero", worse),
            ("Not told apart by these seeds", unsure),
            ("Fewer than two seeds in common", single),
        )
        if names
    ]
    return " ".join(said)


def _data_set(page: _Contents, data: str, groups: Groups, baseline: str) -> None:
    """All that is told of one data set; `data` is its name where there are several."""
    before, file = (f"{data}: ", f"{data}-") if data else ("", "")

    page.heading(before + "Results")
    page.add(sheet(tables.headline(groups), baseline))
    compared = tables.differences(groups, baseline)
    page.add(folded("Every value by seed", sheet(tables.by_seed(groups))))
    page.add(f"<h3>Differences to {escape(baseline)}, paired by seed</h3>")
    page.draw(effects.forest(groups, baseline, file + "forest"), f"No other method to compare with {baseline} here.")
    if compared is not None:
        page.add(sheet(compared))

    page.heading(before + "FID after each task")
    page.draw(charts.average_curves(groups, file + "average_fid"))
    page.draw(charts.fid_matrices(groups, file + "fid_matrices"))
    page.draw(charts.task_curves(groups, file + "task_fid"), "All of these runs were evaluated only at the end.")

    page.heading(before + "What the methods draw")
    page.draw(charts.final_samples(groups, file + "samples"), "These run folders keep no images.")
    grids = charts.sample_grids(groups)
    for name, grid in grids.items():
        page.add(folded(f"After each task: {name}", figure(grid), len(grids) <= OPEN_GRIDS))

    sweep = effects.lam_sweep(groups, file + "lam_sweep")
    page.heading(before + "Strength of the penalty")
    page.draw(sweep, "No method here was run with more than one lam.")

    page.heading(before + "Cost of the penalty")
    page.add(sheet(penalty_tables.costs(groups)))

    page.heading(before + "Fisher matrices")
    rows = penalty_tables.fisher_rows(groups)
    if not rows:
        page.add(paragraph("No method here has a penalty."))
        return
    page.add(paragraph(FISHER_WORDS))
    warned = penalty_tables.warnings(rows)
    if warned:
        items = "".join(f"<li>{escape(text)}</li>" for text in warned)
        details = folded("Which, and how many samples would do", f"<ul>{items}</ul>", len(warned) <= 6)
        page.add(f'<div class="warning">{paragraph(penalty_tables.warning(rows))}{details}</div>')
    page.draw(effects.fisher(rows, file + "fisher"), "Diagonal Fisher matrices have no directions to tell of.")
    page.add(folded("Every task's Fisher matrix", sheet(penalty_tables.fisher(rows)), len(rows) <= 2))


def _across(page: _Contents, parts: Mapping[str, Groups]) -> None:
    page.heading("Across data sets")
    scores = tables.across(parts)
    if not scores:
        why = (
            "FIDs of different data sets do not compare, and a score between joint training and fine-tuning needs runs "
            "of both, with the seeds of the other methods: there are none."
        )
        page.add(paragraph(why))
        return
    named = [data for data in parts if any(data in found for found in scores.values())]
    page.draw(effects.across(scores, named, "across"))
    page.add(sheet(tables.across_sheet(scores, named)))


def _made(page: _Contents, groups: Groups) -> None:
    runs = runs_of(groups)
    m = runs[0].summary
    measured = (
        f"FIDs are measured on the features of {m['extractor']}, from {m['samples_per_task']} images drawn for each "
        f"task by {m['sampler']}, against {tables.held_out(runs[0])} of that task; accuracies by "
        f"{m.get('classifier', m['extractor'])}. They compare methods within this data set and this extractor, and "
        "nothing else. Runs of one seed see the same batches, noise, timesteps, class order and evaluation latents."
    )
    page.add(paragraph(measured))
    together = provenance.compare_command(groups)
    if together:
        page.add(paragraph("One command makes these runs again:"), f"<pre>{escape(together)}</pre>")
    commands = "\n".join(provenance.command(run) for run in runs)
    page.add(folded(f"The command of each of {len(runs)} runs", f"<pre>{escape(commands)}</pre>", together is None))
    page.add(folded("Methods as composed", sheet(provenance.methods(groups), text=True)))
    common, apart = provenance.settings(groups)
    if apart is not None:
        page.add(sheet(apart, text=True))
    page.add(folded("Configuration", sheet(common, text=True)))


def not_shown(parts: Collection[Groups]) -> list[str]:
    """Limits of what can be concluded, from how many runs there are of what."""
    runs = [run for groups in parts for run in runs_of(groups)]
    counts = sorted({len(group) for groups in parts for group in groups.values()})
    said = [f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"]
    n = counts[0]
    smallest = (
        f"With {n} seeds no sign-flip p value can be below {2 / 2**n:.2g}. " if 1 < n <= seeds.EXACT_SEEDS else ""
    )
    found = [
        "One seed of each method: any difference may be chance. Run several seeds before concluding anything."
        if counts == [1]
        else f"The replicate is the seed, and there are {said[0]} a method; tasks within a run are not independent and "
        f"are not counted. {smallest}Intervals assume that differences over seeds are roughly normal.",
        "Intervals cover seeds: initial weights, batches, noise and evaluation latents. They do not cover another data "
        "set, model, length of training, class order or extractor for FID.",
        "FIDs from as many images as named above are biased upwards, and those on another network's features than "
        "Inception's are not those of papers.",
        "Whoever picks the best of many methods or strengths on these numbers will find it less good on new seeds.",
    ]
    if {run.settings["held_out"] for run in runs} == {"validation"}:
        found.append("All evaluations used validation images, for choosing; they are not test results.")
    if len({run.config.get("device") for run in runs}) > 1:
        found.append(
            "Runs were made on different devices: their times do not compare, and their numbers are not paired to the "
            "last bit."
        )
    return found
