"""Finished runs: how they are found and read, and which of them may be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from crl_diffusion.config.settings import DATA_PLANS, RunConfig, Settings
from crl_diffusion.config.spelling import spell
from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.evaluation import metrics
from crl_diffusion.evaluation.summaries import summarise
from crl_diffusion.files import Row, read_file
from crl_diffusion.run_folder import checkpoint
from crl_diffusion.run_folder.layout import digest_of_saved
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

# Options that do not decide how a number was measured or what it cost in training: runs may differ in them.
FREE = {"method", "recipe", "seed", "device", "log_every", "checkpoint_every"}
# Options of the penalty's Fisher matrix: they may differ from method to method, and not within one.
OF_THE_METHOD = {"recipe", "fisher_samples", "fisher_estimate", "fisher_images"}
RUN_RECORDS = ("config.json", "summary.json", "metrics.jsonl")  # a folder with one of them is a run's
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
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def data(self) -> str:
        return str(self.config["data"])

    @property
    def lam(self) -> float | None:
        """The strength of its penalty; None without one."""
        penalty = self.config["recipe"]["penalty"]
        return None if penalty is None else float(penalty["lam"])

    @property
    def family(self) -> str:
        """Its method without lam: runs of one family differ in the strength of their penalty only."""
        try:
            return spell(self.method, with_lam=False)
        except OptionError:  # a method of another version of this package, whose options are not known here
            return self.method

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration, with what a run of an earlier version does not name filled in: it had the defaults."""
        plan, defaults = DATA_PLANS.get(self.data), {f.name: f.default for f in fields(Settings)}
        merged = {**defaults, **self.config}
        for name in ("image_size", "tasks", "classes_per_task"):
            merged[name] = merged[name] or getattr(plan, name, 0)
        return merged


def read_finished(run: Path) -> Row:
    """The summary of a finished run; RecordError unless it follows from the run's other records, and these are those
    that its newest checkpoint knows. A folder that a line of a ledger was made into has no evaluations to look at, and
    one of an earlier version fewer names."""
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
            derived = {key: value for key, value in derived.items() if key not in ("step_ms", "penalty_ms")}
        if other := [key for key in derived if key in summary and not _equal(summary[key], derived[key])]:
            wrong = f"does not follow from the run's other records (its {', '.join(other[:3])})"
            raise RecordError(run / "summary.json", wrong, SUMMARY_REMEDY)
    saved = checkpoint.newest_header(run / "checkpoints")
    if saved is None or saved.run != digest_of_saved(record["run"]):
        return summary
    if saved.config and read_file(run / "config.json") != saved.config.encode():
        wrong = "is not what it was when the run's checkpoints were taken"
        raise RecordError(run / "config.json", wrong, CONFIG_REMEDY)
    for name, digest in saved.digests.items():
        if name.startswith("samples/") and sha256_of(run / name) != digest:
            raise RecordError(run / name, "is missing or not what the run has drawn", SAMPLES_REMEDY)
    return summary


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same up to the rounding of means: Python has summed in two ways."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return bool(a == b)


def find(folders: Iterable[Path]) -> tuple[list[Finished], list[Path]]:
    """Finished runs at or below the folders, in the order of methods and seeds; and the unfinished ones."""
    runs: dict[Path, Finished] = {}
    unfinished = []
    for folder in folders:
        if not folder.is_dir():
            raise OptionError(f"{str(folder)!r} is not a folder; give one that `train` or `compare` has written")
        records = [path for name in RUN_RECORDS for path in (folder / name, *folder.glob(f"*/{name}")) if path.exists()]
        for run in sorted({path.parent for path in records}):
            record = read_config(run)
            if (run / "summary.json").exists():
                summary = read_finished(run)
                summary.pop("metrics_sha256", None)  # of the folder's file, no number of the run
                learnt = metrics.fid_when_learnt(summary["fid_matrix"])  # summaries of an earlier version lack it
                runs[run.resolve()] = Finished(run, record["run"], {"fid_when_learnt": learnt, **summary}, record)
            else:
                unfinished.append(run)
    return list(runs.values()), unfinished


# Side by side

Groups = Mapping[str, Sequence[Finished]]  # method -> its runs, one per seed


def runs_of(groups: Groups) -> list[Finished]:
    return [run for group in groups.values() for run in group]


def grouped(runs: Sequence[Finished], order: Sequence[str] = ()) -> dict[str, list[Finished]]:
    """Runs by method, in the order of seeds: methods of `order` first, then as found; one family side by side, from
    the smallest lam up."""
    families = list(dict.fromkeys(run.family for run in runs))

    def place(run: Finished) -> tuple[float, ...]:
        named = [name for name in (run.method, run.method.partition(":")[0]) if name in order]
        known = order.index(named[0]) if named else len(order)
        return known, families.index(run.family), -1.0 if run.lam is None else run.lam, run.seed

    result: dict[str, list[Finished]] = {}
    for run in sorted(runs, key=place):
        result.setdefault(run.method, []).append(run)
    return result


def by_data(runs: Sequence[Finished], order: Sequence[str] = ()) -> dict[str, Groups]:
    """Groups of runs for each data set, in the order of `DATA_PLANS`; methods in the order of `grouped`."""
    names = sorted(
        {run.data for run in runs}, key=lambda name: (name not in DATA_PLANS, [*DATA_PLANS, name].index(name))
    )
    return {name: grouped([run for run in runs if run.data == name], order) for name in names}


def differing(runs: Sequence[Finished]) -> list[str]:
    """Options that are not the same in all runs, in the order of RunConfig."""
    names = [f.name for f in fields(RunConfig)]
    names += sorted({key for run in runs for key in run.config} - set(names))
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def comparable(groups: Groups) -> None:
    """Refuse to put numbers side by side that were not made and measured in the same way."""
    runs = runs_of(groups)
    for key in MEASURED_WITH:
        known = [run for run in runs if run.summary.get(key) is not None]
        _same(known, key, {run.path: run.summary[key] for run in known}, "their FIDs do not compare")
    free = FREE | OF_THE_METHOD | {"lam", "mode"}  # these two are part of the recipe, and were options once
    for key in differing(runs):
        if key not in free:
            _same(runs, key, {run.path: run.settings.get(key) for run in runs}, "a difference may come from that")
    for name, group in groups.items():
        for key in differing(group):
            if key in OF_THE_METHOD:
                values = {run.path: run.settings.get(key) for run in group}
                _same(group, key, values, f"they are all called {name}, but their seeds are not replicates")
    seen: dict[tuple[str, int], Path] = {}
    for run in runs:
        twin = seen.setdefault((run.method, run.seed), run.path)
        if twin != run.path:
            raise OptionError(
                f"{str(twin)!r} and {str(run.path)!r} are both {run.method} with seed {run.seed}; report them apart"
            )


def _same(runs: Sequence[Finished], key: str, values: Mapping[Path, Any], reason: str) -> None:
    """Refuse runs that differ in `key`, saying which has what."""
    kinds: dict[str, list[str]] = {}
    for run in runs:
        kinds.setdefault(str(values[run.path]), []).append(str(run.path))
    if len(kinds) > 1:
        named = [
            f"{kind} in {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
            for kind, paths in kinds.items()
        ]
        raise OptionError(f"these runs differ in their {key} ({'; '.join(named)}): {reason}; report them apart")
