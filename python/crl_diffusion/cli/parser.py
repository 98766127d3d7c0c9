"""From the command line to a command's options, before torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import tyro

from crl_diffusion.cli.options import Command, Compare, Diagnose, Export, List, Report, Sample, Train
from crl_diffusion.config.presets import PRESETS
from crl_diffusion.errors import OptionError

DESCRIPTION = (
    "Trains diffusion models on a sequence of tasks, each with new classes. `train` runs one method and `compare` "
    "several. `report` and `diagnose` read finished runs, `sample` and `export` take a run's model away. `list` shows "
    "the data sets, models, methods and presets. `--version`, alone, prints the version."
)

# The options that take several values.
SEVERAL = {
    f"--{field.name}" for command in get_args(Command) for field in fields(command) if isinstance(field.default, tuple)
}


def parse(argv: Sequence[str]) -> Command:
    """The options of one command. A preset's values are the defaults of the other options.

    An option that tyro cannot read ends the process with tyro's message on stderr and exit code 2.
    """
    _require_words(argv)
    name = _preset_name(argv)
    if name not in PRESETS:
        raise OptionError(f"--preset is {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    defaults: dict[str, Any] = {"out": tyro.MISSING, "preset": name, "extractor": preset.extractor, **preset.settings}
    commands = Union[  # noqa: UP007 - built from values
        Annotated[Train, tyro.conf.subcommand("train", default=Train(method=tyro.MISSING, **defaults))],
        Annotated[
            Compare,
            tyro.conf.subcommand("compare", default=Compare(methods=preset.methods, seeds=preset.seeds, **defaults)),
        ],
        Annotated[Report, tyro.conf.subcommand("report")],
        Annotated[Diagnose, tyro.conf.subcommand("diagnose")],
        Annotated[Sample, tyro.conf.subcommand("sample")],
        Annotated[Export, tyro.conf.subcommand("export")],
        Annotated[List, tyro.conf.subcommand("list")],
    ]
    command = tyro.cli(  # type: ignore[arg-type]
        commands,
        prog="crl-diffusion",
        description=DESCRIPTION,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return replace(command, **{field.name: _expanded(getattr(command, field.name)) for field in fields(command)})


def _require_words(argv: Sequence[str]) -> None:
    """OptionError for an empty word, which an unset variable of the shell leaves behind and which as a path is the
    present folder; for an option of several values that has none, or is given twice: its first would be forgotten."""
    before, seen = "", set[str]()
    for word in (*argv, "--"):
        if before in SEVERAL and word.startswith("--"):
            raise OptionError(f"{before} is given without a value; give it one or several, or leave it out")
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value and (equals or not option):
            name = option or (before if before.startswith("--") else "an argument")
            raise OptionError(f"{name} is ''; give a value, or leave it out (is a variable of the shell not set?)")
        option = option.replace("_", "-")
        if option in SEVERAL and option in seen:
            raise OptionError(f"{option} is given twice; give it once, with all values after it: {option} A B C")
        seen.add(option)
        before = word


def _expanded(value: Any) -> Any:
    """A path, or each of several, with `~` as the home folder: the shell leaves it in --out=~/x."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _preset_name(argv: Sequence[str]) -> str:
    """The last value of --preset: it is needed before tyro runs, since it sets the defaults of the other options."""
    name = "demo"
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        if argument == "--preset":
            name = following
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    return name
