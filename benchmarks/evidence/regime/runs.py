"""Which runs a regime needs, and the finished ones: lam and rates are chosen here, from the tuning seed alone."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from crl_diffusion.comparison.cells import Cell, folder_name
from crl_diffusion.config.settings import RunConfig, check
from crl_diffusion.config.spelling import add_lam, spell
from crl_diffusion.data.tasks import Data
from crl_diffusion.files import Row
from crl_diffusion.reporting.runs import Finished, find
from crl_diffusion.run_folder.readers import read_metrics
from crl_diffusion.training.plan import resolve, stage_steps

from .definitions import BASELINE, CURVE, Arm, Regime


class Wanted(NamedTuple):
    """One run: the folder of its part of the regime, its configuration."""

    part: str  # STAGE-SETTING
    config: RunConfig

    @property
    def folder(self) -> str:
        return f"{self.part}/{folder_name(self.config.method, self.config.seed)}"


@dataclass(frozen=True)
class Result:
    """A finished run, with the numbers that regimes are about."""

    run: Finished

    @cached_property
    def rows(self) -> list[Row]:
        return read_metrics(self.run.path)

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def average_fid(self) -> float:
        return float(self.run.summary["average_fid"])

    @property
    def forgetting(self) -> float:
        return float(self.run.summary["forgetting"])

    @property
    def precision(self) -> float:
        """Mean over the tasks after the first of Adam's precision at the end of the task."""
        return float(np.mean([row["precision"] for row in self.of_kind("movement")]))

    @property
    def log_rate(self) -> float:
        """The log of Adam's effective rate, mean log (lr / sqrt v), at the end of tasks after the first."""
        settings = self.run.settings
        return self.precision + math.log(settings["lr"] * settings["lr_later"])

    @property
    def displacement(self) -> float:
        """Mean over the tasks after the first."""
        return float(np.mean([row["displacement"] for row in self.of_kind("movement")]))

    @property
    def parameters(self) -> int:
        """Of the model, for runs with movement."""
        row = self.of_kind("movement")[0]
        # A random direction's drift is the displacement over the root of the number of parameters.
        return round((row["displacement"] / row["random_drift"]) ** 2)

    @property
    def kept(self) -> float:
        """Bytes for each parameter that the method keeps at the end of the run besides the model, Adam's state and the
        old model: the penalty's state, and the average of the weights."""
        return float(self.run.summary["state_bytes"] / self.parameters + (4 if self.run.settings["ema"] else 0))

    @property
    def memory(self) -> float:
        """Bytes that the last task needs of those before it, besides the model and the optimizer's state: the old
        model, pools of images and what guides them, the penalty's state; of adapters, those of all tasks."""
        rows = self.of_kind("memory")[-1:]
        return float(self.run.summary["state_bytes"] + sum(row["teacher_bytes"] + row["replay_bytes"] for row in rows))

    @property
    def curvature(self) -> float:
        """Mean over past tasks of the sum of the curvatures of their directions."""
        return float(np.mean([sum(row["curvatures"]) for row in self.of_kind("fisher")]))


class Runs:
    """The finished runs of a regime below `root`, and those that are still to be made."""

    def __init__(self, regime: Regime, root: Path, failed: Container[str] = ()) -> None:
        """`failed`: folders of runs that have ended without a result, such as those with a loss that is not finite."""
        self.regime, self.root, self.failed = regime, root, failed
        folders = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
        self.results = {
            f"{run.path.parent.name}/{run.path.name}": Result(run) for part in folders for run in find([part])[0]
        }

    # Configurations

    def config(self, setting: str, method: str, seed: int, **further: Any) -> RunConfig:
        values = {**self.regime.common, **self.regime.settings[setting], **further}
        return RunConfig(method=spell(method), seed=seed, **values)

    def tuning_run(self, setting: str, method: str) -> Wanted:
        config = self.config(setting, method, self.regime.tuning_seed, held_out="validation")
        return Wanted(f"tuning-{setting}", config)

    def result(self, wanted: Wanted) -> Result | None:
        return self.results.get(wanted.folder)

    # Choices

    def setting(self, name: str) -> str | None:
        """The setting of that name, or the one chosen for it; None before its runs have finished."""
        candidates = self.regime.chosen.get(name)
        if candidates is None:
            return name
        fids = self.fids(self.tuning_run(candidate, BASELINE) for candidate in candidates)
        return None if any(map(math.isnan, fids)) else candidates[int(np.argmin(fids))]

    def fids(self, runs: Iterable[Wanted]) -> list[float]:
        """Average FIDs; NaN where a run has not finished, infinity where it has failed."""

        def fid(run: Wanted) -> float:
            result = self.result(run)
            if result is not None:
                return result.average_fid
            return math.inf if run.folder in self.failed else math.nan

        return [fid(run) for run in runs]

    def tried(self, arm: Arm) -> dict[float, Wanted]:
        """The tuning runs of an arm by lam."""
        setting = self.setting(arm.setting)
        return {} if setting is None else {lam: self.tuning_run(setting, add_lam(arm.method, lam)) for lam in arm.lams}

    def lam(self, arm: Arm) -> float | None:
        """The chosen lam of an arm; None if it has none, or before the runs that it depends on have finished."""
        if arm.borrowed:
            return self.borrowed_lam(arm)
        tried = self.tried(arm)
        fids = self.fids(tried.values())
        return [*tried][int(np.argmin(fids))] if tried and not any(map(math.isnan, fids)) else None

    def borrowed_lam(self, arm: Arm) -> float | None:
        model = self.arm(arm.model)
        lam = self.lam(model)
        if lam is None or arm.borrowed == "same lam":
            return lam
        own = [other for other in self.regime.arms if other[:2] == arm[:2] and other.lams]
        tried = {lam: self.result(run) for lam, run in self.tried(own[0]).items()}
        target = self.result(self.tried(model)[lam])
        if target is None or not tried or None in tried.values():
            return None
        if arm.borrowed == "same lam a":
            curvature = np.mean([result.curvature for result in tried.values() if result is not None])
            return float(f"{lam * target.curvature / curvature:.2g}")
        drops = {lam: abs(result.precision - target.precision) for lam, result in tried.items() if result is not None}
        return min(drops, key=lambda lam: drops[lam])

    def arm(self, label: str) -> Arm:
        return next(arm for arm in self.regime.arms if arm.label == label)

    def method(self, arm: Arm) -> str | None:
        """The method of an arm with its chosen lam; None before the lam is known."""
        if not arm.lams and not arm.borrowed:
            return spell(arm.method)
        lam = self.lam(arm)
        return None if lam is None else add_lam(arm.method, lam)

    def tried_candidates(self, arm: Arm) -> list[Wanted]:
        return [self.tuning_run(setting, method) for setting, method in arm.candidates]

    def choice(self, arm: Arm) -> tuple[str, str] | None:
        """The setting and the method of an arm's final runs; None before they are known."""
        if arm.candidates:
            fids = self.fids(self.tried_candidates(arm))
            return None if any(map(math.isnan, fids)) else arm.candidates[int(np.argmin(fids))]
        setting, method = self.setting(arm.setting), self.method(arm)
        return None if setting is None or method is None else (setting, method)

    # Stages

    def tuning(self) -> list[Wanted]:
        """The tuning runs that can be made now: arms in a setting that is still to be chosen come later."""
        settings = dict.fromkeys(candidate for arm in self.regime.arms for candidate in self.candidates(arm.setting))
        runs = [self.tuning_run(setting, BASELINE) for setting in settings]
        return [
            *runs,
            *(run for arm in self.regime.arms for run in (*self.tried(arm).values(), *self.tried_candidates(arm))),
        ]

    def candidates(self, setting: str) -> Sequence[str]:
        return self.regime.chosen.get(setting, (setting,))

    def final_run(self, arm: Arm, seed: int) -> Wanted | None:
        choice = self.choice(arm)
        return None if choice is None else Wanted(f"final-{choice[0]}", self.config(*choice, seed))

    def final(self) -> list[Wanted]:
        """The final runs that can be made now, one seed after another."""
        runs = [self.final_run(arm, seed) for seed in self.regime.seeds for arm in self.regime.arms]
        return [*{run.folder: run for run in runs if run is not None}.values()]

    def curve_run(self, setting: str, steps: int, seed: int) -> Wanted:
        if steps == self.regime.common["steps"]:
            return Wanted(f"final-{setting}", self.config(setting, BASELINE, seed))
        return Wanted(f"steps-{steps}-{setting}", self.config(setting, BASELINE, seed, steps=steps))

    def curve(self) -> list[Wanted]:
        return [
            self.curve_run(setting, steps, seed)
            for seed in self.regime.curve_seeds
            for steps in self.regime.curve
            for setting in CURVE
        ]

    def missing(self) -> list[Wanted]:
        """Runs that can be made now and have not finished, in the order in which they should be made."""
        first = self.regime.curve_seeds[:1]
        curve = self.curve()
        tuning = [*self.tuning(), *(run for run in curve if run.config.seed in first)]
        ready = [run for run in tuning if self.is_missing(run)]
        if ready:
            return ready
        # The rest of the curve comes after as many complete seeds.
        final, count = self.final(), len(self.regime.curve_seeds)
        early = [run for run in final if run.config.seed in self.regime.seeds[:count]]
        late = [run for run in final if run.config.seed not in self.regime.seeds[:count]]
        runs = {run.folder: run for run in (*early, *curve, *late)}  # some are of the curve and final
        return [run for run in runs.values() if self.is_missing(run)]

    def is_missing(self, run: Wanted) -> bool:
        return run.folder not in self.results and run.folder not in self.failed


def cell(wanted: Wanted, root: Path, data: Data) -> Cell:
    check(wanted.config)
    config = resolve(wanted.config)
    return Cell(config, root / wanted.folder, stage_steps(config, data))
