"""Finished runs: how they are found and read, and which of them may be compared."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from crl_diffusion.config.settings import DATA_PLANS, RunConfig, Settings
from crl_diffusion.config.spelling import VARIED, label, spell
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.evaluation import metrics
from crl_diffusion.evaluation.summaries import TIMES, summarise
from crl_diffusion.files import Row, read_file
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import digest_of_saved, is_run, runs_in
from crl_diffusion.run_folder.readers import (
    CONFIG_REMEDY,
    METRICS_REMEDY,
    SAMPLES_REMEDY,
    SUMMARY_REMEDY,
    read_config,
    read_metrics,
    read_summary,
    sha256_of,
)

# Options that change neither how a number was measured nor how much training it took: runs may differ in them.
FREE_OPTIONS = {"method", "recipe", "seed", "device", "log_every", "checkpoint_every"}
# The recipe and the options of its Fisher matrix: methods may differ in them, runs of one method may not.
METHOD_OPTIONS = {"recipe", "fisher_samples", "fisher_estimate", "fisher_images"}
MEASURED_WITH = ("extractor", "classifier", "samples_per_task", "sampler", "held_out_images")


class Finished(NamedTuple):
    """One finished run: its folder, its configuration, its summary, and all of its config.json."""

    path: Path
    config: dict[str, Any]
    summary: Row
    record: Mapping[str, Any] = {}

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def label(self) -> str:
        """What reports call the run; runs with one label differ in their seed only."""
        return label(self.method, self.settings)

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def data(self) -> str:
        return str(self.config["data"])

    @property
    def lam(self) -> float | None:
        """The strength of the penalty; None without one."""
        penalty = self.config["recipe"]["penalty"]
        return None if penalty is None else float(penalty["lam"])

    @property
    def family(self) -> str:
        """The label without lam: runs of one family differ only in the strength of their penalty."""
        try:
            return label(spell(self.method, with_lam=False), self.settings)
        except OptionError:  # a method of another version of this package, whose options are not known here
            return self.label

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration; options that an earlier version did not record have their defaults."""
        plan, defaults = DATA_PLANS.get(self.data), {f.name: f.default for f in fields(Settings)}
        merged = {**defaults, **self.config}
        for name in ("image_size", "tasks", "classes_per_task"):
            merged[name] = merged[name] or getattr(plan, name, 0)
        return merged


def read_finished(run: Path) -> Row:
    """The summary of a finished run; RecordError unless it follows from the run's other records, and these match the
    newest checkpoint. A folder that was made from a line of a ledger has no evaluations to check, and a summary of an
    earlier version has fewer keys."""
    summary, rows, record = read_summary(run), read_metrics(run), read_config(run)
    for key in ("method", "seed"):
        if summary[key] != record["run"][key]:
            raise RecordError(run / "summary.json", f"is of a run with another {key}", SUMMARY_REMEDY)
    path = run / "metrics.jsonl"
    if not path.exists():
        raise RecordError(path, "is missing", METRICS_REMEDY)
    if summary.get("metrics_sha256") not in (None, sha256_of(path)):
        raise RecordError(path, "lacks rows or has others than summary.json was made from", METRICS_REMEDY)
    if any(row["kind"] == "evaluation" for row in rows):
        derived = summarise(run)
        if derived["step_ms"] is None:  # its times were lost after its end
            derived = {key: value for key, value in derived.items() if key not in TIMES}
        if differing_keys := [key for key in derived if key in summary and not _equal(summary[key], derived[key])]:
            problem = f"does not follow from the run's other records (its {', '.join(differing_keys[:3])})"
            raise RecordError(run / "summary.json", problem, SUMMARY_REMEDY)
    saved = checkpoint.newest_header(run / "checkpoints")
    if saved is None or saved.run != digest_of_saved(record["run"]):
        return summary
    if saved.config and read_file(run / "config.json") != saved.config.encode():
        problem = "is not what it was when the run's checkpoints were taken"
        raise RecordError(run / "config.json", problem, CONFIG_REMEDY)
    for name, digest in saved.digests.items():
        if name.startswith("samples/") and sha256_of(run / name) != digest:
            raise RecordError(run / name, "is missing or not what the run has drawn", SAMPLES_REMEDY)
    return summary


def _equal(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same up to rounding: versions of Python sum means in different ways."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def find(folders: Iterable[Path]) -> tuple[list[Finished], list[Path]]:
    """Finished runs in these folders or one level below, in the order of their paths, and the unfinished folders."""
    runs: dict[Path, Finished] = {}
    unfinished = []
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"{str(folder)!r} is not a folder; give one that `train` or `compare` has written")
        for run in [folder, *runs_in(folder)] if is_run(folder) else runs_in(folder):
            record = read_config(run)
            if (run / "summary.json").exists():
                summary = read_finished(run)
                summary.pop("metrics_sha256", None)  # a digest of a file, not a result
                learnt = metrics.fid_when_learnt(summary["fid_matrix"])  # summaries of an earlier version lack it
                runs[run.resolve()] = Finished(run, record["run"], {"fid_when_learnt": learnt, **summary}, record)
            else:
                unfinished.append(run)
    return list(runs.values()), unfinished


def unreadable(folders: Iterable[Path]) -> list[Path]:
    """Folders in these that cannot be looked into: `find` sees no run there."""
    found = []
    for path in [path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()]:
        try:
            for inside in os.listdir(path)[:1]:
                os.lstat(path / inside)
        except OSError:
            found.append(path)
    return found


# Comparison

Groups = Mapping[str, Sequence[Finished]]  # label -> its runs, one per seed


def runs_of(groups: Groups) -> list[Finished]:
    return [run for group in groups.values() for run in group]


def grouped(runs: Sequence[Finished], order: Sequence[str] = ()) -> dict[str, list[Finished]]:
    """Runs by label, in the order of seeds: labels and methods of `order` first, then as found; one family side by
    side, from the smallest lam up."""
    families = list(dict.fromkeys(run.family for run in runs))

    def place(run: Finished) -> tuple[float, ...]:
        named = [name for name in (run.label, run.method, run.method.partition(":")[0]) if name in order]
        rank = order.index(named[0]) if named else len(order)
        return rank, families.index(run.family), -1.0 if run.lam is None else run.lam, run.seed

    result: dict[str, list[Finished]] = {}
    for run in sorted(runs, key=place):
        result.setdefault(run.label, []).append(run)
    return result


def by_data(runs: Sequence[Finished], order: Sequence[str] = ()) -> dict[str, Groups]:
    """Groups of runs for each data set, in the order of `DATA_PLANS`; labels in the order of `grouped`."""
    names = sorted(
        {run.data for run in runs}, key=lambda name: (name not in DATA_PLANS, [*DATA_PLANS, name].index(name))
    )
    return {name: grouped([run for run in runs if run.data == name], order) for name in names}


def label_among(runs: Sequence[Finished], method: str) -> str:
    """The label of a method, or of a variant, among these runs: a method stands for its variant with the values of
    `VARIED` that all of the runs share."""
    labels = {label(method, run.settings) for run in runs}
    return labels.pop() if len(labels) == 1 and "@" not in method else method


def differing(runs: Sequence[Finished]) -> list[str]:
    """Options that are not the same in all runs, in the order of RunConfig."""
    names = [f.name for f in fields(RunConfig)]
    names += sorted({key for run in runs for key in run.config} - set(names))
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def comparable(groups: Groups) -> None:
    """Raise OptionError unless all numbers come from runs that were trained and measured in the same way, but for
    their methods and the settings that are in their labels."""
    runs = runs_of(groups)
    for key in MEASURED_WITH:
        values = {run.path: run.summary[key] for run in runs if run.summary.get(key) is not None}
        _require_same(key, values, "their FIDs do not compare")
    once_options = {"lam", "mode"}  # parts of the recipe now
    free = FREE_OPTIONS | METHOD_OPTIONS | VARIED.keys() | once_options
    for key in differing(runs):
        if key not in free:
            _require_same(key, {run.path: run.settings.get(key) for run in runs}, "a difference may come from that")
    for name, group in groups.items():
        for key in differing(group):
            if key in METHOD_OPTIONS:
                values = {run.path: run.settings.get(key) for run in group}
                _require_same(key, values, f"they are all called {name}, but their seeds are not replicates")
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        twin = seen.setdefault((run.label, run.seed), run.path)
        if twin != run.path:
            raise OptionError(
                f"{str(twin)!r} and {str(run.path)!r} are both {run.label} with seed {run.seed}; report them apart"
            )


def _require_same(key: str, values: Mapping[Path, Any], reason: str) -> None:
    """Raise OptionError, with each value and its folders, if runs differ in `key`."""
    folders_by_value: dict[str, list[str]] = {}
    for folder, value in values.items():
        folders_by_value.setdefault(str(value), []).append(str(folder))
    if len(folders_by_value) > 1:
        clauses = [
            f"{value} in {folders[0]}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
            for value, folders in folders_by_value.items()
        ]
        raise OptionError(f"these runs differ in their {key} ({'; '.join(clauses)}): {reason}; report them apart")
