"""Files: JSON and tensors that are written completely or not at all, logs of JSON lines, TensorBoard, locks.

A file with other contents than it should have raises a `RecordError`, and one that cannot be read an `UnreadableError`;
both name the file, what is wrong with it and what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crl_diffusion.errors import PUT_BACK, OptionError, RecordError, UnreadableError, WriteError

Row = dict[str, Any]
UNFINISHED = re.compile(r".+\.[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")  # the temporary names of `replacing`, safetensors


def require_file(path: Path) -> None:
    """RecordError if the path exists and is not a regular file, or is a link to nothing."""
    _require_target(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise RecordError(path, f"is {kind}, expected a file", "move it away, and give the same command again")


def require_folder(path: Path) -> None:
    """RecordError if the path exists and is not a folder, or is a link to nothing."""
    _require_target(path)
    if path.exists() and not path.is_dir():
        raise RecordError(path, "is a file, expected a folder", "move it away, and give the same command again")


def _require_target(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        wrong = f"is a link to {os.readlink(path)!r}, which is not there"
        raise RecordError(path, wrong, "bring it back, or delete the link, and give the same command again")


def refusal_of(folder: Path) -> OSError | None:
    """The error with which the system refuses new files in a folder; None if it takes them."""
    try:
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def read_file(path: Path, remedy: str = PUT_BACK) -> bytes:
    """The content of a file; RecordError if it is missing, UnreadableError if it cannot be read."""
    if (content := read_if_there(path)) is None:
        raise RecordError(path, "is missing", remedy)
    return content


def read_if_there(path: Path) -> bytes | None:
    """The content of a file; None if there is none, UnreadableError if it cannot be read."""
    require_file(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(path, error) from error


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder, which may be missing; UnreadableError if it cannot be listed, where
    `Path.glob` would find none."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(".safetensors"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(folder, error) from error


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """The path of a temporary file next to `path`, to be written within the block. After it, the file is synced, unless
    it can be made again, and renamed: readers see the old file or the new one, whose mode is the umask's. After an
    error it is deleted."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors puts a file in its place that only its owner can read
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a full disk names none
            del error.filename2
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def file_digest(path: str | Path) -> str:
    """sha256 of a file's content; OSError if it cannot be read."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, completely or not at all; a byte of a file's name that is no UTF-8 becomes `\\udc..`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, remedy: str = PUT_BACK) -> Any:
    """The value in a JSON file; RecordError if it cannot be read."""
    content = read_file(path, remedy)
    try:
        return _parse(content)
    except ValueError as error:
        raise RecordError(path, f"is damaged ({error})", remedy) from None


def read_rows(path: Path, remedy: str = PUT_BACK, count: int | None = None) -> list[Row]:
    """The complete rows of a log, or the first `count` of them. A last line that a crash cut off is ignored; a missing
    file has no rows. RecordError, with the number of the row, if a row is not a JSON object."""
    rows = []
    for number, line in enumerate(_complete_lines(path)[:count], start=1):
        try:
            row = _parse(line)
        except ValueError as error:
            raise RecordError(path, f"is damaged in row {number} ({error})", remedy) from None
        if not isinstance(row, dict):
            raise RecordError(path, f"is damaged in row {number} (expected a JSON object)", remedy)
        rows.append(row)
    return rows


def _parse(content: bytes) -> Any:
    """Parse JSON in UTF-8; ValueError says briefly what is wrong."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.pos} of {len(error.doc)}") from None
    except RecursionError:
        raise ValueError("no JSON of this package: nested too deeply") from None


def _complete_lines(path: Path) -> list[bytes]:
    """The complete lines without their newlines. Text after the last newline was cut off by a crash."""
    return (read_if_there(path) or b"").split(b"\n")[:-1]


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


class Log:
    """A growing file of JSON lines with `count` rows. `keep` removes the rows that a checkpoint does not count.

    The rows are also kept in memory: a file that something else has deleted or changed since is written again, and
    `say` is told.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.path, self.say = path, say
        self._lines = _complete_lines(path)

    @property
    def count(self) -> int:
        return len(self._lines)

    @property
    def digest(self) -> str:
        """sha256 of all rows with their newlines."""
        return self._digest(self.count)

    def _digest(self, count: int) -> str:
        return hashlib.sha256(_joined(self._lines[:count])).hexdigest()

    def begins_with(self, count: int, digest: str) -> bool:
        """Whether there are at least `count` rows and the first `count` have this digest; "" accepts any digest."""
        return self.count >= count and digest in ("", self._digest(count))

    def keep(self, count: int) -> None:
        """Keep only the first `count` rows. The rows after the checkpoint will be written again."""
        if self.count < count:
            raise RecordError(
                self.path,
                f"has {self.count} rows, but its checkpoint was taken after {count}",
                "put the missing rows back, or begin again in a new folder",
            )
        self._lines = self._lines[:count]
        if self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(len(_joined(self._lines)))
                os.fsync(file.fileno())

    def append(self, row: Row) -> None:
        line = json.dumps(row).encode()
        with self._opened() as file:
            file.write(line + b"\n")
        self._lines.append(line)

    def sync(self) -> None:
        """Write the rows to the disk, before a checkpoint counts them or a summary is made from them."""
        if not self._lines:
            return
        with self._opened() as file:
            os.fsync(file.fileno())
            file.seek(0)
            same = file.read() == _joined(self._lines)
        if not same:
            changed = self.path.with_name(f"{self.path.name}.changed")
            os.replace(self.path, changed)
            with self._opened() as file:
                os.fsync(file.fileno())
            self.say(f"what was there is kept in {changed.name!r}")

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file, to append to; with all rows if it has none any more."""
        with open(self.path, "a+b") as file:
            if self._lines and not file.tell():
                self.say(f"{str(self.path)!r} was deleted or changed by something else, and is written again")
                file.write(_joined(self._lines))
                file.flush()
            yield file


class TensorBoard:
    """Scalars for TensorBoard. `purge_step` hides values that an interrupted run wrote after its checkpoint. Without
    a folder, nothing is written."""

    def __init__(self, folder: Path | None, purge_step: int) -> None:
        self.folder, self.writer = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            self._restore_folder()
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self._restore_folder()
            self.writer.close()

    def _restore_folder(self) -> None:
        """The writer's own thread opens its file anew for each write, and fails without the folder."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)


PROBED = 0.2  # seconds; `is_locked`, in another process, takes a lock for a moment


@contextmanager
def locked(path: Path, refusal: str | None = None, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file within the block. While another process holds it, raise an OptionError that begins with
    `refusal` or, without a refusal, wait; `say` is told once who holds it. The system releases the lock when the
    process ends, however it ends, on every machine that sees the same lock: see `holder`."""
    try:
        lock = FileLock(path).acquire(timeout=PROBED)
    except Timeout:
        if refusal:
            raise OptionError(f"{refusal} ({holder(path)}){_stale(path)}") from None
        if say:
            say(f"{str(path.parent)!r} is in use by {holder(path)}; waiting for it{_stale(path)}")
        lock = FileLock(path).acquire()
    record = _holder_record(path)
    with lock:
        with suppress(OSError):  # it is for messages only
            write_json(record, {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime(WHEN)})
        try:
            yield
        finally:
            with suppress(OSError):
                record.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file, which may not exist."""
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True


WHEN = "%Y-%m-%d %H:%M:%S %Z"


def _holder_record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def holder(path: Path) -> str:
    """The process that holds a lock file, in words; it has written them beside the file."""
    try:
        found = read_json(_holder_record(path))
        return f"process {int(found['process'])} on {found['host']!s:.80} since {found['since']!s:.40}"
    except (RecordError, UnreadableError, KeyError, TypeError, ValueError):  # just taken, or of an earlier version
        return "another process"


def _stale(path: Path) -> str:
    """What to do about the lock of a machine that died, which some network file systems never release."""
    try:
        host = str(read_json(_holder_record(path))["host"])
    except (RecordError, UnreadableError, KeyError, TypeError):
        return ""
    return "" if host == socket.gethostname() else f". If that process has ended, delete {str(path)!r}"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file completely or not at all, also if several processes write it. WriteError if that is
    impossible, for example because the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{str(path)!r} cannot be written ({error})") from error


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file. UnreadableError if it cannot be read, ValueError if it is damaged."""
    try:
        with open(path, "rb") as file:
            while file.read(2**24):  # safetensors maps the file: a part that the disk cannot read would end the process
                pass
        with safe_open(path, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is not a mapping
            return dict(opened.metadata() or {}), tensors
    except OSError as error:
        raise UnreadableError(path, error) from error
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files of `replacing`, and of safetensors within it, that a killed process has left in a
    folder which no other process writes to."""
    for path in folder.glob("*.tmp*"):
        if UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut, on systems that can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
