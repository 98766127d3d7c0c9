"""The commands: each function runs one and returns the exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion.cli.messages import complain, is_first
from crl_diffusion.cli.options import Compare, Diagnose, Export, List, Report, Sample, Train
from crl_diffusion.config.settings import RunConfig, check
from crl_diffusion.config.spelling import in_order, label, parse_method, parse_variant
from crl_diffusion.errors import OptionError, TrainingError, WriteError, visible

if TYPE_CHECKING:
    from crl_diffusion.comparison.cells import Cell
    from crl_diffusion.data.tasks import Data

FILE_WIDTH = 150  # columns of a table that goes to a file or a pipe


class Output(Console):
    """Standard output. That it cannot be written to is an error of its own, not one of the files of a run."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*(visible(x) if isinstance(x, str) else x for x in objects), **how)
        except OSError as error:
            raise OptionError(
                f"standard output cannot be written to ({error.strerror or error}); what is in files is kept: send the "
                "output to another place, and give the same command again"
            ) from error


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
    console = Output(soft_wrap=True)

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
    fid, forgetting, accuracy = (summary.get(name) for name in ("average_fid", "forgetting", "accuracy"))
    say(
        f"average FID {fid:.1f}, forgetting {'-' if forgetting is None else f'{forgetting:.1f}'}, "
        f"conditional accuracy {'-' if accuracy is None else f'{accuracy:.3f}'}"
    )
    say(f"pictures and records: {command.out}")
    return 0


def compare(command: Compare) -> int:
    for name, values in (("methods", command.methods), ("seeds", command.seeds), ("lams", command.lams)):
        if not (values or name == "lams") or len(set(values)) != len(values):
            raise OptionError(f"--{name} is {' '.join(map(str, values))!r}; give at least one, and none twice")
    if command.lams and not any(parse_method(parse_variant(name)[0]).penalty for name in command.methods):
        raise OptionError(
            f"--lams is {' '.join(map(str, command.lams))!r}, but none of the methods has a penalty "
            f"(--methods is {' '.join(command.methods)!r}); add one, such as gd+rank1"
        )
    baseline_method, baseline_values = parse_variant(command.baseline)
    if command.jobs < 0:
        raise OptionError(f"--jobs is {command.jobs}; it must be 0 or more")
    if command.slurm and command.launcher != "slurm":
        raise OptionError(f"--slurm is {' '.join(command.slurm)!r}; it needs --launcher slurm")

    from crl_diffusion import processes
    from crl_diffusion.comparison import cells, slurm
    from crl_diffusion.data import tasks
    from crl_diffusion.evaluation.extractors import require_folder
    from crl_diffusion.run_folder.layout import comparing, require_no_run, require_place
    from crl_diffusion.training.plan import about_data, require_apart, require_fisher_images, resolve, stage_steps

    if processes.launched() > 1:
        raise OptionError("compare starts its own processes; run it without torchrun, which is for train")
    sbatch = slurm.options(command.slurm)
    if command.launcher == "slurm":
        slurm.require()
    work = cells.cells(command, command.methods, command.seeds, command.out, command.lams)
    for cell in work:
        check(cell.config)
    baseline = cells.configuration(command, baseline_method, baseline_values).label
    require_place("--out", command.out)
    require_no_run(command.out, command.out)
    if not any(cell.folder.exists() for cell in work):  # runs of another extractor are the better reason
        require_folder(command.extractor, command.extractor_folder or command.out)
    asked = work[0].config
    for cell in work:
        if command.launcher == "slurm":  # on the device of the jobs, which this machine may not have
            device = ("cuda" if slurm.asks_for_gpus(sbatch) else "cpu") if command.device == "auto" else command.device
            cell.config = replace(resolve(replace(cell.config, device="auto"), command.data_root), device=device)
        else:
            cell.config = resolve(cell.config, command.data_root)
    require_apart(work[0].config, command.out, command.data_root)
    images = tasks.load(work[0].config, command.data_root)
    for cell in work:
        require_fisher_images(cell.config, images)
        cell.stage_steps = stage_steps(cell.config, images)
    console = Output(soft_wrap=True)
    for line in about_data(asked, work[0].config, images):
        console.print(line, highlight=False, markup=False)
    with comparing(command.out, complain):
        return _compare(command, work, images, baseline, sbatch, console)


def _compare(
    command: Compare, work: Sequence[Cell], images: Data, baseline: str, sbatch: dict[str, str], console: Console
) -> int:
    """Make the runs, in a folder that no other comparison writes to, and report them."""
    from crl_diffusion.comparison import cells, runner, slurm
    from crl_diffusion.evaluation import evaluate
    from crl_diffusion.reporting import report, runs
    from crl_diffusion.run_folder.layout import check_folder, require_measured, runs_in
    from crl_diffusion.training import forecast, loop
    from crl_diffusion.training.plan import resolve_device

    for cell in work:
        cell.finished = loop.finished(cell.config, cell.folder, command.extractor) is not None
        check_folder(cell.config, cell.folder)
    cells.check_others(work, command.out)
    device = resolve_device("auto") if command.launcher == "slurm" else work[0].config.device
    folder = command.extractor_folder or command.out
    jobs = command.jobs or ((os.cpu_count() or 1) if device == "cpu" else 1)
    try:
        tools = evaluate.instruments(command.extractor, images, folder, device)
        evaluate.prepare(tools, work[0].config, images)
    except WriteError as error:
        raise OptionError(f"{error}; make {str(folder)!r} writable, with room on its disk") from error
    for line in tools.about(work[0].config, images):
        console.print(line, highlight=False, markup=False)

    def train_command(cell: Cell) -> list[str]:
        return cells.train_command(cell, command.data_root, command.extractor, folder)

    launcher: runner.Launcher
    if command.launcher == "slurm":
        launcher = slurm.Queue(command.out, sbatch, command.jobs or len(work), train_command)
        launcher.attach([cell for cell in work if not cell.finished])
    else:
        launcher = runner.Pool(jobs, train_command)
    if not all(cell.finished for cell in work):
        for folder_of_run in runs_in(command.out):
            require_measured(folder_of_run, {"data_name": images.name, **tools.names()})
        if command.launcher == "local":
            pass_seconds = forecast.seconds_per_pass(work[0].config, images.shape, images.classes)
            console.print(runner.estimate(work, jobs, pass_seconds), highlight=False)
    failed = runner.run(work, launcher, console, quiet_output(console))
    if len(failed) < len(work):
        # All runs of the folder: a comparison can grow.
        finished_runs = [run for run in runs.find([command.out])[0] if run.path.parent == command.out]
        order = in_order(run.label for run in finished_runs)
        show(console, *report.write([run.path for run in finished_runs], command.out, baseline, order))
    for cell in failed:
        complain(f"{cell.name} failed; the end of {runner.log_path(cell)}:\n{runner.tail(cell, launcher)}")
    if failed:
        complain(
            f"{len(failed)} of {len(work)} runs failed; finished ones are kept; give the same command again to continue"
        )
        return 1
    return 0


def report(command: Report) -> int:
    from crl_diffusion.reporting import report, runs
    from crl_diffusion.run_folder.layout import require_writable

    if not command.folders:
        raise OptionError("no folder was given; name folders written by `train` or `compare`")
    console = Output(soft_wrap=True)
    finished_runs, unfinished = runs.find(command.folders)
    for run in unfinished:
        console.print(f"{run} is not finished and is left out", highlight=False, markup=False)
    for folder in runs.unreadable(command.folders):
        console.print(f"{folder} cannot be read and is left out", highlight=False, markup=False)
    out = command.out or command.folders[0]
    require_writable("--out", out)
    order, baseline = in_order(run.label for run in finished_runs), label(*parse_variant(command.baseline))
    if order and command.baseline != Report.baseline and runs.label_among(finished_runs, baseline) not in order:
        raise OptionError(
            f"--baseline is {command.baseline!r}, but the runs are of {', '.join(order)}; give one of these"
        )
    show(console, *report.write(command.folders, out, baseline, order))
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
    require_run(command.run)
    console = Output(soft_wrap=True)

    from crl_diffusion import diagnosis
    from crl_diffusion.reporting import tables
    from crl_diffusion.run_folder.layout import require_writable

    out = command.out or command.run / "diagnosis"
    require_writable("--out", out)

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


def require_run(folder: Path) -> None:
    """OptionError unless this is the folder of a run. It names the runs in the folder of a comparison."""
    from crl_diffusion.run_folder.layout import require_utf8, runs_in

    require_utf8("the run's folder", folder)
    if (folder / "config.json").exists():
        return
    inside = runs_in(folder)
    if not inside:
        raise OptionError(f"{str(folder)!r} holds no run; give a folder written by `train`")
    names = ", ".join(path.name for path in inside[:12]) + (f" and {len(inside) - 12} more" if inside[12:] else "")
    raise OptionError(f"{str(folder)!r} is no run but holds {names}; give one of them, such as {str(inside[0])!r}")


def sample(command: Sample) -> int:
    if command.count < 1:
        raise OptionError(f"--count is {command.count}; it must be at least 1")
    if command.seed < 0:
        raise OptionError(f"--seed is {command.seed}; it must be at least 0")
    if command.steps is not None and not 1 <= command.steps <= 1000:
        raise OptionError(f"--steps is {command.steps}; it must be between 1 and 1000")
    require_run(command.run)
    console = Output(soft_wrap=True)

    from crl_diffusion.trained_model import drawing, weights

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    trained = weights.read(command.run, command.task, command.device, say)
    classes = drawing.chosen_classes(command.classes, trained)
    steps = trained.config.eval_steps if command.steps is None else command.steps
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("images"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet_output(console)) as progress:
        bar = progress.add_task("drawing", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        paths = drawing.write_images(trained, command.out, classes, command.count, command.seed, steps, advance)
    say(
        f"{trained.subject}: {command.count * len(classes)} images, {command.count} of each class, seed "
        f"{command.seed}, {steps} DDIM steps, in {command.out}"
    )
    say(f"sheet and record: {paths[0]}, {paths[1]}")
    return 0


def export(command: Export) -> int:
    require_run(command.run)
    console = Output(soft_wrap=True)

    from crl_diffusion.trained_model import export, weights

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    trained = weights.read(command.run, command.task, "cpu", say)
    paths = export.write_folder(trained, command.out)
    say(f"{trained.subject}; written for diffusers, how to load it is in the first of:")
    for path in paths:
        say(f"  {path}")
    return 0


def list_choices(command: List) -> int:
    from crl_diffusion.cli import listing

    tables = listing.listings()
    if command.markdown:
        print(listing.markdown(tables), end="")
        return 0
    console = Output()
    if not console.is_terminal:
        console = Output(width=FILE_WIDTH)
    for table in tables:
        console.print(listing.rich_table(table))
    return 0


def show(console: Console, table: object, paths: Sequence[Path]) -> None:
    (console if console.is_terminal else Output(width=FILE_WIDTH)).print(table)
    console.print("\n".join(["Pictures and tables:", *(f"  {path}" for path in paths)]), highlight=False, markup=False)
