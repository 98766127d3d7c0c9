"""Errors that end a command with one line on stderr: what is wrong, and what to do."""

from __future__ import annotations

import errno
import re
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


def out_of_memory(error: BaseException) -> str | None:
    """How an allocation failed, of Python, of torch on the CPU or a device, or of the system; None for other errors."""
    text = " ".join(str(error).split())
    known = ("out of memory", "can't allocate memory", "bad_alloc", "alloc_failed")
    says_so = isinstance(error, RuntimeError) and any(words in text.lower() for words in known)
    if not (says_so or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)):
        return None
    asked = re.search(r"allocate ([\d.,]+ ?\w+)", text)
    return f"out of memory, asked for {asked[1]} more" if asked else "out of memory"


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


def visible(text: str) -> str:
    """Text whose control characters, which could colour or erase what a terminal shows, are spelled as Python does; new
    lines and tabs stay."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def is_or_are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
