"""Reports from run folders: the page, its numbers, and which runs may stand side by side."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crl_diffusion import cli, errors
from crl_diffusion.cli import options, parser
from crl_diffusion.comparison import cells
from crl_diffusion.comparison.cells import folder_name
from crl_diffusion.config.settings import RunConfig
from crl_diffusion.config.spelling import in_order
from crl_diffusion.reporting import (
    canvas,
    charts,
    effects,
    findings,
    penalty_tables,
    provenance,
    report,
    run_pictures,
    samples,
    seeds,
    tables,
)
from crl_diffusion.reporting.runs import Finished, comparable, find, grouped, label_among
from crl_diffusion.run_folder.readers import sha256_of
from helpers.run_folders import fabricate
from helpers.trainer_runs import SHORT, crl_diffusion
from helpers.trainer_runs import options as cli_options
from matplotlib import pyplot as plt

LONG = "gd+bands16:top,slopes,gradient,lam=60"
VOID = {"meta", "img", "br", "wbr"}
BEGINNING = ["What was found", "The methods"]
SECTIONS = ("Results", "FID after each task", "What the methods draw", "Strength of the penalty")
SECTIONS += ("Costs", "Fisher matrices", "How it was made", "What this page does not show")


class Page(HTMLParser):
    """Text, headings, table rows and pictures of a page; fails on tags that do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.captions: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append({**attributes, "in": " ".join(self.open)})
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action", "data") and value]
        self.ids += [value for key, value in attrs if key == "id" and value]
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for parent, texts in (("figcaption", self.captions), ("h2", self.headings)):
            if tag == parent:
                texts.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += text
        if "h2" in self.open:
            self.headings[-1] += text
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += text.replace("\N{NO-BREAK SPACE}", " ")
        self.text += text


def fabricate_all(root: Path, methods: dict[str, float], seeds: tuple[int, ...], **settings: Any) -> Path:
    for method, level in methods.items():
        for seed in seeds:
            fabricate(root / folder_name(method, seed), method, seed, level, **settings)
    return root


METHODS = {"fine-tune": 80.0, "joint": 3.0, "gd": 10.0, "gd+rank1": 9.0, "gd+rank1:lam=60": 9.5, LONG: 8.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six methods, three seeds."""
    return fabricate_all(tmp_path_factory.mktemp("runs"), METHODS, (0, 1, 4), tasks=3, classes_per_task=1)


@pytest.fixture(scope="module")
def summaries(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(runs.glob("*/summary.json"))]


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their report."""
    out = tmp_path_factory.mktemp("report")
    report.write([runs], out, "gd", ("fine-tune", "joint", "gd"))
    return out


@pytest.fixture(scope="module")
def report_page(written: Path) -> Page:
    return Page(written / "report.html")


def test_the_page_loads_nothing_from_outside_it(report_page: Page) -> None:
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in report_page.links)
    assert {link[1:] for link in report_page.links if link.startswith("#")} == set(report_page.ids)
    assert not re.search(r"url\(|@import|https?://", report_page.html)


def test_every_picture_has_a_caption_and_a_description(report_page: Page) -> None:
    assert len(report_page.images) == len(report_page.captions) >= 7
    for image, caption in zip(report_page.images, report_page.captions, strict=True):
        assert len(image["alt"] or "") > 20
        assert "figure" in (image["in"] or "")
        assert len(caption) > 40


def test_the_page_has_all_sections(report_page: Page) -> None:
    assert report_page.headings == [*BEGINNING, *SECTIONS]


def test_numbers_on_the_page_are_those_of_the_summaries(summaries: list[dict[str, Any]], report_page: Page) -> None:
    columns = {column.title: column.key for column in (*tables.COLUMNS, *tables.COSTS)}
    head = next(row for row in report_page.rows if row[:2] == ["method", "seed"])
    rows = [row for row in report_page.rows if len(row) == len(head)]
    for summary in summaries:
        row = next(row for row in rows if row[:2] == [summary["method"], str(summary["seed"])])
        for title, text in zip(head, row, strict=True):
            if (key := columns.get(title)) is not None:
                value = summary[key]
                assert text == tables.NONE if value is None else float(text.replace("−", "-")) == pytest.approx(value)

    # Mean, standard deviation and interval over seeds, by numpy and scipy.
    fids = [summary["average_fid"] for summary in summaries if summary["method"] == LONG]
    estimate = seeds.estimate(fids)
    row = next(row for row in report_page.rows if row[:2] == [LONG, "3"])
    assert row[2] == f"{np.mean(fids):.1f} ± {np.std(fids, ddof=1):.1f}[{estimate.low:.1f}, {estimate.high:.1f}]"
    # Both forgettings, by name.
    heading = next(row for row in report_page.rows if row[:2] == ["method", "seeds"])
    r = [summary["fid_matrix"] for summary in summaries if summary["method"] == LONG]
    total = np.mean([m[2][0] - m[0][0] + m[2][1] - m[1][1] for m in r])
    for divisor, title in ((2, "forgetting, ÷ (T − 1) ↓"), (3, "forgetting, ÷ T ↓")):
        assert row[heading.index(title)].startswith(f"{total / divisor:.1f} ")


def test_differences_are_paired_and_state_the_smallest_p_value(
    summaries: list[dict[str, Any]], report_page: Page
) -> None:
    row = next(row for row in report_page.rows if row[0] == LONG and "p ≥" in row[1])
    values = {(summary["method"], summary["seed"]): summary["average_fid"] for summary in summaries}
    estimate = seeds.estimate([values[LONG, seed] - values["gd", seed] for seed in (0, 1, 4)])
    assert estimate.low is not None
    assert row[1] == "3p ≥ 0.25"
    assert row[2].startswith(f"{estimate.mean:+.2f} ± {estimate.std:.2f}[{estimate.low:+.2f}, ".replace("-", "−"))
    assert row[2].endswith("], p 0.25")


def test_a_difference_that_rounds_to_zero_keeps_its_sign() -> None:
    assert [tables.number(x, 2, plus=True) for x in (-0.002, 0.002, 0.0, -0.0)] == ["−0.00", "+0.00", "0.00", "0.00"]
    assert [tables.number(x, 1) for x in (-0.04, 0.04, -1234.5)] == ["0.0", "0.0", "−1,234.5"]


def test_markdown_and_json_have_the_same_numbers(written: Path) -> None:
    text = (written / "comparison.md").read_text()
    saved = json.loads((written / "comparison.json").read_text())["runs"]
    assert len(saved) == 18
    assert all((written / run["folder"] / "summary.json").exists() for run in saved)
    mean = np.mean([run["average_fid"] for run in saved if run["method"] == "gd"])
    assert re.search(rf"^\| gd \| 3 \| {mean:.1f} ± ", text, re.MULTILINE)
    (difference,) = (line for line in text.splitlines() if line.startswith(f"| {LONG}") and "p ≥ 0.25" in line)
    assert difference.count(" | ") == 5


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "a", "gd", 0, tasks=2, classes_per_task=1)
    record = json.loads((folder / "config.json").read_text())
    record["environment"]["torch"] = "<b onload=x>&"
    record["git"] = {"commit": "0123abc", "dirty": True}
    (folder / "config.json").write_text(json.dumps(record))
    report.write([tmp_path], tmp_path / "out", "gd")
    report_page = Page(tmp_path / "out" / "report.html")
    assert ["torch", "<b onload=x>&"] in report_page.rows
    assert ["git commit", "0123abc"] in report_page.rows
    # One method, one seed: the page says that this shows nothing, and leaves out what would be empty.
    assert "nothing to compare it with" in report_page.html
    left_out = {"Strength of the penalty", "Costs", "Fisher matrices"}
    assert report_page.headings == [*BEGINNING, *(title for title in SECTIONS if title not in left_out)]
    assert "Differences to" not in report_page.html
    assert "±" not in "".join(text for row in report_page.rows for text in row)


def test_runs_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    for method in ("gd", "gd+rank1"):
        folder = fabricate(tmp_path / method, method, 0, tasks=2)
        record = json.loads((folder / "config.json").read_text())
        for name in ("class_order", "held_out", "classes_per_task", "epochs", "ema", "precision"):
            del record["run"][name]
        (folder / "config.json").write_text(json.dumps({"run": record["run"]}))
        summary = json.loads((folder / "summary.json").read_text())
        for name in ("incremental_average_fid", "forgetting_divisor_t"):
            del summary[name]
        (folder / "summary.json").write_text(json.dumps(summary))
        for images in (folder / "samples").iterdir():
            images.unlink()
    report.write([tmp_path], tmp_path / "out", "gd")
    report_page = Page(tmp_path / "out" / "report.html")
    assert "5 tasks" not in report_page.html
    assert "2 tasks of 2 classes" in report_page.html
    assert "What the methods draw" not in report_page.headings


def test_several_data_sets_have_sections_of_their_own_and_a_score(tmp_path: Path) -> None:
    methods = {"fine-tune": 80.0, "joint": 3.0, "gd": 10.0}
    small = {"tasks": 2, "classes_per_task": 1}
    fabricate_all(tmp_path / "a", methods, (0, 1, 2), **small)
    fabricate_all(tmp_path / "b", methods, (0, 1), data="cifar10", channels=3, image_size=8, **small)
    out = tmp_path / "out"
    report.write([tmp_path / "a", tmp_path / "b"], out, "gd")
    report_page = Page(out / "report.html")
    assert report_page.headings[:3] == [*BEGINNING, "Across data sets"]
    titles = [f"{data}: {title}" for data in ("digits", "cifar10") for title in SECTIONS[:3]]
    assert report_page.headings[3:9] == titles
    assert re.findall("<p>(digits|cifar10): gd has the lowest", report_page.html) == ["digits", "cifar10"]
    assert "\n\n## cifar10: Results\n\n| method | seeds |" in (out / "comparison.md").read_text()
    saved = {(r["data"], r["method"], r["seed"]): r for r in json.loads((out / "comparison.json").read_text())["runs"]}

    def score(data: str, seed: int) -> float:
        gd, joint, tuned = (saved[data, method, seed]["average_fid"] for method in ("gd", "joint", "fine-tune"))
        return float((gd - joint) / (tuned - joint))

    row = next(row for row in report_page.rows[1:] if row[0] == "gd" and len(row) == 4)
    assert row[1].startswith(f"{np.mean([score('digits', s) for s in (0, 1, 2)]):.3f} ± ")
    both = [(score("digits", s) + score("cifar10", s)) / 2 for s in (0, 1)]
    assert row[3].startswith(f"{np.mean(both):.3f} ± ")
    for name in ("digits-samples.png", "cifar10-samples.png", "across.png"):
        assert (out / name).stat().st_size > 1000


# Many methods, long names, many classes


def test_labels_of_many_methods_with_long_names_do_not_overlap() -> None:
    names = [f"replay+gd+bands16:random,slopes,gradient,lam={lam}" for lam in range(24)]
    figure, axis = plt.subplots(figsize=(10, effects.rows_height(names)), layout="constrained")
    effects.name_rows(axis, names)
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axis.get_yticklabels()]
    plt.close(figure)
    assert any("\n" in canvas.wrap(name, charts.NAME_WIDTH) for name in names)
    assert all(not a.overlaps(b) for a, b in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize("differences", [[-0.22, 0.02, 0.03, 98], [-6, -0.6, 0.5, 0.2, 130], [-0.4, 0.1, 0.2, 30]])
def test_ticks_of_one_panel_of_three_do_not_overlap(differences: list[float]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 2), layout="constrained")
    axes[1].plot(differences, range(len(differences)))
    assert effects.squeeze(axes[1], differences, [abs(difference) for difference in differences])
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes[1].get_xticklabels()]
    plt.close(figure)
    assert len(boxes) >= 4
    assert all(a.x1 + 2 < b.x0 for a, b in pairwise(sorted(boxes, key=lambda box: box.x0)))


def test_the_intervals_of_half_of_the_methods_lie_in_the_linear_part_of_an_axis() -> None:
    """Tiny differences of two methods do not push the interval of a third into the logarithmic part."""
    reach = [0.06, 0.07, 1.44, 2.49, 77.0]
    figure, axis = plt.subplots()
    assert effects.squeeze(axis, [-0.8, 0.02, 0.05, 69.0], reach)
    pixels = axis.transData.transform([(x, 0) for x in (0, 0.72, 1.44, 14.4)])[:, 0]
    assert pixels[2] - pixels[1] == pytest.approx(pixels[1] - pixels[0])
    assert pixels[3] - pixels[2] < 5 * (pixels[2] - pixels[0])  # a linear axis would make it 9 times as far
    assert not effects.squeeze(axis, [-0.8, 0.02], reach[:4])
    plt.close(figure)


def test_a_name_is_broken_between_its_parts_only() -> None:
    assert canvas.wrap(LONG, 20) == "gd+bands16:top,\nslopes,gradient,\nlam=60"
    assert canvas.wrap("gd", 20) == "gd"
    assert canvas.wrap("gd+rank1@ema=0.999", 12) == "gd+rank1@\nema=0.999"
    assert canvas.wrap(LONG, 20).replace("\n", "") == LONG


def test_images_keep_their_colours_and_classes_their_order() -> None:
    labels = np.array([7, 7, 2, 2])
    pixels = np.zeros((4, 3, 8, 8), dtype=np.uint8)
    pixels[:2, 0], pixels[2:, 2] = 255, 128  # class 7 is red, class 2 half blue
    classes = samples.Classes.learnt(labels, 2)
    assert classes.tasks == [[7], [2]]
    strip = samples.strip(pixels, labels, classes, 1, 2)
    assert strip[0, 0].tolist() == [1, 0, 0]
    assert strip[0, -1].tolist() == pytest.approx([0, 0, 128 / 255])
    assert samples.strip(pixels[:, :1], labels, classes, 1, 2)[0, 0].tolist() == [1, 1, 1]
    # A class that was not learnt yet has a grey field.
    assert len(np.unique(samples.strip(pixels[:2], labels[:2], classes, 1, 2)[:, -8:])) == 1


def test_of_many_classes_some_of_every_task_are_drawn() -> None:
    classes = samples.Classes.learnt(np.arange(1000), 20)
    assert len(classes.labels) == samples.DRAWN_CLASSES
    assert all(len(part) == 1 for part in classes.tasks)
    assert "20 of 1000 classes" in classes.note


# Sweeps, costs, Fisher matrices, commands


@pytest.fixture(scope="module")
def finished_runs(runs: Path) -> list[Finished]:
    return find([runs])[0]


def test_a_sweep_is_a_family_of_one_method_beside_its_replay_without_a_penalty(finished_runs: list[Finished]) -> None:
    groups = grouped(finished_runs)
    sweeps = effects.sweeps(groups)
    assert {family: list(lams) for family, lams in sweeps.items()} == {"gd+rank1": [20.0, 60.0]}
    assert effects.without_penalty(groups["gd+rank1"][0], groups) == "gd"
    assert effects.without_penalty(groups["gd+rank1"][0], {"gd+rank1": groups["gd+rank1"]}) is None
    averaged = grouped([run._replace(config={**run.config, "ema": 0.9}) for run in finished_runs])
    both = {**groups, **averaged}
    assert {family: list(lams) for family, lams in effects.sweeps(both).items()} == {
        "gd+rank1": [20.0, 60.0],
        "gd+rank1@ema=0.9": [20.0, 60.0],
    }
    assert effects.without_penalty(both["gd+rank1@ema=0.9"][0], both) == "gd@ema=0.9"
    assert effects.without_penalty(averaged["gd+rank1@ema=0.9"][0], groups) is None
    # Named methods first, each beside its other strengths; then the order of `finished_runs`.
    order = list(grouped(finished_runs, ("gd+rank1", "gd")))
    assert order == ["gd+rank1", "gd+rank1:lam=60", "gd", "fine-tune", LONG, "joint"]


def test_zero_and_infinite_lam_are_drawn_beside_the_others() -> None:
    assert effects.places([0.0, 3.0, 30.0, float("inf")]) == {0.0: 0.3, 3.0: 3.0, 30.0: 30.0, float("inf"): 300.0}


def test_the_cost_of_a_penalty_is_a_share_of_its_own_steps(finished_runs: list[Finished]) -> None:
    group = [run for run in finished_runs if run.method == LONG]
    rows = [json.loads(line) for run in group for line in (run.path / "timings.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "penalty_ms" in row]
    sheet = penalty_tables.costs(grouped(group))
    share = float(np.median([100 * row["penalty_ms"] / row["step_ms"] for row in rows]))
    assert sheet.body[0][4].split("\n")[0] == f"{share:.2f}"
    assert sheet.body[0][5].split("\n")[0] == "3.00"  # at the end of every task but the last
    assert sheet.body[0][6] == f"{5_737_424 / 2**20:.2f}"


def test_there_are_warnings_of_low_signal_share_and_low_rho() -> None:
    good = {"kind": "fisher", "task": 1, "rho": 0.2, "signal_share": 0.95, "num_samples": 100, "samples_needed": 90.0}
    weak = {**good, "task": 2, "rho": 0.04, "signal_share": 0.5, "samples_needed": 900.0}
    assert penalty_tables.warnings({"a": [[good]]}) == []
    assert penalty_tables.warnings({"a": [[good], [weak]], "diagonal": [[{"task": 1, "rho": None}]]}) == [
        "a: signal share below 0.8 in 1 of 2 estimates (smallest 0.5, after task 2; 100 samples, about 900 would do).",
        "a: ρ below 0.1 in 1 of 2 estimates (smallest 0.04, after task 2).",
    ]


def test_commands_on_the_page_repeat_the_configurations(finished_runs: list[Finished]) -> None:
    other = run("gd", 3, model="mlp", optimizer="sgd", lr_later=0.1, pool_latents="shared")
    for one in [*finished_runs, other]:
        parsed = parser.parse(shlex.split(provenance.command(one))[1:])
        assert isinstance(parsed, options.Train)
        wanted = RunConfig.from_json(one.config)
        assert all(getattr(parsed, name) == value for name, value in vars(wanted).items())
    compare_command = provenance.compare_command(grouped(finished_runs))
    assert compare_command is not None
    parsed = parser.parse(shlex.split(compare_command)[1:])
    assert isinstance(parsed, options.Compare)
    assert (set(parsed.methods), parsed.seeds) == ({run.method for run in finished_runs}, (0, 1, 4))
    assert provenance.compare_command(grouped(finished_runs[:-1])) is None

    def command_of_runs(extractor: str, *options: str, data: str = "mnist") -> str | None:
        records = [{"extractor": extractor, "command": f"crl-diffusion train --out x {words}"} for words in options]
        copies = [
            run._replace(record=records[i % len(records)], config={**run.config, "data": data})
            for i, run in enumerate(finished_runs)
        ]
        return provenance.compare_command(grouped(copies))

    command = str(command_of_runs("inception2048-1a2b", "--data-root '/my sets' --extractor-folder w"))
    assert " --extractor inception --extractor-folder w --data-root '/my sets' --out OUT" in command
    command = str(command_of_runs("lenet84-mnist", "--data-root=/sets --extractor-folder w", "--data-root /sets"))
    assert " --extractor lenet --data-root /sets --out OUT" in command
    assert "--data-root" not in str(command_of_runs("cnn32-mnist", "--data-root data", ""))
    assert "--data-root" not in str(command_of_runs("cnn32-digits-8px", "--data-root /sets", data="digits"))
    assert command_of_runs("cnn32-mnist", "--data-root /sets", "") is None
    assert command_of_runs("a caller's own-1a2b", "") is None
    recorded = finished_runs[0]._replace(record={"command": "python -m crl_diffusion train"})
    assert provenance.command(recorded) == "python -m crl_diffusion train"


# Comparable runs


def run(method: str, seed: int, summary: dict[str, Any] | None = None, **settings: Any) -> Finished:
    config = RunConfig(method=method, seed=seed, **settings)
    defaults = {"average_fid": 1.0 + seed, "extractor": "e", "samples_per_task": 8, "sampler": "s"}
    return Finished(Path(f"{config.label}-{seed}"), config.as_json(), {**defaults, **(summary or {})})


@pytest.mark.parametrize("key", ["extractor", "samples_per_task", "sampler", "held_out_images", "classifier"])
def test_runs_that_were_measured_differently_are_refused(key: str) -> None:
    with pytest.raises(errors.OptionError, match=rf"differ in their {key} \(one in gd-0; another in gd\+rank1-0\)"):
        comparable(grouped([run("gd", 0, {key: "one"}), run("gd+rank1", 0, {key: "another"})]))


@pytest.mark.parametrize(
    ("key", "value", "different"),
    [
        ("held_out", "test", "validation"),
        ("image_size", 8, 16),
        ("tasks", 5, 3),
        ("classes_per_task", 1, 2),
        ("class_order", -1, 3),
        ("per_class", 0, 50),
        ("model", "tiny", "mini"),
        ("steps", 300, 600),
        ("pool", 100, 16),
        ("lr", 2e-3, 1e-3),
        ("optimizer", "adam", "sgd"),
        ("pool_latents", "per-class", "shared"),
    ],
)
def test_runs_that_were_trained_differently_are_refused(key: str, value: object, different: object) -> None:
    message = rf"differ in their {key} \({value} in gd-0 and 1 more; {different} in gd\+rank1-0\)"
    runs = [run("gd", 0, **{key: value}), run("gd", 1, **{key: value}), run("gd+rank1", 0, **{key: different})]
    with pytest.raises(errors.OptionError, match=message):
        comparable(grouped(runs))


def test_variants_of_a_method_stand_side_by_side() -> None:
    variants: list[dict[str, float]] = [{}, {"ema": 0.9}, {"lr_later": 0.3}, {"lr_later": 0.3, "ema": 0.9}]
    runs = [
        run(method, seed, {"average_fid": 10.0 + seed - 4 * values.get("ema", 0)}, **values)
        for method in ("gd", "gd+rank1")
        for values in variants
        for seed in (0, 1)
    ]
    names = ["", "@lr-later=0.3", "@ema=0.9", "@ema=0.9,lr-later=0.3"]
    labels = [method + name for method in ("gd", "gd+rank1") for name in names]
    groups = grouped(runs, in_order(run.label for run in runs))
    comparable(groups)
    assert list(groups) == labels
    assert all([run.seed for run in group] == [0, 1] for group in groups.values())
    differences = tables.differences(groups, "gd@ema=0.9")
    assert differences is not None
    assert {row[0]: row[2].split(" ±")[0] for row in differences.body} == {
        label: "0.00" if "ema" in label else "+3.60" for label in labels if label != "gd@ema=0.9"
    }


def test_two_runs_of_one_variant_and_seed_are_refused_and_so_are_other_settings() -> None:
    twin = run("gd", 0, ema=0.9)._replace(path=Path("elsewhere"))
    with pytest.raises(errors.OptionError, match=r"are both gd@ema=0\.9 with seed 0"):
        comparable(grouped([run("gd", 0), run("gd", 0, ema=0.9), twin]))
    with pytest.raises(errors.OptionError, match=r"differ in their lr \("):
        comparable(grouped([run("gd", 0), run("gd", 0, ema=0.9, lr=0.1)]))


def test_a_method_stands_for_its_variant_where_all_runs_share_it() -> None:
    averaged = [run(method, 0, ema=0.9) for method in ("gd", "gd+rank1")]
    assert label_among(averaged, "gd") == label_among(averaged, "gd@ema=0.9") == "gd@ema=0.9"
    assert label_among(averaged, "masip@ema=0.8") == "masip@ema=0.8"  # which has no run
    assert label_among([*averaged, run("masip", 0)], "gd") == "gd"  # which has no run
    assert label_among([*averaged, run("gd", 0, ema=0.99)], "gd") == "gd"
    assert label_among([run("gd", 0)], "gd") == "gd"
    fids = {"joint": 2.0, "fine-tune": 12.0, "gd": 7.0}
    runs = [run(method, 0, {"average_fid": fid}, ema=0.9) for method, fid in fids.items()]
    assert tables.across({"digits": grouped(runs)}) == {"gd@ema=0.9": {"digits": {0: 0.5}}}


def test_the_page_names_variants_by_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"tasks": 2, "classes_per_task": 1}
    for seed in (0, 1):
        fabricate(tmp_path / f"a{seed}", "gd", seed, **small)
        fabricate(tmp_path / f"b{seed}", "gd", seed, 8.0, ema=0.999, **small)
    drawn: list[str] = []
    monkeypatch.setattr(samples, "strips_of", lambda rows, classes: drawn.extend(row[0] for row in rows) or [])
    monkeypatch.setattr(samples, "show_strips", lambda *arguments: plt.figure())
    report.write([tmp_path], tmp_path / "out", "gd")
    report_page = Page(tmp_path / "out" / "report.html")
    assert "4 finished runs: 2 methods, 2 seeds." in report_page.html
    assert "<td>gd@<wbr>ema=0.999</td>" in report_page.html
    assert [name for name in drawn if name.startswith("gd")] == ["gd", "gd@ema=0.999"]
    for first_cells in (["gd@ema=0.999", "2"], ["gd@ema=0.999", "2p ≥ 0.5"], ["gd@ema=0.999", "1", "0.999"]):
        assert any(row[: len(first_cells)] == first_cells for row in report_page.rows)
    compare_command = provenance.compare_command(grouped(find([tmp_path])[0]))
    assert compare_command is not None
    parsed = parser.parse(shlex.split(compare_command)[1:])
    assert isinstance(parsed, options.Compare)
    work = {cell.config for cell in cells.cells(parsed, parsed.methods, parsed.seeds, tmp_path)}
    assert work == {RunConfig.from_json(run.config) for run in find([tmp_path])[0]}

    titles: list[str] = []
    monkeypatch.setattr(run_pictures, "grid_over_tasks", lambda run, tasks, title: titles.append(title))
    run_pictures.of_run(tmp_path / "b0")
    assert titles == ["Samples of gd@ema=0.999 on digits, seed 0"]


def test_a_comparison_whose_runs_share_a_variant_has_its_baseline(tmp_path: Path) -> None:
    for method in ("gd", "gd+rank1"):
        for seed in (0, 1):
            fabricate(tmp_path / f"{method}{seed}", method, seed, tasks=2, classes_per_task=1, ema=0.999)
    report.write([tmp_path], tmp_path / "out", "gd")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Method less gd@ema=0.999, seed by seed" in text


def test_methods_strengths_seeds_and_fisher_samples_may_differ() -> None:
    comparable(grouped([run("gd", 0), run("gd", 1), run("gd+rank1", 0), run("gd+rank1:lam=3", 0, fisher_samples=64)]))
    comparable(grouped([run("gd", 0), run("gd", 1, device="cpu", log_every=7)]))


def test_within_a_method_the_fisher_matrix_may_not_differ() -> None:
    with pytest.raises(errors.OptionError, match=r"fisher_samples .* all called gd\+rank1, but their seeds"):
        comparable(grouped([run("gd+rank1", 0), run("gd+rank1", 1, fisher_samples=64)]))


def test_two_runs_of_one_method_and_seed_are_refused() -> None:
    twin = run("gd", 0)._replace(path=Path("elsewhere"))
    with pytest.raises(errors.OptionError, match="are both gd with seed 0"):
        comparable(grouped([run("gd", 0), twin]))


def runs_with(method: str, *fids: float, forgetting: Sequence[float] = (), **settings: Any) -> list[Finished]:
    pairs = zip(fids, forgetting or fids, strict=True)
    summaries = [{"average_fid": fid, "forgetting": forgot} for fid, forgot in pairs]
    return [run(method, seed, summary, **settings) for seed, summary in enumerate(summaries)]


def test_conclusions_follow_from_the_intervals() -> None:
    gd = runs_with("gd", 10.0, 12.0, 11.0)
    runs = [*gd, *runs_with("gd+rank1", 9.0, 11.1, 9.9), *runs_with("masip", 9.0, 14.0, 11.0)]
    text = findings.conclusions(grouped(runs), "gd")
    assert "wholly below zero: gd+rank1." in text
    assert "Not told apart by these seeds: masip." in text
    assert findings.conclusions(grouped([gd[0], run("masip", 0)]), "gd") == ""
    assert "'replay'" in findings.conclusions(grouped(gd), "replay")


def test_a_report_begins_with_the_best_method_and_its_difference_to_the_baseline() -> None:
    """Eight seeds: forgetting is lower on each of them, so p is 2 / 2 ** 8."""
    fids = [10.0, 12.0, 11.0, 13.0, 9.0, 10.5, 12.5, 11.5]
    gains = [1.0, 1.2, 0.9, 1.1, 1.3, 0.8, 1.0, 1.1]
    better = [fid - gain for fid, gain in zip(fids, gains, strict=True)]
    runs = [*runs_with("gd", *fids), *runs_with("gd", *better, ema=0.9), *runs_with("joint", *[1.0] * 8)]
    text = findings.found(grouped(runs), "gd")
    estimate = seeds.estimate([-gain for gain in gains])
    assert estimate.low is not None
    assert estimate.high is not None
    interval = f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]".replace("-", "−")
    assert text == (
        f"gd@ema=0.9 has the lowest average FID of 2 continual methods, {np.mean(better):.1f}; paired over 8 seeds, "
        f"that is {interval} against gd, and the 95 % interval is wholly below 0. Its forgetting is 1.05 lower in the "
        "mean, which is shown: exact sign-flip test, p 0.0078."
    )


def test_what_was_picked_from_many_methods_needs_a_smaller_p() -> None:
    fids = [10.0, 12.0, 11.0, 13.0, 9.0, 10.5]
    others = [one for lam in (1, 2, 3) for one in runs_with(f"gd+rank1:lam={lam}", *(fid + 1 for fid in fids))]
    best = runs_with("gd+bands8", *(fid - 1 - fid / 100 for fid in fids))
    alone = findings.found(grouped([*runs_with("gd", *fids), *best]), "gd")
    assert alone.endswith("which is shown: exact sign-flip test, p 0.031.")
    among = findings.found(grouped([*runs_with("gd", *fids), *best, *others]), "gd")
    assert among.endswith(
        "lower in the mean, which is not shown: exact sign-flip test, p 0.031, where 0.013 is needed, after the best "
        "of 5 was picked; 6 seeds are too few to show anything by this test, whose p cannot be below 0.031."
    )


def test_nothing_is_claimed_of_the_best_method_without_enough_seeds_or_a_clear_interval() -> None:
    one_seed = findings.found(grouped([run("gd", 0), run("masip", 0, {"average_fid": 3.0})]), "gd")
    assert one_seed == (
        "gd has the lowest average FID of 2 continual methods, 1.0; that of masip is 3.0. Nothing can be concluded "
        "from this: there is one seed, and differences between methods may be chance."
    )
    no_pairs = findings.found(grouped([run("gd", 0), run("gd", 1), run("masip", 2), run("masip", 3)]), "gd")
    assert no_pairs.endswith("Nothing can be concluded from this: they have fewer than two seeds in common.")
    unclear = [*runs_with("gd", 10.0, 12.0, 11.0), *runs_with("masip", 9.0, 12.5, 10.0)]
    text = findings.found(grouped(unclear), "gd")
    assert "is not wholly below 0, so it is not shown to be better." in text
    assert "3 seeds are too few to show anything" in text
    # Where the baseline is the best, or has no runs, it is compared with the next best.
    for baseline in ("masip", "replay"):
        assert "against gd," in findings.found(grouped(unclear), baseline)


POISON = "[/red]<b onload=x>|`*](x)\x1b[31m"
SHOWN = POISON.replace("\x1b", "\\x1b")  # else it would colour what a terminal shows


def poisoned(folder: Path) -> Path:
    """Two runs of two methods whose records name an extractor that is markup."""
    for method in ("gd", "gd+rank1"):
        made = fabricate(folder / method, method, 0, tasks=2, classes_per_task=1)
        for name in ("config.json", "metrics.jsonl", "summary.json"):
            text = (made / name).read_text()
            (made / name).write_text(text.replace("cnn32-digits", json.dumps(POISON)[1:-1]))
        summary = json.loads((made / "summary.json").read_text())
        summary["metrics_sha256"] = sha256_of(made / "metrics.jsonl")
        (made / "summary.json").write_text(json.dumps(summary))
    return folder


def test_markup_in_records_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "[/bold]"
    assert cli.main(["report", str(poisoned(tmp_path / "runs")), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert SHOWN in output.replace("\n", "")
    assert str(out / "report.html") in output
    assert SHOWN in Page(out / "report.html").text
    assert "[/red]&lt;b onload=x>\\|`*]\\(x)\\x1b[31m" in (out / "comparison.md").read_text()


@pytest.mark.parametrize("name", ["../../$\\frac$", "/nowhere/a\0b"])
def test_a_data_set_of_another_version_may_have_any_name(name: str, tmp_path: Path) -> None:
    for method, level in {"fine-tune": 80.0, "joint": 3.0, "gd": 10.0}.items():
        for part in ("known", "other"):
            made = fabricate(tmp_path / "runs" / f"{part}-{method}", method, 0, level, tasks=2, classes_per_task=1)
        record = json.loads((made / "config.json").read_text())
        record["run"]["data"] = name
        (made / "config.json").write_text(json.dumps(record))
    _, files = report.write([tmp_path / "runs"], tmp_path / "reports" / "out", "gd")
    assert {file.parent for file in files} == {tmp_path / "reports" / "out"}
    assert {"digits-samples.png", "data-2-samples.png", "across.png"} <= {file.name for file in files}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "reports", tmp_path / "runs"]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_output_in_ascii_does_not_end_a_command(
    command: str, finished: Path, extractor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    shutil.copytree(extractor_folder, tmp_path, dirs_exist_ok=True)
    shutil.copytree(finished, tmp_path / "gd+rank1-seed0")
    run_options = ["--methods", "gd+rank1", *cli_options(SHORT), "--out", tmp_path]
    done = crl_diffusion(command, *([tmp_path] if command == "report" else run_options))
    assert (done.returncode, done.stderr) == (0, "")
    assert "average FID v" in done.stdout
    assert str(tmp_path / "report.html") in done.stdout
