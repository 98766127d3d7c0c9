"""The cells of a comparison: one run for each method, or variant of a method, and seed.

Each cell is a run folder, written by `crl-diffusion train` and named by `folder_name`. Finished cells are kept;
interrupted cells continue from their last checkpoint. A folder holds one comparison: methods, variants and seeds can be
added, other settings are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

from crl_diffusion.config.method import Method
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.config.spelling import VARIED, add_lam, label, parse_method, parse_variant, spell
from crl_diffusion.errors import OptionError, RecordError, UnreadableError
from crl_diffusion.reporting.runs import read_finished
from crl_diffusion.run_folder.layout import differences, runs_in
from crl_diffusion.run_folder.readers import read_config, read_metrics


class Process(Protocol):
    """A run that was started, here or on another machine."""

    def poll(self) -> int | None:
        """Its exit code; None while it has not ended, -n after signal n."""


@dataclass
class Cell:
    """One run of the comparison, and its process once it has started."""

    config: RunConfig
    folder: Path
    stage_steps: Sequence[int] = ()  # of each stage; known once the data are
    process: Process | None = None
    finished: bool = False  # with complete records

    @property
    def name(self) -> str:
        return f"{self.config.label}, seed {self.config.seed}"

    @property
    def steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def steps_done(self) -> int:
        """Read from the log of the run, which is another process; 0 if it cannot be read (the run reports it)."""
        if self.finished:
            return self.steps
        try:
            rows = [row for row in read_metrics(self.folder) if row["kind"] == "step"]
        except (RecordError, UnreadableError):
            return 0
        if not rows:
            return 0
        return int(sum(self.stage_steps[: rows[-1]["stage"] - 1]) + rows[-1]["step"])


def cells(
    settings: Settings, methods: Sequence[str], seeds: Sequence[int], out: Path, lams: Sequence[float] = ()
) -> list[Cell]:
    """All cells, the longest first, so that no long run is left for one core at the end. With `lams`, each method that
    has a penalty gets one cell for each lam."""
    configs = [
        configuration(settings, method, values, seed)
        for seed in seeds
        for name, values in map(parse_variant, methods)
        for method in with_lams([name], lams)
    ]
    work = [Cell(config, out / folder_name(config.label, config.seed)) for config in dict.fromkeys(configs)]
    return sorted(work, key=lambda cell: _cost(cell.config.recipe), reverse=True)


def configuration(settings: Settings, method: str, values: Mapping[str, float], seed: int = 0) -> RunConfig:
    """A run of a comparison whose settings are `settings`, but for the `values` of its variant."""
    common = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    return RunConfig(**{**common, **values}, method=method, seed=seed)


def with_lams(methods: Sequence[str], lams: Sequence[float]) -> list[str]:
    """The methods in canonical spelling, those with a penalty once for each lam."""
    spelled: list[str] = []
    for method in methods:
        if parse_method(method).penalty is None or not lams:
            spelled.append(spell(method))
        else:
            spelled += [add_lam(method, lam) for lam in lams]
    return list(dict.fromkeys(spelled))


def folder_name(label: str, seed: int) -> str:
    """A name that every file system allows: gd+bands8:top,lam=60@ema=0.9 -> gd+bands8_top_lam=60@ema=0.9-seed0."""
    return f"{label.replace(':', '_').replace(',', '_')}-seed{seed}"


def _cost(method: Method) -> tuple[int, bool]:
    return len(method.replays), method.penalty is not None


def check_others(work: Sequence[Cell], out: Path) -> None:
    """Refuse a folder that holds runs with other settings, whose results cannot be compared with these, or one of these
    runs in a folder of another name. RecordError if the records of another finished run, which the report would
    include, are damaged."""
    folders = {cell.name: cell.folder for cell in work}
    for folder in runs_in(out):
        if folder not in folders.values() and (folder / "summary.json").exists():
            read_finished(folder)
        if changes := differences(work[0].config, folder, ignored=("method", "recipe", "seed", *VARIED)):
            raise OptionError(
                f"--out {str(out)!r} holds runs with other settings: {folder.name} ({changes}); use another folder"
            )
        run = read_config(folder)["run"]
        name = f"{label(run['method'], run)}, seed {run['seed']}"
        if folders.get(name, folder) != folder:
            raise OptionError(
                f"--out {str(out)!r} holds {name} in {folder.name}; rename this folder to {folders[name].name}, "
                "or use another --out"
            )


def options(config: RunConfig) -> list[str]:
    """The options of `crl-diffusion train` for this configuration."""
    default, words = RunConfig(method=config.method), []
    for name, value in asdict(config).items():
        option = f"--{name.replace('_', '-')}"
        if name not in ("method", "seed") and value == getattr(default, name):
            continue
        words += [option] if value is True else [option, str(value)]
    return words


def train_command(cell: Cell, data_root: Path, extractor: str, extractor_folder: Path) -> list[str]:
    """The command line that runs this cell; a user can also run it by hand."""
    places = ["--out", str(cell.folder), "--data-root", str(data_root), "--extractor-folder", str(extractor_folder)]
    return [sys.executable, "-m", "crl_diffusion", "train", *options(cell.config), "--extractor", extractor, *places]
