"""The command line: `crl-diffusion train | compare | report | diagnose | list`.

An option that cannot be honoured, a record that cannot be read and a place that cannot be written to give one line on
stderr and exit code 2; training that cannot go on, exit code 1; SIGINT, SIGTERM and SIGHUP 128 and their number.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crl_diffusion import signals
from crl_diffusion.method import Device, ExtractorName, OptionError, RunConfig, Settings, check, in_order, spell
from crl_diffusion.presets import PRESETS, PresetName

FILE_WIDTH = 150  # columns of a table that goes to a file or a pipe
DESCRIPTION = (
    "Class-incremental diffusion models: train one method, compare several, report on and diagnose what is there, list "
    "what there is to choose from."
)


@dataclass(frozen=True, kw_only=True)
class Train(RunConfig):
    """Train one method with one seed. To resume, give the same command again; a finished run is left alone."""

    out: Path
    """Folder of the run."""
    preset: PresetName = "demo"
    """Settings to begin with; options given beside it win. `crl-diffusion list` shows what each stands for."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    extractor: ExtractorName = "cnn"
    """Network whose features FIDs are measured on: cnn and lenet are small classifiers that are trained on the data set
    first; inception is the literature's, whose weights you download. Accuracies are always the cnn's."""
    extractor_folder: Path | None = None
    """Folder where trained extractors and statistics of real images are kept, and where inception's weights are looked
    for, pt_inception-2015-12-05-6726825d.pth; by default <out>."""


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """Train several methods with several seeds, one process a core, and put them into one table and pictures."""

    out: Path
    """Folder of the comparison; each run has a folder in it. More methods and seeds can be added to it later."""
    preset: PresetName = "demo"
    """Settings, methods and seeds to begin with; options given beside it win. `crl-diffusion list` shows them."""
    methods: tuple[str, ...] = ("fine-tune", "gd", "gd+rank1")
    """What to compare: NAME or NAME:OPTION,... each."""
    seeds: tuple[int, ...] = (0,)
    """One run of each method for each."""
    lams: tuple[float, ...] = ()
    """One run for each of these strengths, of every method that has a penalty; by default its own."""
    jobs: int = 0
    """Runs at a time; 0 means one a CPU core or, on a CUDA device, one."""
    baseline: str = "gd"
    """With two seeds or more, differences are taken to this method, paired by seed."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    extractor: ExtractorName = "cnn"
    """Network whose features FIDs are measured on: cnn and lenet are small classifiers that are trained on the data set
    first; inception is the literature's, whose weights you download. Accuracies are always the cnn's."""
    extractor_folder: Path | None = None
    """Folder where trained extractors and statistics of real images are kept, and where inception's weights are looked
    for, pt_inception-2015-12-05-6726825d.pth; by default <out>."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Table and pictures from run folders, or from folders that hold run folders; trains nothing."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """What `train` or `compare` has written."""
    out: Path | None = None
    """Where to write; by default the first folder."""
    baseline: str = "gd"
    """With two seeds or more, differences are taken to this method, paired by seed."""


@dataclass(frozen=True, kw_only=True)
class Diagnose:
    """Is rank 1 enough for a trained model? Looks at its Fisher at single timesteps and over all; trains nothing."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run that `train` has written; its newest checkpoint is looked at."""
    task: int | None = None
    """Take only the images of this task, from 1; by default those of all tasks that the model has learnt."""
    samples: int = 256
    """Per-sample gradients at every timestep, at least 48; one backward pass holds them, so memory limits them."""
    timesteps: tuple[int, ...] = ()
    """Timesteps to look at, from 0 to 999; by default 20 100 300 500 700 900 980."""
    seed: int = 0
    """Names the random streams that images, noise and uniform timesteps come from."""
    out: Path | None = None
    """Where to write; by default <run>/diagnosis."""
    data_root: Path = Path("data")
    """Where data sets are kept that do not come with a package, in torchvision's layout (MNIST/raw/...)."""
    device: Device = "auto"
    """Where to compute; auto takes a CUDA device if there is one."""


@dataclass(frozen=True, kw_only=True)
class List:
    """Data sets, models, methods and presets with their numbers."""

    markdown: bool = False
    """Print what python/PRESETS.md holds."""


Command = Train | Compare | Report | Diagnose | List


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    try:
        with signals.handled():
            command = parse(sys.argv[1:] if argv is None else argv)
            if isinstance(command, Train):
                return train(command)
            if isinstance(command, Compare):
                return compare(command)
            if isinstance(command, Diagnose):
                return diagnose(command)
            if isinstance(command, List):
                return list_choices(command)
            return report(command)
    except OptionError as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:
        complain(f"error: {error}; see that there is such a place, that it can be read and written, and has room")
        return 2
    except signals.Stopped as stop:
        if is_first():
            complain(f"{stop}; give the same command again to resume")
        return 128 + stop.signum


def complain(line: str) -> None:
    """On stderr, where there is one: a terminal that has hung up takes nothing."""
    with suppress(OSError):
        print(f"crl-diffusion: {line}", file=sys.stderr, flush=True)


def is_first() -> bool:
    """Of torchrun's processes the first one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def parse(argv: Sequence[str]) -> Command:
    """tyro's parser, with its boxed complaints made into one line. A preset's values are the options' defaults."""
    name = _preset_asked_for(argv)
    if name not in PRESETS:
        raise OptionError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    begin: dict[str, Any] = {"out": tyro.MISSING, "preset": name, "extractor": preset.extractor, **preset.settings}
    choices = Union[  # noqa: UP007 - made of values
        Annotated[Train, tyro.conf.subcommand("train", default=Train(method=tyro.MISSING, **begin))],
        Annotated[
            Compare,
            tyro.conf.subcommand("compare", default=Compare(methods=preset.methods, seeds=preset.seeds, **begin)),
        ],
        Annotated[Report, tyro.conf.subcommand("report")],
        Annotated[Diagnose, tyro.conf.subcommand("diagnose")],
        Annotated[List, tyro.conf.subcommand("list")],
    ]
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            parsed: Command = tyro.cli(choices, prog="crl-diffusion", description=DESCRIPTION, args=list(argv))  # type: ignore[arg-type]
    except SystemExit as end:
        if not end.code:
            raise
        raise OptionError(one_line(complaint.getvalue())) from None
    sys.stderr.write(complaint.getvalue())
    return parsed


def _preset_asked_for(argv: Sequence[str]) -> str:
    """The last value of --preset; it has to be known before the other options' defaults are."""
    found = "demo"
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--preset":
            found = following
        elif word.startswith("--preset="):
            found = word.partition("=")[2]
    return found


def one_line(box: str) -> str:
    """What a box of tyro's says, without its frame, colours and help texts."""
    words: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        text = line.strip("│╭╮╰╯ ")
        if re.fullmatch("─+", text):  # the rule above help texts, or the bottom of the frame
            if words:
                break
            continue
        words.append(re.sub("[─ ]+", " ", text) if "─" not in text else re.sub("[─ ]+", " ", text).strip() + ":")
    return " ".join(words) + "; see --help"


def quiet_output(console: Console) -> bool:
    """Plain lines instead of bars: no terminal, or CI says so."""
    return not console.is_terminal or os.environ.get("CI", "").lower() in ("1", "true")


def train(command: Train) -> int:
    check(command)
    config = RunConfig(**{field.name: getattr(command, field.name) for field in fields(RunConfig)})
    console = Console(soft_wrap=True)

    # torch and diffusers take seconds to import: not before the options are known to be good.
    from crl_diffusion import loop
    from crl_diffusion.state import TrainingError

    first = is_first()
    if loop.finished(config, command.out, command.extractor) is not None:
        if first:
            console.print(f"{command.out} is finished already", highlight=False)
        return 0

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    clock = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clock, console=console, disable=quiet_output(console) or not first) as progress:
        bar = progress.add_task(f"{config.method}, seed {config.seed}", total=None)

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
    forgotten = "-" if summary["forgetting"] is None else f"{summary['forgetting']:.1f}"
    quality = f"conditional accuracy {summary['accuracy']:.3f}"
    say(f"average FID {summary['average_fid']:.1f}, forgetting {forgotten}, {quality}")
    say(f"pictures and records: {command.out}")
    return 0


def compare(command: Compare) -> int:
    from crl_diffusion import compare as comparison

    for name, values in (("methods", command.methods), ("seeds", command.seeds)):
        if not values or len(set(values)) != len(values):
            raise OptionError(f"--{name} is {' '.join(map(str, values))!r}; give at least one, and none twice")
    baseline = spell(command.baseline)
    if command.jobs < 0:
        raise OptionError(f"--jobs is {command.jobs}; it must be 0 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("compare starts its own processes; start it without torchrun, which is for train")
    work = comparison.cells(command, command.methods, command.seeds, command.out, command.lams)
    for cell in work:
        check(cell.config)
    console = Console(soft_wrap=True)

    from crl_diffusion import cost, data, evaluation, loop
    from crl_diffusion import report as reporting
    from crl_diffusion.checkpoint import WriteError
    from crl_diffusion.run_folder import check_folder, require_measured, require_place, resolve, resolve_device
    from crl_diffusion.state import require_fisher_images, stage_steps

    on_cpu = resolve_device(command.device) == "cpu"
    require_place("--out", command.out)
    for cell in work:
        cell.config = resolve(cell.config)
        cell.finished = loop.finished(cell.config, cell.folder, command.extractor) is not None
        check_folder(cell.config, cell.folder)
    comparison.check_others(work, command.out)
    images = data.load(work[0].config, command.data_root)
    for cell in work:
        require_fisher_images(cell.config, images)
        cell.stage_steps = stage_steps(cell.config, images)
    folder = command.extractor_folder or command.out
    jobs = command.jobs or ((os.cpu_count() or 1) if on_cpu else 1)
    try:
        tools = evaluation.instruments(command.extractor, images, folder, resolve_device(command.device))
        evaluation.prepare(tools, work[0].config, images)
    except WriteError as error:
        raise OptionError(f"{error}; make {str(folder)!r} writable, with room on its disk") from error
    for line in tools.about(work[0].config, images):
        console.print(line, highlight=False, markup=False)
    if not all(cell.finished for cell in work):
        for begun in sorted(command.out.glob("*/config.json")):
            require_measured(begun.parent, {"data_name": images.name, **tools.names()})
        a_pass = cost.seconds_per_pass(work[0].config, images.shape, images.classes)
        console.print(comparison.estimate(work, jobs, a_pass), highlight=False)
    failed = comparison.run(work, jobs, command.data_root, command.extractor, folder, console, quiet_output(console))
    if len(failed) < len(work):
        # With what the folder held before: a comparison may grow.
        runs = [run for run in reporting.find([command.out])[0] if run.path.parent == command.out]
        order = in_order(run.method for run in runs)
        show(console, *reporting.write([run.path for run in runs], command.out, baseline, order))
    for cell in failed:
        complain(f"{cell.name} failed; its last lines:\n{comparison.tail(cell)}")
    if failed:
        complain(
            f"{len(failed)} of {len(work)} runs failed; finished ones are kept; give the same command again to go on"
        )
        return 1
    return 0


def report(command: Report) -> int:
    from crl_diffusion import report as reporting
    from crl_diffusion.run_folder import require_place

    if not command.folders:
        raise OptionError("no folder was given; name those that `train` or `compare` has written")
    console = Console(soft_wrap=True)
    runs, unfinished = reporting.find(command.folders)
    for run in unfinished:
        console.print(f"{run} is not finished and is left out", highlight=False)
    out = command.out or command.folders[0]
    require_place("--out", out)
    order = in_order(run.method for run in runs)
    show(console, *reporting.write(command.folders, out, spell(command.baseline), order))
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
        raise OptionError(f"{str(command.run)!r} holds no run; give a folder that `train` has written")
    console = Console(soft_wrap=True)

    from crl_diffusion import diagnosis, tables
    from crl_diffusion.run_folder import require_place

    out = command.out or command.run / "diagnosis"
    require_place("--out", out)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    found, paths = diagnosis.of_run(
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
    say("\n" + "\n".join(found.verdict.sentences) + "\n")
    head, body = found.table()
    caption = f"{found.num_samples} samples at every timestep; brackets are 95 % intervals."
    show(console, tables.rich_table(head, body, caption), paths)
    return 0


def list_choices(command: List) -> int:
    from crl_diffusion import listing

    found = listing.listings()
    if command.markdown:
        print(listing.markdown(found), end="")
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    for table in found:
        console.print(listing.rich_table(table))
    return 0


def show(console: Console, table: object, paths: Sequence[Path]) -> None:
    (console if console.is_terminal else Console(width=FILE_WIDTH)).print(table)
    console.print("\n".join(["Pictures and tables:", *(f"  {path}" for path in paths)]), highlight=False, markup=False)
