"""From the command line to a command's options, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

from crl_diffusion.cli.options import Command, Compare, Diagnose, Export, List, Report, Sample, Train
from crl_diffusion.config.presets import PRESETS
from crl_diffusion.errors import OptionError

DESCRIPTION = (
    "Trains diffusion models on a sequence of tasks, each with new classes. `train` runs one method and `compare` "
    "several. `report` and `diagnose` read finished runs, `sample` and `export` take a run's model away. `list` shows "
    "the data sets, models, methods and presets. `--version`, alone, prints the version."
)


def parse(argv: Sequence[str]) -> Command:
    """The options of one command. A preset's values are the defaults of the other options.

    An option that tyro cannot read ends the process with tyro's message on stderr and exit code 2.
    """
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
    return tyro.cli(  # type: ignore[arg-type]
        commands,
        prog="crl-diffusion",
        description=DESCRIPTION,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _preset_name(argv: Sequence[str]) -> str:
    """The last value of --preset: it is needed before tyro runs, since it sets the defaults of the other options."""
    name = "demo"
    for argument, following in zip(argv, [*argv[1:], ""], strict=False):
        if argument == "--preset":
            name = following
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    return name
