"""The folder of a run: which run it belongs to, what may be in it, and the lock that admits one writing process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crl_diffusion import signals
from crl_diffusion.config.settings import ADDED, RunConfig
from crl_diffusion.errors import OptionError, RecordError, UnreadableError
from crl_diffusion.files import (
    is_locked,
    locked,
    read_json,
    read_rows,
    refusal_of,
    remove_unfinished,
    require_file,
    require_folder,
    tensor_files,
    write_json,
    write_text,
)
from crl_diffusion.run_folder import checkpoint, origin
from crl_diffusion.run_folder.readers import METRICS, read_config


def digest_of(config: RunConfig) -> str:
    """sha256 of everything that determines the results of a run. A checkpoint stores it, to name its run."""
    return digest_of_saved(config.as_json())


def digest_of_saved(run: dict[str, Any]) -> str:
    """The same for a configuration as stored in config.json."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def claim(
    config: RunConfig,
    out: Path,
    data_name: str,
    network_names: dict[str, str],
    about_data: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write config.json or, if it exists, require the same data set and the same networks for evaluation. `about_data`
    is kept in it: where the data were, the names of the classes, and what was left out."""
    path, names = out / "config.json", {"data_name": data_name, **network_names}
    if path.exists():
        require_measured(out, names)
        return
    origins = {"environment": origin.environment(), "git": origin.git_state(), "command": origin.command_line()}
    write_json(path, {"run": config.as_json(), **names, **about_data, **origins})


def require_measured(out: Path, names: dict[str, str]) -> None:
    """OptionError unless the run in `out` was started with the same data set, extractor and classifier."""
    saved = read_config(out)
    for key, name in names.items():
        if saved.get(key, name) != name:
            raise OptionError(
                f"the {key} is {name}, but the run in {str(out)!r} was begun with {saved[key]}; choose that one with "
                "--data-root, --extractor and --extractor-folder, or another folder"
            )


def check_folder(config: RunConfig, out: Path) -> None:
    """OptionError if the folder holds a run of another configuration; it names the options that differ."""
    if (out / "config.json").exists() and (changes := differences(config, out)):
        raise OptionError(f"--out {str(out)!r} holds another run ({changes}); use another folder, or delete this one")


def differences(config: RunConfig, out: Path, ignored: Collection[str] = ()) -> str:
    """The options in which a resolved configuration differs from that of the run in `out`, with both values; "" if
    there are none."""
    saved, wanted = ({**ADDED, **values} for values in (read_config(out)["run"], config.as_json()))
    keys = sorted(key for key in saved.keys() | wanted.keys() if saved.get(key) != wanted.get(key))
    if "method" in keys:
        ignored = {*ignored, "recipe"}  # it is what the method stands for
    return ", ".join(
        f"{key} {saved.get(key)!r} there, {wanted.get(key)!r} asked for" for key in keys if key not in ignored
    )


FOLDERS = ("checkpoints", "samples", "tensorboard")
WRITTEN = ("checkpoints", "samples", "real-statistics")  # folders of files that are written under temporary names
FILES = (
    *(".lock", ".lock.json", "config.json", "metrics.jsonl", "timings.jsonl", "summary.json", "log.txt"),
    *("samples.png", "fid_matrix.png", "curves.png"),
)


def require_utf8(option: str, path: Path) -> None:
    """OptionError for a path whose bytes are not UTF-8: safetensors and TensorBoard cannot open it."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        raise OptionError(
            f"{option} is {str(path)!r}, whose name is not in UTF-8, which files of tensors need; rename it, or give "
            "another place"
        ) from None


def require_place(option: str, out: Path) -> None:
    """OptionError if `out`, or the nearest of its parents that exists, is not a folder, or has a name not in UTF-8."""
    require_utf8(option, out)
    existing = _existing(out)
    if not existing.is_dir():
        raise OptionError(f"{option} is {str(out)!r}, but {str(existing)!r} is not a folder; give another place")


def _existing(out: Path) -> Path:
    return next(path for path in (out, *out.absolute().parents) if path.exists())


def require_writable(option: str, out: Path) -> None:
    """`require_place`, and OptionError unless files can be added to `out`, or it can be created."""
    require_place(option, out)
    existing = _existing(out)
    if (error := refusal_of(existing)) is not None:
        raise OptionError(
            f"{option} is {str(out)!r}, but {str(existing)!r} cannot be written to ({error.strerror}); make it "
            "writable, or give another place"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one: a record with contents of its own, or a checkpoint. Other
    software has files of these names, too."""

    def config() -> bool:
        return isinstance(read_json(folder / "config.json")["run"], dict)

    def metrics() -> bool:
        return read_rows(folder / "metrics.jsonl", count=1)[0]["kind"] in METRICS

    def summary() -> bool:
        return "average_fid" in read_json(folder / "summary.json")

    def checkpoints() -> bool:
        return any(map(checkpoint.is_named_as_one, tensor_files(folder / "checkpoints")))

    for holds in (config, metrics, summary, checkpoints):
        # What is missing, damaged, of another shape, or may not be read says nothing.
        with suppress(RecordError, UnreadableError, OSError, LookupError, TypeError):
            if holds():
                return True
    return False


def runs_in(folder: Path) -> list[Path]:
    """The folders in this one that hold runs, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path)) if folder.is_dir() else []


def require_no_run(out: Path, folder: Path) -> None:
    """OptionError if `folder`, which is `out` or holds it, is that of a run: no other run may be in it."""
    if is_run(folder):
        raise OptionError(f"--out is {str(out)!r}, but {folder.name!r} is the folder of a run; give another place")


def require_layout(out: Path) -> None:
    """Refuse a path for a run that is a file, lies in another run's folder or holds other runs, or a run folder that
    has a folder in place of a file or the reverse."""
    require_place("--out", out)
    require_no_run(out, out.absolute().parent)
    if not is_run(out) and (inside := runs_in(out)):
        raise OptionError(
            f"--out is {str(out)!r}, which holds other runs, such as {inside[0].name}; give a folder of the run's own, "
            f"such as {str(out / 'another')!r}"
        )
    for name in FOLDERS:
        require_folder(out / name)
    for name in FILES:
        require_file(out / name)
    for name in ("checkpoints", "samples"):
        for path in (out / name).glob("*.safetensors"):
            require_file(path)


def restore_config(out: Path, say: Callable[[str], None]) -> None:
    """If config.json is missing or cannot be read, write it again from a checkpoint that stores it, bit for bit.
    RecordError if it cannot be read and no checkpoint stores it."""
    path = out / "config.json"
    try:
        if path.exists():
            read_config(out)
            return
        damage = RecordError(path, "is missing", "")
    except RecordError as error:
        damage = error
    saved, _ = checkpoint.latest(out / "checkpoints", _require_config)
    if saved is not None:
        write_text(path, saved.config)
        say(f"{damage.damage}; restored from a checkpoint")
    elif path.exists():
        raise damage


def _require_config(saved: checkpoint.Checkpoint) -> None:
    if not saved.config:
        raise ValueError("it was written by an earlier version and does not store config.json")


def make_writable(out: Path) -> None:
    """Create the folder if needed. OptionError if it cannot be written to."""
    require_file(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "a"):
            pass
    except OSError as error:
        raise OptionError(
            f"--out {str(out)!r} cannot be written to ({error.strerror}); make it writable, or give another folder"
        ) from error


@contextmanager
def writing(out: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Lock the folder for writing, and delete what a killed process has left unfinished in it. OptionError if another
    process holds the lock; a run that `compare` has started waits, and `say` is told so."""
    refusal = f"--out {str(out)!r} is being written by another process; wait for it, or use another"
    with locked(out / ".lock", None if signals.of_compare() else refusal, say):
        _remove_unfinished(out)
        yield


def _remove_unfinished(out: Path) -> None:
    for folder in (out, *(out / name for name in WRITTEN)):
        remove_unfinished(folder)


def in_use(out: Path) -> bool:
    """Whether another process holds the lock of this folder."""
    return is_locked(out / ".lock")


@contextmanager
def comparing(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder of a comparison. While another `compare` holds the lock, wait; `say` is told so. What a killed
    process has left unfinished is deleted, but not if jobs that an earlier `compare` has submitted may write there."""
    make_writable(out)
    with locked(out / ".lock", say=say):
        if not (out / "slurm").exists():
            _remove_unfinished(out)
        yield
