"""Errors that end a command with one line on stderr: what is wrong, and what to do."""

from __future__ import annotations

from pathlib import Path


class OptionError(ValueError):
    """An option that cannot be used. The command line prints the message and exits with code 2."""


class WriteError(RuntimeError):
    """A file could not be written. Existing files are unchanged."""


class TrainingError(RuntimeError):
    """Training cannot continue. The message names the step and the likely cause."""


PUT_BACK = "put it back from a copy"


class RecordError(OptionError):
    """A file is not as the trainer wrote it. `damage` names it and what is wrong; `remedy` says what to do."""

    def __init__(self, path: Path, damage: str, remedy: str) -> None:
        self.damage = f"{str(path)!r} {damage}"
        super().__init__(f"{self.damage}; {remedy}")
