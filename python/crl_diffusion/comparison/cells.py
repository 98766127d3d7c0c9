"""The cells of a comparison: one run for each method and seed.

Each cell is a run folder, written by `crl-diffusion train` and named by `folder_name`. Finished cells are kept;
interrupted cells continue from their last checkpoint. A folder holds one comparison: methods and seeds can be added,
other settings are refused.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from crl_diffusion.config.method import Method
from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.config.spelling import add_lam, parse_method, spell
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.reporting.runs import read_finished
from crl_diffusion.run_folder.layout import differences
from crl_diffusion.run_folder.readers import read_metrics


@dataclass
class Cell:
    """One run of the comparison, and its process once it has started."""

    config: RunConfig
    folder: Path
    stage_steps: Sequence[int] = ()  # of each stage; known once the data are
    process: subprocess.Popen[bytes] | None = None
    finished: bool = False  # with complete records

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"

    @property
    def steps(self) -> int:
        return sum(self.stage_steps)

    @property
    def steps_done(self) -> int:
        """Read from the log of the run, which is another process; 0 if the log is damaged (the run reports it)."""
        if self.finished:
            return self.steps
        try:
            rows = [row for row in read_metrics(self.folder) if row["kind"] == "step"]
        except RecordError:
            return 0
        if not rows:
            return 0
        return int(sum(self.stage_steps[: rows[-1]["stage"] - 1]) + rows[-1]["step"])


def cells(
    settings: Settings, methods: Sequence[str], seeds: Sequence[int], out: Path, lams: Sequence[float] = ()
) -> list[Cell]:
    """All cells, the longest first, so that no long run is left for one core at the end. With `lams`, each method that
    has a penalty gets one cell for each lam."""
    common = {field.name: getattr(settings, field.name) for field in fields(Settings)}
    work = [
        Cell(RunConfig(**common, method=method, seed=seed), out / folder_name(method, seed))
        for seed in seeds
        for method in with_lams(methods, lams)
    ]
    return sorted(work, key=lambda cell: _cost(cell.config.recipe), reverse=True)


def with_lams(methods: Sequence[str], lams: Sequence[float]) -> list[str]:
    """The methods in canonical spelling, those with a penalty once for each lam."""
    spelled: list[str] = []
    for method in methods:
        if parse_method(method).penalty is None or not lams:
            spelled.append(spell(method))
        else:
            spelled += [add_lam(method, lam) for lam in lams]
    return list(dict.fromkeys(spelled))


def folder_name(method: str, seed: int) -> str:
    """A name that every file system allows: gd+bands8:top,lam=60 -> gd+bands8_top_lam=60-seed0."""
    return f"{method.replace(':', '_').replace(',', '_')}-seed{seed}"


def _cost(method: Method) -> tuple[int, bool]:
    return len(method.replays), method.penalty is not None


def check_others(work: Sequence[Cell], out: Path) -> None:
    """Refuse a folder that holds runs with other settings, whose results cannot be compared with these. RecordError if
    the records of another finished run, which the report would include, are damaged."""
    for path in sorted(out.glob("*/summary.json")):
        if path.parent not in [cell.folder for cell in work]:
            read_finished(path.parent)
    for path in sorted(out.glob("*/config.json")):
        if changes := differences(work[0].config, path.parent, ignored=("method", "recipe", "seed")):
            raise OptionError(
                f"--out {str(out)!r} holds runs with other settings: {path.parent.name} ({changes}); use another folder"
            )


def options(config: RunConfig) -> list[str]:
    """The options of `crl-diffusion train` for this configuration."""
    default, words = RunConfig(method=config.method), []
    for name, value in asdict(config).items():
        option = f"--{name.replace('_', '-')}"
        if name not in ("method", "seed") and value == getattr(default, name):
            continue
        words += [option, str(value)]
    return words


def train_command(cell: Cell, data_root: Path, extractor: str, extractor_folder: Path) -> list[str]:
    """The command line that runs this cell; a user can also run it by hand."""
    places = ["--out", str(cell.folder), "--data-root", str(data_root), "--extractor-folder", str(extractor_folder)]
    return [sys.executable, "-m", "crl_diffusion", "train", *options(cell.config), "--extractor", extractor, *places]
