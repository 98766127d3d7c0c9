"""Checks of plain arguments: whole numbers, switches, random generators. A bool is no number, although Python has it as
one: ``max_terms=True`` would be a limit of one term."""

from typing import Any

import torch


def require_integer(argument: str, value: Any, least: int, reason: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument} is {shown(value)}; expected an integer >= {least}{reason}.")


def require_switch(argument: str, value: Any) -> None:
    """Any text is true for Python, also "no"."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} is {shown(value)}; expected True or False.")


def require_generator(argument: str, value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{argument} is {shown(value)}; expected a torch.Generator, such as torch.Generator().manual_seed(0)."
        )


def shown(value: Any) -> str:
    """A value in an error message, or its type, where it may take many lines."""
    line = repr(value)
    return line if len(line) <= 60 and "\n" not in line else f"a {type(value).__name__}"
