"""Errors that end a command with one line on stderr: what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class OptionError(ValueError):
    """An option that cannot be used. The command line prints the message and exits with code 2."""


class WriteError(RuntimeError):
    """A file could not be written. Existing files are unchanged."""


class TrainingError(RuntimeError):
    """Training cannot continue. The message names the step and the likely cause."""


class UnreadableError(Exception):
    """A file is there and cannot be read, which says nothing about its contents: nothing may replace it."""

    def __init__(self, path: Path, error: OSError) -> None:
        reason = error.strerror or str(error)
        super().__init__(f"{str(path)!r} cannot be read ({reason}); make it readable, and give the same command again")


PUT_BACK = "put it back from a copy"


class RecordError(OptionError):
    """A file is not as the trainer wrote it. `damage` names it and what is wrong; `remedy` says what to do."""

    def __init__(self, path: Path, damage: str, remedy: str) -> None:
        self.damage = f"{str(path)!r} {damage}"
        super().__init__(f"{self.damage}; {remedy}")


def in_words(names: Sequence[str]) -> str:
    """The first twelve names and the number of the others: "a, b and c"."""
    words = [name if name.isprintable() else repr(name) for name in names[:12]]
    words += [f"{len(names) - 12} more"] if len(names) > 12 else []
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
