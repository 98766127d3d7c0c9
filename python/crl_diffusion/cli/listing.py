"""Tables of the data sets, models, methods and presets. `crl-diffusion list` prints them, and
`crl-diffusion list --markdown > python/PRESETS.md` writes them to a file, which a test compares with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from crl_diffusion.config import words
from crl_diffusion.config.method import FAMILIES, L2_MODES, METHODS, PENALTIES
from crl_diffusion.config.networks import MODELS, MLPSize
from crl_diffusion.config.presets import OURS, PAPER_METHODS, PAPER_VARIANTS, PRESETS, UNUSED, Preset
from crl_diffusion.config.settings import DATA_PLANS, RunConfig, Settings
from crl_diffusion.config.spelling import penalty_names
from crl_diffusion.config.systems import SYSTEMS
from crl_diffusion.diffusion.network import build
from crl_diffusion.training.plan import resolve

PREFACE = """\
# Data sets, models, methods and presets of the trainer

Written by `crl-diffusion list --markdown > python/PRESETS.md`; a test compares this file with the
configuration objects.
"""


class Listing(NamedTuple):
    """One table; cells are plain text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def listings() -> list[Listing]:
    methods = [_replays(), _penalties(), _options(), _systems()]
    return [_data(), _models(), *methods, _presets(), _settings(), _paper_methods()]


def _data() -> Listing:
    rows = [
        [name, f"{plan.image_size}", f"{plan.tasks} x {plan.classes_per_task}", f"{plan.classes or 'any'}"]
        for name, plan in DATA_PLANS.items()
    ]
    return Listing(
        "Data sets",
        ("--data", "pixels", "tasks x classes", "classes"),
        rows,
        "Pixels, tasks: defaults. A folder with fewer "
        "than 10 classes has tasks of 2 classes if that comes out even, or of 1.",
    )


def _models() -> Listing:
    rows = []
    for name, preset in MODELS.items():
        with torch.device("meta"):
            shape = (1, 8, 8) if isinstance(preset, MLPSize) else (3, 32, 32)
            count = sum(p.numel() for p in build(name, shape, 10, 0).parameters())
        if isinstance(preset, MLPSize):
            rows.append([name, str(preset.width), f"{preset.blocks} residual blocks", "-", f"{count:,}"])
            continue
        channels = ", ".join(map(str, preset.channels))
        levels = ["middle", *(f"{32 >> level} pixels" for level in preset.attention or ())]
        attention = "none" if preset.attention is None else ", ".join(levels)
        rows.append([name, channels, str(preset.layers), attention, f"{count:,}"])
    return Listing(
        "Models",
        ("--model", "channels", "layers", "attention", "parameters"),
        rows,
        "Label-conditioned. mlp: a residual MLP on the pixels, with its width; the others: diffusers' UNet2DModel. "
        "Parameters: 10 classes; images of 1 x 8 x 8 for mlp, of 3 x 32 x 32 for the others.",
    )


def _replays() -> Listing:
    rows = []
    for name, method in METHODS.items():
        if method.penalty is not None or method.adapter_rank:
            continue
        parts = [f"{replay.source} images, target {replay.target}" for replay in method.replays]
        weights = {"sum": "1 each", "tasks": "1/k real, 1 - 1/k replay"}[method.weights] if parts else "1"
        rows.append([name, "; ".join(parts) or "nothing", weights, method.curriculum])
    rows.append(["adapters<r>", "nothing; every task after the first trains adapters of its own", "1", "continual"])
    return Listing(
        "Methods: what is replayed",
        ("--method", "replays", "weights", "curriculum"),
        rows,
        "A penalty is used alone or after a replay: rank1, gd+rank1, replay+gd+bands8. "
        f"{'; '.join(f'{name}: {meaning}' for name, meaning in words.SOURCES.items())}. Target noise: "
        f"{words.TARGETS['noise']}; target teacher: {words.TARGETS['teacher']}. k: number of tasks so far. With "
        f"adapters, {words.ADAPTERS}; r, from 1 to 1000, is their rank. They stand by themselves. interpolate<w> by "
        "itself or at the end of any name but fine-tune, joint and adapters<r>, such as gd+interpolate0.5: at the end "
        "of each task after the first, the weights move w of the way back to those that the task before it ended with.",
    )


def _penalties() -> Listing:
    rows = []
    for name in penalty_names():
        penalty = PENALTIES[name] if name in PENALTIES else FAMILIES[name.removesuffix("<n>")](2)
        directions = {"rank<n>": "n", "bands<n>": "1 in each of n bands of timesteps"}.get(name, str(penalty.rank))
        if penalty.fisher != "low_rank":
            rows.append([name, "-", "-", f"{penalty.lam:g}", penalty.mode])
        else:
            rows.append([name, directions, penalty.direction, f"{penalty.lam:g}", penalty.mode])
    l2 = "; ".join(f"{name}: {words.L2[PENALTIES[name].fisher]}" for name in PENALTIES if name.startswith("l2"))
    return Listing(
        "Methods: penalties",
        ("penalty", "directions a task", "direction", "lam", "mode"),
        rows,
        f"What l2 and l2-average pull towards: {l2}. They estimate no Fisher matrix, and know the modes "
        f"{' and '.join(L2_MODES)}.",
    )


def _options() -> Listing:
    number = "strength, for a loss that is the mean over C*H*W; inf (with decoupled or once) pins the directions"
    rows = [
        *([mode, meaning] for mode, meaning in words.MODES.items()),
        ["lam=NUMBER", number],
        ["top", f"directions: {words.DIRECTIONS['top']}"],
        ["mean", f"direction: {words.DIRECTIONS['mean']} (not with rank<n>)"],
        *([name, words.DIRECTIONS[name]] for name in ("random", "signs")),
        ["slopes", words.SLOPES],
    ]
    return Listing("Methods: options of a penalty, NAME:OPTION,...", ("option", "meaning"), rows)


def _systems() -> Listing:
    rows = [[name, system.method, system.source, system.differs] for name, system in SYSTEMS.items()]
    return Listing(
        "Systems of the literature",
        ("system", "--method", "source", "what differs"),
        rows,
        "--method accepts the name of a system, too, and uses its method. Values of lam, ranks, guidance and shares of "
        "interpolation are defaults, and to be tuned.",
    )


def _presets() -> Listing:
    rows = [
        [name, preset.about, " ".join(preset.methods), " ".join(map(str, preset.seeds)), preset.extractor]
        for name, preset in PRESETS.items()
    ]
    return Listing("Presets", ("--preset", "experiment", "methods of compare", "seeds", "FID features"), rows)


def _settings() -> Listing:
    configs = {name: _resolved(preset) for name, preset in PRESETS.items()}
    rows = []
    for field in fields(Settings):
        if field.name in UNUSED:
            continue
        values = [
            "-" if field.name == "steps" and config.epochs else _value(getattr(config, field.name))
            for config in configs.values()
        ]
        rows.append([_option(field.name), *values, "ours" if field.name in OURS else "paper"])
    return Listing(
        "Presets, resolved",
        ("option", *configs, "paper presets' number"),
        rows,
        "The last column is about the paper presets, and 'paper' includes its authors' code; all numbers of the other "
        "presets are ours. Epochs 0: steps are used, for each task. Fisher samples 0: every image of a task once. "
        "Class order -1: the order of the labels. Per class 0: all images. Each task has a new optimizer. 1000 "
        "timesteps. Two things differ from the authors' code whatever the options: pools hold 8-bit images, theirs "
        "hold floats; and in-sample estimates take directions and curvatures from the same timesteps and noise, theirs "
        "draw new ones.",
    )


def _resolved(preset: Preset) -> RunConfig:
    """The preset's settings with the defaults of its data set. The device stays as it is: the list does not depend on
    the machine."""
    config = RunConfig(method="fine-tune", **preset.settings)
    return replace(resolve(replace(config, device="cpu")), device=config.device)


def _paper_methods() -> Listing:
    rows = [[paper, ours] for paper, ours in {**PAPER_METHODS, **PAPER_VARIANTS}.items()]
    return Listing("The paper's methods", ("paper", "--method"), rows)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def rich_table(listing: Listing) -> Table:
    table = Table(
        title=listing.title, title_justify="left", caption=listing.note, caption_justify="left", box=box.SIMPLE_HEAD
    )
    for title in listing.head:
        table.add_column(title, overflow="fold")
    for row in listing.rows:
        table.add_row(*row)
    return table


def markdown(tables: Sequence[Listing]) -> str:
    parts = [PREFACE]
    for listing in tables:
        rows = [listing.head, ["---"] * len(listing.head), *listing.rows]
        lines = ["| " + " | ".join(cell.replace("<", "&lt;") for cell in row) + " |" for row in rows]
        parts += [f"## {listing.title}\n", "\n".join(lines) + "\n", *([f"{listing.note}\n"] if listing.note else [])]
    return "\n".join(parts)
