"""How runs were made: configuration, environment, and the commands that repeat them, all read from run folders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from crl_diffusion.config.settings import RunConfig, Settings
from crl_diffusion.config.spelling import VARIED
from crl_diffusion.evaluation.extractors import KINDS
from crl_diffusion.reporting.runs import Finished, Groups, differing, runs_of
from crl_diffusion.reporting.tables import NONE, Sheet

DEFAULTS = {field.name: field.default for field in fields(Settings)}
# Parts of config.json that other tables show, and a place of this machine.
RECORDED = ("run", "command", "class_names", "data_root")


def options(config: Mapping[str, Any]) -> list[str]:
    """Command-line options that differ from the defaults, without method and seed; a list value is several words, true
    is none."""
    words = []
    for name, value in config.items():
        if name in ("method", "seed", "recipe") or value is None or value == DEFAULTS.get(name):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def command(run: Finished) -> str:
    """The command that repeats this run: the recorded one or, without a record, one built from its configuration."""
    recorded = run.record.get("command")
    if recorded:
        return shlex.join(recorded) if isinstance(recorded, list) else str(recorded)
    words = ["--method", run.method, "--seed", str(run.seed), *options(run.config), *_measurement_options(run)]
    words += ["--out", run.path.name]
    return "crl-diffusion train " + shlex.join(words)


def _kind(run: Finished) -> str | None:
    """What --extractor calls the extractor that the run was measured with; None if it is not recorded, or a caller's
    own, which no command gives."""
    recorded = str(run.record.get("extractor", ""))
    return next((kind for kind, begins in KINDS.items() if recorded.startswith(f"{begins}-")), None)


def _measurement_options(run: Finished) -> list[str]:
    """The options beside the configuration that are not the defaults: extractor, and the folders of the data sets and
    of inception's weights where the recorded command names them."""
    kind, recorded = _kind(run), run.record.get("command") or []
    given = shlex.split(recorded) if isinstance(recorded, str) else list(recorded)
    words = ["--extractor", kind] if kind not in (None, "cnn") else []
    if kind == "inception" and (folder := _given("--extractor-folder", given)):
        words += ["--extractor-folder", folder]
    root = _given("--data-root", given)
    if root not in (None, "data") and run.data != "digits":
        words += ["--data-root", str(root)]
    return words


def _given(option: str, words: Sequence[str]) -> str | None:
    """An option's value in a command, written as two words or with an equals sign."""
    for word, following in zip(words, [*words[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


def compare_command(groups: Groups) -> str | None:
    """One command for all runs, if each label has each seed and all other options are the same."""
    runs = runs_of(groups)
    all_seeds = sorted({run.seed for run in runs})
    if any([run.seed for run in group] != all_seeds for group in groups.values()):
        return None
    common = [options({k: v for k, v in run.config.items() if k not in VARIED}) for run in runs]
    if any(words != common[0] for words in common):
        return None
    measurement = {tuple(_measurement_options(run)) for run in runs}
    if len(measurement) > 1 or any(run.record.get("extractor") and not _kind(run) for run in runs):
        return None
    words = ["--methods", *groups, "--seeds", *map(str, all_seeds), *common[0], *measurement.pop()]
    words += ["--out", "OUT"]
    return "crl-diffusion compare " + shlex.join(words)


def settings(groups: Groups) -> tuple[Sheet, Sheet | None]:
    """Options that are the same in all runs and, if any differ, the value of each run."""
    runs = runs_of(groups)
    different = [name for name in differing(runs) if name not in ("method", "seed", "recipe", "lam", "mode")]
    same = [field.name for field in fields(RunConfig) if field.name not in (*different, "method", "seed")]
    same += sorted(set(runs[0].config) - {*same, *different, "method", "seed", "recipe", "lam", "mode"})
    filled_in = any(name not in runs[0].config for name in same)
    common = Sheet(
        ["option", "value"],
        [[name, _text(runs[0].settings[name])] for name in same],
        "Options that are the same in all runs."
        + (" Those that the runs' own version did not have yet are shown with their defaults." if filled_in else ""),
    )
    if not different:
        return common, None
    body = [[run.label, str(run.seed), *(_text(run.settings.get(name)) for name in different)] for run in runs]
    return common, Sheet(["method", "seed", *different], body, "Options that are not the same in all runs.")


def methods(groups: Groups) -> Sheet:
    """The parts of each method."""
    body = []
    for name, group in groups.items():
        recipe = group[0].config["recipe"]
        replays = [
            f"{r['source']} images, predicting the {r['target']}, weight {r['weight']:g}" for r in recipe["replays"]
        ]
        penalty = ", ".join(f"{key} {_text(value)}" for key, value in (recipe["penalty"] or {}).items())
        interpolation = _text(recipe["interpolation"]) if "interpolation" in recipe else NONE
        rank = recipe.get("adapter_rank", 0)
        adapters = f"rank {rank}" if rank else NONE
        replay = "; ".join(replays) or NONE
        body.append([name, recipe["curriculum"], replay, penalty or NONE, interpolation, adapters])
    head = ["method", "curriculum", "replay", "penalty", "interpolation", "adapters"]
    return Sheet(head, body, "Methods as they were composed.")


def environment(runs: Sequence[Finished]) -> Sheet:
    """Versions, machine and state of the repository: each value and, if there are several, how many runs have it."""
    flat = {run.path: _flatten({k: v for k, v in run.record.items() if k not in RECORDED}) for run in runs}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    body = []
    for name in names:
        by_value: dict[str, list[Finished]] = {}
        for run in runs:
            by_value.setdefault(flat[run.path].get(name, "not recorded"), []).append(run)
        several = len(by_value) > 1
        cells = [
            f"{value} ({len(holders)} runs, such as {holders[0].path.name})" if several else value
            for value, holders in by_value.items()
        ]
        body.append([name, "\n".join(cells)])
    if not any("git" in name for name in names):
        body.append(["git", "not recorded by these runs"])
    return Sheet(["", "value"], body, "As recorded in each run's config.json when the run began.")


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    result = {}
    for key, value in record.items():
        name = key if key != "environment" else ""
        name = f"{prefix} {name}".strip()
        result.update(_flatten(value, name) if isinstance(value, Mapping) else {name: _text(value)})
    return result


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return NONE if value is None or value == "" else f"{value:g}" if isinstance(value, float) else str(value)
