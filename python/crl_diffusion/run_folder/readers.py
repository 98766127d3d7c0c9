"""One reader for each record of a run folder. It checks encoding, JSON, names, types and finite numbers.

Earlier versions wrote fewer names than this one; the new names are optional here. A record that cannot be read, lacks a
name or has a wrong value raises a `RecordError`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from crl_diffusion.config.settings import ADDED, RunConfig, Settings, check
from crl_diffusion.errors import PUT_BACK, OptionError, RecordError
from crl_diffusion.files import Row, read_if_there, read_json, read_rows

AGAIN = "give the run's `train` command again"
CONFIG_REMEDY = f"{PUT_BACK}, or delete it and {AGAIN}: it is restored from a checkpoint or, without one, written anew"
SUMMARY_REMEDY = f"delete it and {AGAIN}: it is made again from the other records"
METRICS_REMEDY = f"{PUT_BACK}, or {AGAIN}: it goes back to a checkpoint from before the damage"
TIMINGS_REMEDY = f"{PUT_BACK}, or delete it: the run is reported without the times that it held"
SAMPLES_REMEDY = f"{PUT_BACK}, or {AGAIN}: these images are drawn again from the checkpoint of their task's end"


class Kind(NamedTuple):
    """The values that a name may have, in words and as a test, and whether it may be missing or null."""

    description: str
    fits: Callable[[Any], bool]
    optional: bool = False


Shape = Mapping[str, Kind]


def optional(kind: Kind) -> Kind:
    return kind._replace(optional=True)


def list_of(kind: Kind) -> Kind:
    return Kind(f"a list, each {kind.description}", lambda x: isinstance(x, list) and all(map(kind.fits, x)))


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63


def _finite(x: Any) -> bool:
    return _is_integer(x) or (isinstance(x, float) and math.isfinite(x))


def _triangle(x: Any) -> bool:
    """Whether x is a `metrics.Matrix` whose last row is not empty."""
    return (
        isinstance(x, list)
        and len(x) > 0
        and all(isinstance(row, list) and len(row) in (0, i) for i, row in enumerate(x, start=1))
        and len(x[-1]) > 0
        and all(_finite(value) for row in x for value in row)
    )


def _strength(x: Any) -> bool:
    return _finite(x) or x == math.inf


def _penalty(x: Any) -> bool:
    return x is None or (isinstance(x, dict) and _strength(x.get("lam")))


def _replay(x: Any) -> bool:
    return isinstance(x, dict) and _finite(x.get("weight")) and {"source", "target"} <= x.keys()


def _recipe(x: Any) -> bool:
    return (
        isinstance(x, dict)
        and isinstance(x.get("curriculum"), str)
        and isinstance(x.get("replays"), list)
        and all(map(_replay, x["replays"]))
        and "penalty" in x
        and _penalty(x["penalty"])
        and _finite(x.get("interpolation", 0.0))
        and _is_integer(x.get("adapter_rank", 0))
    )


TEXT = Kind("a text", lambda x: isinstance(x, str))
INTEGER = Kind("an integer", _is_integer)
COUNT = Kind("an integer above 0", lambda x: _is_integer(x) and x > 0)
TASK = Kind("the number of a task, from 1", lambda x: _is_integer(x) and 0 < x < 10_000)
NUMBER = Kind("a finite number", _finite)
NUMBERS = list_of(NUMBER)
MATRIX = Kind("a lower triangular matrix of finite numbers", _triangle)
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
COMMAND = Kind("a text or a list of words", lambda x: TEXT.fits(x) or list_of(TEXT).fits(x))

CONFIG: Shape = {
    "run": OBJECT,
    **dict.fromkeys(("extractor", "classifier", "data_name", "data_root"), optional(TEXT)),
    "data_notes": optional(list_of(TEXT)),
    **dict.fromkeys(("environment", "git"), optional(OBJECT)),
    "command": optional(COMMAND),
    "class_names": optional(list_of(TEXT)),
}
BY_TYPE = {bool: Kind("true or false", lambda x: isinstance(x, bool)), int: INTEGER, float: NUMBER, str: TEXT}
RUN: Shape = {
    "method": TEXT,
    "seed": INTEGER,
    "data": TEXT,
    "recipe": Kind("an object with a curriculum, replays and a penalty", _recipe),
    **{field.name: optional(BY_TYPE[type(field.default)]) for field in fields(Settings) if field.name != "data"},
}
SUMMARY: Shape = {
    **dict.fromkeys(("method", "extractor", "sampler"), TEXT),
    **dict.fromkeys(("classifier", "held_out", "metrics_sha256"), optional(TEXT)),
    **dict.fromkeys(("seed", "samples_per_task"), INTEGER),
    "average_fid": NUMBER,
    **dict.fromkeys(
        (
            *("fid_when_learnt", "incremental_average_fid", "forgetting", "forgetting_divisor_t"),
            *("accuracy", "accuracy_forgetting", "accuracy_task_1", "accuracy_task_1_when_learnt", "class_kl"),
            *("step_ms", "step_cpu_ms", "penalty_ms", "task_end_seconds", "task_end_cpu_seconds", "state_bytes"),
        ),
        optional(NUMBER),
    ),
    "fid_matrix": MATRIX,
    "accuracy_matrix": optional(Kind("a list of lists", lambda x: isinstance(x, list))),
    "class_kl_matrix": optional(Kind("a list of lists", lambda x: isinstance(x, list))),
    "accuracy_by_task": optional(NUMBERS),
    "held_out_images": optional(Kind("a list", lambda x: isinstance(x, list))),
}
METRICS: Mapping[str, Shape] = {
    "step": {"stage": TASK, "step": COUNT, "loss": NUMBER, "replay_loss": NUMBER},
    "evaluation": {
        **dict.fromkeys(("after_task", "task"), TASK),
        "fid": NUMBER,
        **dict.fromkeys(("accuracy", "class_kl"), optional(NUMBER)),
        **dict.fromkeys(("extractor", "sampler"), TEXT),
        **dict.fromkeys(("classifier", "held_out"), optional(TEXT)),
        **dict.fromkeys(("samples", "sampler_steps"), COUNT),
        "held_out_images": optional(COUNT),
    },
    "fisher": {
        "task": TASK,
        **dict.fromkeys(
            (
                *("num_samples", "kappa", "rho", "trace", "signal_share", "samples_needed"),
                *("state_bytes", "suggested_lam"),
            ),
            optional(NUMBER),
        ),
        **dict.fromkeys(("curvatures", "slopes"), optional(NUMBERS)),
    },
    "adapters": {"task": TASK, "state_bytes": NUMBER},
    "memory": {"task": TASK, "teacher_bytes": NUMBER, "replay_bytes": NUMBER},
    "movement": {
        "task": TASK,
        **dict.fromkeys(("displacement", "random_drift"), NUMBER),
        "drift": NUMBERS,
        "precision": optional(NUMBER),
    },
    "held_out_loss": {**dict.fromkeys(("after_task", "task"), TASK), "by_band": NUMBERS},
}
STARTED: Shape = {"started": TEXT}
TIMED: Shape = {
    **{"stage": TASK, "step": COUNT, "step_ms": NUMBER},
    **dict.fromkeys(("step_cpu_ms", "penalty_ms"), optional(NUMBER)),  # earlier versions had no step_cpu_ms
}
TASK_END: Shape = {"stage": TASK, "task_end_seconds": NUMBER, "task_end_cpu_seconds": NUMBER}


def _misfit(value: Any, shape: Shape) -> str | None:
    """The first error of a JSON value that must be an object of this shape, in words; None if there is none."""
    if not isinstance(value, dict):
        return "expected a JSON object"
    for name, kind in shape.items():
        if value.get(name) is None:
            if not kind.optional:
                return f"it has no {name}"
        elif not kind.fits(value[name]):
            return f"its {name} is {repr(value[name])[:40]}, expected {kind.description}"
    return None


def _require(value: Any, shape: Shape, path: Path, remedy: str, where: str = "") -> None:
    if wrong := _misfit(value, shape):
        raise RecordError(path, f"is damaged{where} ({wrong})", remedy)


def read_config(run: Path) -> dict[str, Any]:
    """config.json: the configuration of the run, the networks that measure it, its environment and command."""
    path = run / "config.json"
    record = read_json(path, CONFIG_REMEDY)
    _require(record, CONFIG, path, CONFIG_REMEDY)
    _require(record["run"], RUN, path, CONFIG_REMEDY, " in its run")
    return dict(record)


def read_run_config(run: Path) -> RunConfig:
    """The configuration in config.json, which must be one that this version can run."""
    path, saved = run / "config.json", {**ADDED, **read_config(run)["run"]}
    hints = get_type_hints(RunConfig)
    if unknown := sorted(saved.keys() - hints.keys() - {"recipe"}):
        wrong = (
            f"is of another version of this package (its run has {', '.join(unknown)}, which this one does not know)"
        )
        raise RecordError(path, wrong, "use the version that began the run")
    for name, hint in hints.items():
        if saved.get(name) is None:
            wrong = f"is damaged, or of another version of this package (its run has no {name})"
            raise RecordError(path, wrong, CONFIG_REMEDY)
        if get_origin(hint) is Literal and saved[name] not in get_args(hint):
            known = ", ".join(get_args(hint))
            wrong = f"is damaged in its run (its {name} is {saved[name]!r}, expected one of {known})"
            raise RecordError(path, wrong, CONFIG_REMEDY)
    config = RunConfig.from_json(saved)
    try:
        check(config)
    except OptionError as error:
        raise RecordError(path, f"is damaged in its run ({error})", CONFIG_REMEDY) from None
    return config


def read_summary(run: Path) -> Row:
    """summary.json: the numbers of a finished run."""
    path = run / "summary.json"
    summary = read_json(path, SUMMARY_REMEDY)
    _require(summary, SUMMARY, path, SUMMARY_REMEDY)
    return dict(summary)


def read_metrics(run: Path, count: int | None = None) -> list[Row]:
    """Rows of metrics.jsonl, or the first `count` of them: losses, evaluations and statistics of Fisher matrices."""
    path = run / "metrics.jsonl"
    rows = read_rows(path, METRICS_REMEDY, count)
    last_evaluation = (0, 0)  # after which task, and of which task
    last_step = (0, 0)  # stage and step of the last losses
    for number, row in enumerate(rows, start=1):
        where, kind = f" in row {number}", row.get("kind")
        if not (isinstance(kind, str) and kind in METRICS):
            wrong = f"is damaged{where} (its kind is {kind!r}, expected one of {', '.join(METRICS)})"
            raise RecordError(path, wrong, METRICS_REMEDY)
        _require(row, METRICS[kind], path, METRICS_REMEDY, where)
        if kind == "step":
            if (row["stage"], row["step"]) <= last_step:
                wrong = f"is damaged in row {number} (step {row['step']} of stage {row['stage']} comes too late)"
                raise RecordError(path, wrong, METRICS_REMEDY)
            last_step = (row["stage"], row["step"])
        if kind == "evaluation":
            after, task = now = (row["after_task"], row["task"])
            learnt, evaluated = last_evaluation
            follows = now == (learnt, evaluated + 1) if task > 1 else learnt == evaluated < after
            if not (follows and task <= after):
                wrong = f"lacks rows before row {number} (the evaluation of task {task} after task {after})"
                raise RecordError(path, wrong, METRICS_REMEDY)
            last_evaluation = now
    return rows


def read_timings(run: Path, count: int | None = None) -> list[Row]:
    """Rows of timings.jsonl, or the first `count` of them: times of steps and of what a task's end makes for later
    tasks, and when work on the run began."""
    path = run / "timings.jsonl"
    rows = read_rows(path, TIMINGS_REMEDY, count)
    for number, row in enumerate(rows, start=1):
        shape = STARTED if "started" in row else TASK_END if "task_end_seconds" in row else TIMED
        _require(row, shape, path, TIMINGS_REMEDY, f" in row {number}")
    return rows


def samples_path(run: Path, after_task: int) -> Path:
    return run / "samples" / f"after-task-{after_task}.safetensors"


def read_samples(run: Path, after_task: int) -> tuple[np.ndarray, np.ndarray] | None:
    """uint8 pixels (N, C, S, S) and labels (N,) that an evaluation has stored; None if there are none."""
    path = samples_path(run, after_task)
    content = read_if_there(path)
    if content is None:
        return None
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a dtype that NumPy does not have
        raise RecordError(path, f"is damaged ({' '.join(str(error).split())})", SAMPLES_REMEDY) from None
    pixels, labels = tensors.get("pixels"), tensors.get("labels")
    if (
        pixels is None
        or labels is None
        or (pixels.dtype, pixels.ndim, labels.dtype) != (np.uint8, 4, np.int64)
        or pixels.shape[1] not in (1, 3)
        or pixels.shape[2] != pixels.shape[3]
        or labels.shape != pixels.shape[:1]
        or 0 in pixels.shape
    ):
        parts = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in sorted(tensors.items())) or "nothing"
        wrong = f"is damaged (it holds {parts}, expected pixels uint8 (N, C, S, S) and labels int64 (N,))"
        raise RecordError(path, wrong, SAMPLES_REMEDY)
    return pixels, labels


def sha256_of(path: Path) -> str:
    """sha256 of a file's content; "" if there is no such file."""
    content = read_if_there(path)
    return "" if content is None else hashlib.sha256(content).hexdigest()
