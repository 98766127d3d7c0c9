"""Errors that end a command with one line on stderr: what was wrong, and what to do."""

from __future__ import annotations

from pathlib import Path


class OptionError(ValueError):
    """An option that cannot be honoured: the command line prints its one line and exits with code 2."""


class WriteError(RuntimeError):
    """A file could not be written; those that were there are as they were."""


class TrainingError(RuntimeError):
    """Training cannot go on; says at which step and why that is likely."""


PUT_BACK = "put it back from a copy"


class RecordError(OptionError):
    """A file that is not what the trainer has written: `damage` names it and what is wrong, `remedy` what to do."""

    def __init__(self, path: Path, damage: str, remedy: str) -> None:
        self.damage = f"{str(path)!r} {damage}"
        super().__init__(f"{self.damage}; {remedy}")
