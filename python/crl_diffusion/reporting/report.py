"""The files of a report: tables, pictures, one HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType

from crl_diffusion.errors import OptionError
from crl_diffusion.files import write_json, write_text
from crl_diffusion.reporting.runs import Groups, by_data, comparable, find, label_among, runs_of


def write(
    folders: Sequence[Path], out: Path, baseline: str, order: Sequence[str] = ()
) -> tuple[RenderableType, list[Path]]:
    """All finished runs as report.html, comparison.md, comparison.json and pictures in `out`; returns the table for a
    terminal and the files."""
    from crl_diffusion.reporting import page, tables

    runs, _ = find(folders)
    if not runs:
        where = ", ".join(repr(str(folder)) for folder in folders)
        raise OptionError(f"no finished run in {where}; give folders that `train` or `compare` has written")
    parts, baseline = by_data(runs, order), label_among(runs, baseline)
    for groups in parts.values():
        comparable(groups)
    out.mkdir(parents=True, exist_ok=True)
    html, drawn = page.render(parts, baseline)
    paths = [drawing.save(out) for drawing in drawn]

    for name, text in (("comparison.md", markdown(parts, baseline)), ("report.html", html)):
        write_text(out / name, text)
    captions = [tables.caption(runs_of(groups)) for groups in parts.values()]
    ordered = [run for groups in parts.values() for run in runs_of(groups)]
    values = [
        {**run.summary, "label": run.label, "data": run.data, "folder": os.path.relpath(run.path, out)}
        for run in ordered
    ]
    write_json(out / "comparison.json", {"caption": " ".join(captions), "runs": values})
    paths += [out / "comparison.md", out / "comparison.json", out / "report.html"]
    return tables.for_terminal(parts, baseline), paths


def markdown(parts: Mapping[str, Groups], baseline: str) -> str:
    """What was found, what the methods are, and the tables of results."""
    from crl_diffusion.reporting import findings, tables

    prefix = {name: f"{name}: " if len(parts) > 1 else "" for name in parts}
    found = [prefix[name] + findings.found(groups, baseline) for name, groups in parts.items()]
    methods = {name: text for groups in parts.values() for name, text in findings.methods(groups).items()}
    sentences = [
        *("## What was found", *map(tables.plain, found), "## The methods"),
        "\n".join(f"- **{tables.plain(name)}**: {tables.plain(text)}" for name, text in methods.items()),
    ]
    sheets = [
        f"## {prefix[name]}Results\n\n{tables.markdown_sheets(groups, baseline)}" for name, groups in parts.items()
    ]
    return "\n\n".join(sentences) + "\n\n" + "\n".join(sheets)
