"""A script that trains with the given options in forks of itself. All forks but the last are killed.

    python killed_runs.py SEED KILLS train --out ...

SIGKILL, SIGTERM, SIGHUP or SIGINT comes just before or just after one call of a traced function: in steps, while
tensors are saved, between a write and its rename, in evaluations, in the estimation of the Fisher matrix, while
pictures and the summary are written. First an uninterrupted run, into <out>-uninterrupted, counts these moments. Each
kill takes one at random. The script prints a line for each kill and ends with the exit code of the last run. Torch is
imported once, by a process that computes nothing, so its forks are as good as new processes and begin at once.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What runs import late.
import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
import torchmetrics.image.fid  # noqa: F401
from crl_diffusion import cli, files, signals
from crl_diffusion.evaluation import evaluate, summaries
from crl_diffusion.methods import penalties, replay
from crl_diffusion.methods.guidance import Guide
from crl_diffusion.methods.replay import Pool
from crl_diffusion.reporting import run_pictures
from crl_diffusion.run_folder import checkpoint, layout
from crl_diffusion.training import loop
from crl_diffusion.training import run as training_run

TRACED: list[tuple[Any, str]] = [
    (training_run, "training_step"),
    (torch.optim.Adam, "step"),
    (replay, "draw_images"),
    (Pool, "refill"),
    (Guide, "learn"),
    (penalties, "estimate_fisher"),
    (evaluate, "measure"),
    (evaluate, "write_tensors"),
    (loop, "claim"),
    (files, "save_file"),
    (checkpoint, "_prune"),
    (os, "fsync"),
    (os, "replace"),
    (files.Log, "append"),
    (files.Log, "keep"),
    (run_pictures, "of_run"),
    (summaries, "summarise"),
    (loop, "write_json"),
    (layout, "write_json"),
]


class Moments:
    """Counts moments, and sends the process a signal at one of them."""

    def __init__(self, last: int | None, number: int) -> None:
        self.count, self.last, self.number = 0, last, number
        for owner, name in TRACED:
            setattr(owner, name, self.around(getattr(owner, name), f"{getattr(owner, '__name__', owner)}.{name}"))

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def traced(*arguments: Any, **named: Any) -> Any:
            self.pass_by(f"before {name}")
            result = function(*arguments, **named)
            self.pass_by(f"after {name}")
            return result

        return traced

    def pass_by(self, place: str) -> None:
        self.count += 1
        if self.count == self.last:
            print(f"killed at moment {self.count}, {place}, by {signal.Signals(self.number).name}", flush=True)
            os.kill(os.getpid(), self.number)


def forked(arguments: list[str], count_file: Path, last: int | None = None, number: int = 0) -> int:
    """The exit status of a run that gets a signal at the moment `last`; `count_file` gets the number of its moments."""
    child = os.fork()
    if child == 0:
        moments = Moments(last, number)
        code = cli.main(arguments)
        count_file.write_text(str(moments.count))
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(seed: int, kills: int, arguments: list[str]) -> int:
    chosen = random.Random(seed)
    place = arguments.index("--out") + 1
    out = Path(arguments[place])
    count_file = out.with_name(f"{out.name}-moments")
    for number in signals.HANDLED:  # nohup ignores SIGHUP, and a script's background command SIGINT
        signal.signal(number, signal.SIG_DFL)
    uninterrupted = [*arguments[:place], f"{out}-uninterrupted", *arguments[place + 1 :]]
    if code := forked(uninterrupted, count_file):
        return code
    moments = int(count_file.read_text())
    done = 0
    while done < kills:
        moment, number = chosen.randint(1, moments), chosen.choice([signal.SIGKILL, *signals.HANDLED])
        code = forked(arguments, count_file, moment, number)
        if code == (-number if number == signal.SIGKILL else 128 + number):
            done += 1
        elif code == 0:  # so late a moment that what was left of the run had fewer
            break
        else:
            return code
    return forked(arguments, count_file)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
