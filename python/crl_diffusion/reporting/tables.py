"""Tables of results, from finished runs: headline, paired differences, values by seed, scores across data sets.

A `Sheet` is plain text: it becomes Markdown, a table in a terminal, or HTML. A line break in a cell sets its second
part off as less important.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from crl_diffusion.errors import visible
from crl_diffusion.reporting import seeds
from crl_diffusion.reporting.runs import Finished, Groups, label_among, runs_of
from crl_diffusion.run_folder.class_names import ClassNames, classes_by_task

NONE = "–"
MINUS = "−"
NAMED_CLASSES = 24  # classes up to which a caption names them


class Sheet(NamedTuple):
    """A table: headings, rows, and a caption that defines its numbers."""

    head: list[str]
    body: list[list[str]]
    caption: str


class Column(NamedTuple):
    title: str
    key: str
    digits: int

    @property
    def digits_of_differences(self) -> int:
        return max(self.digits, 2)


AVERAGE = Column("average FID ↓", "average_fid", 1)
LEARNT = Column("FID when learnt ↓", "fid_when_learnt", 1)
FORGETTING = Column("forgetting, ÷ (T − 1) ↓", "forgetting", 1)
ACCURACY = Column("conditional accuracy ↑", "accuracy", 3)
TASK_1_ACCURACY = Column("task 1 accuracy ↑", "accuracy_task_1", 3)
COLUMNS = (
    AVERAGE,
    LEARNT,
    FORGETTING,
    Column("forgetting, ÷ T ↓", "forgetting_divisor_t", 1),
    Column("incremental average FID ↓", "incremental_average_fid", 1),
    ACCURACY,
    TASK_1_ACCURACY,
    Column("accuracy forgetting ↓", "accuracy_forgetting", 3),
    Column("class-histogram KL ↓", "class_kl", 3),
)
COSTS = (Column("penalty ms/step", "penalty_ms", 2), Column("state bytes", "state_bytes", 0))
TERMINAL = (AVERAGE, FORGETTING, ACCURACY, TASK_1_ACCURACY, *COSTS)
HEADLINE = (AVERAGE, FORGETTING)  # where there is room for two
COMPARED = (AVERAGE, LEARNT, FORGETTING, ACCURACY)  # by paired differences


def number(value: float, digits: int, plus: bool = False) -> str:
    """1,234.5 with a real minus sign. What rounds to zero has a sign only with `plus`, and 0 itself has none."""
    text = f"{value:{'+' if plus else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0 and (not plus or value == 0):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def values(runs: Sequence[Finished], key: str) -> dict[int, float]:
    """One number a seed, of the runs that have it."""
    return {run.seed: float(run.summary[key]) for run in runs if run.summary.get(key) is not None}


def present(runs: Sequence[Finished], columns: Sequence[Column]) -> list[Column]:
    """The columns that at least one run has a value for."""
    return [column for column in columns if values(runs, column.key)]


def cell(by_seed: Mapping[int, float], digits: int, interval: bool = True, plus: bool = False) -> str:
    """mean ± standard deviation and, below, the 95 % interval."""
    if not by_seed:
        return NONE
    estimate = seeds.estimate(list(by_seed.values()))
    text = number(estimate.mean, digits, plus)
    if estimate.std is None or estimate.low is None or estimate.high is None:
        return text
    text += f" ± {number(estimate.std, digits)}"
    low, high = number(estimate.low, digits, plus), number(estimate.high, digits, plus)
    return text + f"\n[{low}, {high}]" if interval else text


def several(runs: Sequence[Finished]) -> bool:
    """Whether some method has more than one seed."""
    return len({run.seed for run in runs}) > 1


def headline(groups: Groups) -> Sheet:
    """Methods x metrics: mean, standard deviation and interval over seeds."""
    runs = runs_of(groups)
    columns = present(runs, COLUMNS)
    body = []
    for name, group in groups.items():
        cells = [cell(values(group, column.key), column.digits) for column in columns]
        body.append([name, str(len(group)), *cells])
    text = caption(runs) + tasks_in_words(runs[0])
    return Sheet(["method", "seeds", *(column.title for column in columns)], body, text)


def tasks_in_words(run: Finished) -> str:
    """` Task 1: airplane, automobile; task 2: ...`: the classes of each task, if they have names and are not too many
    for a sentence."""
    names = ClassNames.recorded(run.record)
    tasks = classes_by_task(run.record) if names.names else []
    if not 0 < sum(map(len, tasks)) <= NAMED_CLASSES:
        return ""
    parts = [f"task {i}: {', '.join(map(names.of, classes))}" for i, classes in enumerate(tasks, start=1)]
    return f" T{'; '.join(parts)[1:]}."


def caption(runs: Sequence[Finished]) -> str:
    """How the numbers of one data set were measured."""
    settings, summary = runs[0].settings, runs[0].summary
    length = f"{settings['epochs']} epochs" if settings["epochs"] else f"{settings['steps']} steps"
    text = (
        f"{runs[0].data}, {settings['image_size']} pixels, {_many(settings['tasks'], 'task')} of "
        f"{_many(settings['classes_per_task'], 'class')}, {length} a task. FID on the features of "
        f"{summary['extractor']}, {summary['samples_per_task']} images a task, {summary['sampler']}, against "
        f"{held_out(runs[0])} of the task. T is the number of tasks; forgetting is the sum over the tasks before the "
        "last of FID at the end less FID when learnt, divided by T − 1 (mean over these tasks) or by T (as the rank-1 "
        "paper has it). Conditional accuracy: share of drawn images that "
        f"{summary.get('classifier', summary['extractor'])} takes for their label. ↓ lower is better, ↑ higher is "
        "better."
    )
    if several(runs):
        return text + " ± is the standard deviation over seeds; brackets are 95 % t intervals of the mean."
    return text + " One seed: differences may be chance."


def held_out(run: Finished) -> str:
    """The real images of an FID: their number, if it was recorded, and the split that they come from."""
    counts = run.summary.get("held_out_images") or []
    counts = [count for count in (counts if isinstance(counts, list) else [counts]) if count]
    size = " to ".join(map(str, dict.fromkeys((min(counts), max(counts))))) + " " if counts else "the "
    return f"{size}held-out {run.settings['held_out']} images"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def differences(groups: Groups, baseline: str) -> Sheet | None:
    """Each method minus the baseline, paired by seed; None without a baseline or another method."""
    if baseline not in groups or len(groups) < 2:
        return None
    head = ["method", "paired seeds", *(f"{column.title[:-2]}, difference" for column in COMPARED)]
    body = []
    for name, group in groups.items():
        if name == baseline:
            continue
        row = [name]
        for column in COMPARED:
            paired = seeds.paired(values(group, column.key), values(groups[baseline], column.key))
            test = seeds.sign_flip(list(paired.values()))
            if len(row) == 1:
                row.append(str(len(paired)) + (f"\np ≥ {test.smallest:.3g}" if test else ""))
            row.append(cell(paired, column.digits_of_differences, plus=True) + (f", p {test.p:.3g}" if test else ""))
        body.append(row)
    text = (
        f"Method less {baseline}, seed by seed, then mean ± standard deviation and 95 % t interval. Average FID is FID "
        f"when learnt plus forgetting times (T − 1)/T. Better than {baseline}: FIDs and forgetting below 0, accuracy "
        "above 0. p, of an exact two-sided sign-flip test: the share of all 2ⁿ choices of signs of the n differences "
        "with a mean at least as far from zero; with n seeds it cannot be below 2/2ⁿ. Intervals and p values hold for "
        "one comparison each: among many methods some differ by chance (one in twenty intervals misses its value)."
    )
    return Sheet(head, body, text)


def by_seed(groups: Groups) -> Sheet:
    """Every number of every run: the columns above, then any other number in a summary."""
    runs = runs_of(groups)
    known_keys = [column.key for column in (*COLUMNS, *COSTS)]
    other_keys = dict.fromkeys(
        key
        for run in runs
        for key, value in run.summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in (*known_keys, "seed")
    )
    alike = len(runs) > 1
    same = [key for key in other_keys if alike and len({run.summary.get(key) for run in runs}) == 1]
    others = [Column(key.replace("_", " "), key, 0) for key in other_keys if key not in same]
    columns = present(runs, [*COLUMNS, *COSTS, *others])
    body = []
    for name, group in groups.items():
        for run in group:
            row = [run.summary.get(column.key) for column in columns]
            body.append([name, str(run.seed), *(NONE if x is None else f"{x:.7g}".replace("-", MINUS) for x in row)])
    text = "One row a run, as in summary.json."
    if same:
        text += (
            " In all runs: " + ", ".join(f"{key.replace('_', ' ')} {runs[0].summary[key]:.7g}" for key in same) + "."
        )
    return Sheet(["method", "seed", *(column.title for column in columns)], body, text)


# Across data sets


def across(parts: Mapping[str, Groups]) -> dict[str, dict[str, dict[int, float]]]:
    """For each method and data set, (FID - joint) / (fine-tune - joint) by seed, where both references exist."""
    result: dict[str, dict[str, dict[int, float]]] = {}
    for data, groups in parts.items():
        references = [label_among(runs_of(groups), name) for name in ("joint", "fine-tune")]
        joint, fine_tune = (values(groups.get(name, []), AVERAGE.key) for name in references)
        for name, group in groups.items():
            scores = seeds.normalised(values(group, AVERAGE.key), joint, fine_tune)
            if scores and name not in references:
                result.setdefault(name, {})[data] = scores
    return result


def across_sheet(scores: Mapping[str, Mapping[str, Mapping[int, float]]], data_sets: Sequence[str]) -> Sheet:
    """Normalised scores, methods x data sets, and their mean over data sets, seed by seed."""
    body = []
    for name, by_data in scores.items():
        row = [name, *(cell(by_data.get(data, {}), 3) for data in data_sets)]
        common = set.intersection(*(set(by_data.get(data, {})) for data in data_sets))
        means = {seed: float(np.mean([by_data[data][seed] for data in data_sets])) for seed in sorted(common)}
        body.append([*row, cell(means, 3)])
    text = (
        "(average FID − joint) / (fine-tune − joint), each with the references of its own seed: 0 is as good as joint "
        "training, 1 as bad as fine-tuning, lower is better. Mean ± standard deviation over seeds and 95 % t interval. "
        "Last column: mean over data sets of each seed that all of them have."
    )
    return Sheet(["method", *data_sets, "mean of the data sets"], body, text)


# Markdown and the terminal


MARKS = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|", "\n": " "})


def plain(text: str) -> str:
    """Text in one line of Markdown, without tags, links or cells of a table in it."""
    return visible(text).translate(MARKS).replace("](", "]\\(")


def markdown(sheet: Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(plain, cells)) + " |"

    rule = "|---" + "|---:" * (len(sheet.head) - 1) + "|"
    return "\n".join([line(sheet.head), rule, *map(line, sheet.body), "", plain(sheet.caption), ""])


def markdown_sheets(groups: Groups, baseline: str) -> str:
    """Headline and differences of one data set."""
    compared = differences(groups, baseline) if several(runs_of(groups)) else None
    return "\n".join(markdown(sheet) for sheet in (headline(groups), compared) if sheet is not None)


def for_terminal(parts: Mapping[str, Groups], baseline: str) -> RenderableType:
    """Tables of the columns that fit a terminal."""
    rendered = []
    for groups in parts.values():
        runs = runs_of(groups)
        columns = present(runs, TERMINAL)
        compared = baseline in groups and several(runs) and len(groups) > 1
        head = ["method", *(column.title for column in columns)]
        head += [f"{column.title.split(',')[0].rstrip(' ↓')} less {baseline}'s" for column in HEADLINE] * compared
        body = []
        for name, group in groups.items():
            row = [name]
            for column in columns:
                by_seed = values(group, column.key)
                noisy = column not in COSTS  # time and size are properties of the method, not observations of it
                if noisy or not by_seed:
                    row.append(cell(by_seed, column.digits, interval=False))
                else:
                    row.append(number(float(np.mean([*by_seed.values()])), column.digits))
            if compared:
                base = groups[baseline]
                for column in HEADLINE:
                    by_seed = seeds.paired(values(group, column.key), values(base, column.key))
                    row.append(NONE if name == baseline else cell(by_seed, column.digits_of_differences, plus=True))
            body.append(row)
        rendered.append(rich_table(head, body, caption(runs)))
    return Group(*rendered)


def rich_table(head: Sequence[str], body: Sequence[Sequence[Any]], text: str) -> Table:
    """Its texts are shown as they are: they may have come from files, and nothing in them is markup."""
    result = Table(caption=Text(visible(text)), caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(head):
        result.add_column(Text(visible(title)), justify="left" if i == 0 else "right", overflow="fold")
    for row in body:
        result.add_row(*(Text(visible(str(x))) for x in row))
    return result
