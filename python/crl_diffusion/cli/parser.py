"""From the command line to a command's options, before torch is imported."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Annotated, Any, Union

import tyro

from crl_diffusion.cli.options import Command, Compare, Diagnose, List, Report, Train
from crl_diffusion.config.presets import PRESETS
from crl_diffusion.errors import OptionError

DESCRIPTION = (
    "Class-incremental diffusion models: train one method, compare several, report on and diagnose what is there, list "
    "what there is to choose from."
)


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
