"""What every command does: read its options, write its files, and measure a row in a process of its own."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def parser(name: str, description: str | None, files: str, out: Path | None = None) -> argparse.ArgumentParser:
    """The options of ``python -m benchmarks.NAME``, with ``--out``, the folder for ``files``."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--out", type=folder, default=out, help=f"folder for {files} (default: {out or 'print only'})")
    return options


def folder(text: str) -> Path:
    """The value of an option that is a folder, which may not exist yet."""
    path = Path(text)
    if not text or (path.exists() and not path.is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder; give another place")
    return path


def count(text: str) -> int:
    """The value of an option that is a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return int(text)


def require_kernels(device: str = "cpu") -> None:
    """Ends the command, with one line and exit code 2, where it would measure plain PyTorch without being asked to."""
    from crl_kernels.backends import built, registry  # a command may install the library first

    device = device.partition(":")[0]
    if device not in ("cpu", "cuda"):
        print(f"--device is {device!r}; choose cpu or cuda", file=sys.stderr)
        raise SystemExit(2)
    if registry.CHOICE != "reference" and registry.implementation(device).startswith("reference"):
        print(
            f"nothing was measured: no kernels run on {device} ({registry.reason(device, 'low_rank_projections')}); "
            f"type: {built.reinstall()}; or CRL_KERNELS_BACKEND=reference, to measure plain PyTorch",
            file=sys.stderr,
        )
        raise SystemExit(2)


def command_line(name: str) -> str:
    """The command that is running, for its record."""
    return " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])


def record_head(name: str) -> dict[str, Any]:
    """The first entries of a record: which command, when, and on which machine."""
    from .measure import processor  # which imports the library; a command may install that first

    return {"command": command_line(name), "date": date.today().isoformat(), "machine": processor()}


def write(folder: Path | None, stem: str, record: dict[str, Any], markdown: str) -> None:
    """FOLDER/STEM.json and FOLDER/STEM.md, whole or as they were before; nothing without a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(record, indent=1) + "\n"), ("md", markdown)):
            unfinished = folder / f"{stem}.{suffix}.tmp"
            unfinished.write_text(text)
            unfinished.replace(folder / f"{stem}.{suffix}")


def run(
    name: str, arguments: Sequence[str], environment: dict[str, str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks.NAME ARGUMENTS``, with these variables added to the environment."""
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def last_line(output: str) -> str:
    """A command prints its result as JSON in the last line; libraries may have printed before it."""
    return output.strip().rpartition("\n")[2]


def in_own_process(name: str, arguments: Sequence[str], threads: int = 1) -> Any:
    """The result of ``python -m benchmarks.NAME ARGUMENTS``; a command that fails ends this one too."""
    process = run(name, arguments, {"OMP_NUM_THREADS": str(threads)})
    if process.returncode != 0:
        raise SystemExit(f"python -m benchmarks.{name} {' '.join(arguments)} failed:\n{process.stderr}")
    return json.loads(last_line(process.stdout))
