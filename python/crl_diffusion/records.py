"""Records on disk: JSON written whole or not at all, logs of JSON lines that a crash cannot confuse, and locks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crl_diffusion.method import OptionError

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Write beside the final name, sync, rename: readers see the old file or the new one."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a log; a last line that a crash has cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last newline was cut off


class Log:
    """A file of JSON lines that grows; `keep` cuts it back to what a checkpoint knows of."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = len(read_rows(path))

    def keep(self, count: int) -> None:
        """Keep the first `count` rows: those written after the checkpoint will be written again."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().split(b"\n")[:-1]
        if len(lines) < count:
            raise OptionError(
                f"{str(self.path)!r} has {len(lines)} rows, but its checkpoint was taken after {count}; "
                "put the missing rows back, or begin again in a new folder"
            )
        with open(self.path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:count]))
            os.fsync(file.fileno())
        self.count = count

    def append(self, row: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.count += 1

    def sync(self) -> None:
        """Have the rows on the disk before a checkpoint counts them."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


class TensorBoard:
    """Scalars for TensorBoard; `purge_step` hides what an interrupted run had written beyond its checkpoint. Without a
    folder, nothing is written."""

    def __init__(self, folder: Path | None, purge_step: int) -> None:
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """One process at a time holds the lock file; the others wait or, with a refusal, raise an OptionError that says it.
    The lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise OptionError(refusal) from None
        yield
