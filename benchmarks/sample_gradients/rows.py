"""How a row is measured: beside plain forward + backward passes, and against the gradients of a loop over samples."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from ..common import allocator, command, memory
from ..common.measure import interleaved, percentiles
from ..common.problem import Unavailable
from .contenders import CONTENDERS, PLAIN, Case, errors
from .models import MODELS, TINY


def measure_row(name: str, model: str, samples: int, rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of one row and of the yardstick, in this process, and the row's errors."""
    measurable = memory.can_measure()
    try:
        case = Case((MODELS | TINY)[model], samples)
        calls = {PLAIN: CONTENDERS[PLAIN].make(case)}
        calls[name] = CONTENDERS[name].make(case)
        result: dict[str, Any] = {"errors": errors(calls[name](), case.truth())}
    except Unavailable as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # a peer may raise anything; the table shows it in this row
        return {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    if measurable:
        calls[PLAIN]()
        result["peak"] = {}
        for call in calls:
            case.zero_grad()
            result["peak"][call] = memory.peak_bytes(calls[call])
    allocator.keep_freed_memory()
    return result | {"seconds": interleaved(calls, rounds, time.process_time)}


def measure(model: str, samples: int, rounds: int, only: Sequence[str]) -> dict[str, Any]:
    """All rows of one model, each from a process of its own; or the yardstick and the rows whose names contain a
    word of ``only``."""
    try:
        numel = Case((MODELS | TINY)[model], samples).numel
    except Unavailable as reason:
        return {"model": model, "skipped": str(reason), "rows": []}
    rows = []
    for name, contender in CONTENDERS.items():
        if only and name != PLAIN and not any(word in name for word in only):
            continue
        options = ["--row", name, "--models", model, "--rounds", str(rounds), "--samples", str(samples)]
        result = command.in_own_process("sample_gradients", options)
        row: dict[str, Any] = {"name": name, "gives": contender.gives, "what": contender.description}
        if "seconds" in result:
            seconds, plain = result["seconds"][name], result["seconds"][PLAIN]
            row |= percentiles(seconds) | times(seconds, plain) | {"errors": result["errors"]}
            if "peak" in result:
                row["peak_mb"] = result["peak"][name] / 1e6
                row["peak_times_plain"] = result["peak"][name] / result["peak"][PLAIN]
        else:
            row |= result
        rows.append(row)
        print(f"{model}: {name}: {row.get('failed') or row.get('skipped') or 'measured'}", file=sys.stderr, flush=True)
    return {"model": model, "numel": numel, "rows": rows}


def times(seconds: list[float], plain: list[float]) -> dict[str, float]:
    """How many times as long as the yardstick's pass in the same round."""
    spread = percentiles([a / b for a, b in zip(seconds, plain, strict=True)])
    return {"times_plain" + key.removeprefix("ms"): value / 1e3 for key, value in spread.items()}
