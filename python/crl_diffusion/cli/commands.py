"""The commands: each function runs one and returns the exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion.cli.options import Compare, Diagnose, List, Report, Train
from crl_diffusion.config.settings import RunConfig, check
from crl_diffusion.config.spelling import in_order, label, parse_variant
from crl_diffusion.errors import OptionError, TrainingError, WriteError

FILE_WIDTH = 150  # columns of a table that goes to a file or a pipe


def complain(line: str) -> None:
    """Print a line on stderr. A terminal that has hung up is ignored."""
    with suppress(OSError):
        print(f"crl-diffusion: {line}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Whether this is the first of torchrun's processes, which prints for all; also before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def quiet_output(console: Console) -> bool:
    """Whether to print plain lines instead of bars: without a terminal, or if the variable CI is set."""
    return not console.is_terminal or os.environ.get("CI", "").lower() in ("1", "true")


def train(command: Train) -> int:
    if "@" in command.method:
        method, values = parse_variant(command.method)
        words = "".join(f" --{name.replace('_', '-')} {value}" for name, value in values.items())
        raise OptionError(
            f"--method is {command.method!r}, and only compare takes variants; give options instead: "
            f"--method {method}{words}"
        )
    check(command)
    config = RunConfig(**{field.name: getattr(command, field.name) for field in fields(RunConfig)})
    console = Console(soft_wrap=True)

    # torch and diffusers take seconds to import, so the options are checked first.
    from crl_diffusion.training import loop

    first = is_first()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    clock = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clock, console=console, disable=quiet_output(console) or not first) as progress:
        bar = progress.add_task(f"{config.label}, seed {config.seed}", total=None)

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        try:
            summary = loop.train(
                config, command.out, command.data_root, command.extractor, command.extractor_folder, say, advance
            )
        except TrainingError as error:
            if first:
                complain(str(error))
            return 1
    if not first:
        return 0
    fid, forgetting, accuracy = (summary[name] for name in ("average_fid", "forgetting", "accuracy"))
    say(
        f"average FID {fid:.1f}, forgetting {'-' if forgetting is None else f'{forgetting:.1f}'}, "
        f"conditional accuracy {'-' if accuracy is None else f'{accuracy:.3f}'}"
    )
    say(f"pictures and records: {command.out}")
    return 0


def compare(command: Compare) -> int:
    for name, values in (("methods", command.methods), ("seeds", command.seeds)):
        if not values or len(set(values)) != len(values):
            raise OptionError(f"--{name} is {' '.join(map(str, values))!r}; give at least one, and none twice")
    baseline_method, baseline_values = parse_variant(command.baseline)
    if command.jobs < 0:
        raise OptionError(f"--jobs is {command.jobs}; it must be 0 or more")

    from crl_diffusion import processes
    from crl_diffusion.comparison import cells, runner

    if processes.launched() > 1:
        raise OptionError("compare starts its own processes; run it without torchrun, which is for train")
    work = cells.cells(command, command.methods, command.seeds, command.out, command.lams)
    for cell in work:
        check(cell.config)
    baseline = cells.configuration(command, baseline_method, baseline_values).label
    console = Console(soft_wrap=True)

    from crl_diffusion.data import tasks
    from crl_diffusion.evaluation import evaluate
    from crl_diffusion.reporting import report, runs
    from crl_diffusion.run_folder.layout import check_folder, require_measured, require_place
    from crl_diffusion.training import forecast, loop
    from crl_diffusion.training.plan import about_data, require_apart, require_fisher_images, resolve, stage_steps

    require_place("--out", command.out)
    asked = work[0].config
    for cell in work:
        cell.config = resolve(cell.config, command.data_root)
        cell.finished = loop.finished(cell.config, cell.folder, command.extractor) is not None
        check_folder(cell.config, cell.folder)
    device = work[0].config.device
    cells.check_others(work, command.out)
    require_apart(work[0].config, command.out, command.data_root)
    images = tasks.load(work[0].config, command.data_root)
    for cell in work:
        require_fisher_images(cell.config, images)
        cell.stage_steps = stage_steps(cell.config, images)
    folder = command.extractor_folder or command.out
    jobs = command.jobs or ((os.cpu_count() or 1) if device == "cpu" else 1)
    try:
        tools = evaluate.instruments(command.extractor, images, folder, device)
        evaluate.prepare(tools, work[0].config, images)
    except WriteError as error:
        raise OptionError(f"{error}; make {str(folder)!r} writable, with room on its disk") from error
    for line in [*about_data(asked, work[0].config, images), *tools.about(work[0].config, images)]:
        console.print(line, highlight=False, markup=False)
    if not all(cell.finished for cell in work):
        for path in sorted(command.out.glob("*/config.json")):
            require_measured(path.parent, {"data_name": images.name, **tools.names()})
        pass_seconds = forecast.seconds_per_pass(work[0].config, images.shape, images.classes)
        console.print(runner.estimate(work, jobs, pass_seconds), highlight=False)
    failed = runner.run(work, jobs, command.data_root, command.extractor, folder, console, quiet_output(console))
    if len(failed) < len(work):
        # All runs of the folder: a comparison can grow.
        finished_runs = [run for run in runs.find([command.out])[0] if run.path.parent == command.out]
        order = in_order(run.label for run in finished_runs)
        show(console, *report.write([run.path for run in finished_runs], command.out, baseline, order))
    for cell in failed:
        complain(f"{cell.name} failed; its last lines:\n{runner.tail(cell)}")
    if failed:
        complain(
            f"{len(failed)} of {len(work)} runs failed; finished ones are kept; give the same command again to continue"
        )
        return 1
    return 0


def report(command: Report) -> int:
    from crl_diffusion.reporting import report, runs
    from crl_diffusion.run_folder.layout import require_place

    if not command.folders:
        raise OptionError("no folder was given; name folders written by `train` or `compare`")
    console = Console(soft_wrap=True)
    finished_runs, unfinished = runs.find(command.folders)
    for run in unfinished:
        console.print(f"{run} is not finished and is left out", highlight=False)
    out = command.out or command.folders[0]
    require_place("--out", out)
    order = in_order(run.label for run in finished_runs)
    show(console, *report.write(command.folders, out, label(*parse_variant(command.baseline)), order))
    return 0


def diagnose(command: Diagnose) -> int:
    if command.samples < 48:
        raise OptionError(f"--samples is {command.samples}; it must be at least 48")
    if command.seed < 0:
        raise OptionError(f"--seed is {command.seed}; it must be at least 0")
    for t in command.timesteps:
        if not 0 <= t < 1000 or command.timesteps.count(t) > 1:
            chosen = " ".join(map(str, command.timesteps))
            raise OptionError(f"--timesteps is {chosen!r}; give timesteps from 0 to 999, none twice")
    if not (command.run / "config.json").exists():
        raise OptionError(f"{str(command.run)!r} holds no run; give a folder written by `train`")
    console = Console(soft_wrap=True)

    from crl_diffusion import diagnosis
    from crl_diffusion.reporting import tables
    from crl_diffusion.run_folder.layout import require_place

    out = command.out or command.run / "diagnosis"
    require_place("--out", out)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    result, paths = diagnosis.diagnose_run(
        command.run,
        out,
        command.task,
        command.samples,
        command.timesteps,
        command.seed,
        command.data_root,
        command.device,
        say,
    )
    say("\n" + "\n".join(result.verdict.sentences) + "\n")
    head, body = result.table()
    caption = f"{result.num_samples} samples at every timestep; brackets are 95 % intervals."
    show(console, tables.rich_table(head, body, caption), paths)
    return 0


def list_choices(command: List) -> int:
    from crl_diffusion.cli import listing

    tables = listing.listings()
    if command.markdown:
        print(listing.markdown(tables), end="")
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    for table in tables:
        console.print(listing.rich_table(table))
    return 0


def show(console: Console, table: object, paths: Sequence[Path]) -> None:
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table)
    console.print("\n".join(["Pictures and tables:", *(f"  {path}" for path in paths)]), highlight=False, markup=False)
