"""The folder that a command writes its results to: a new or empty one, or one of the very same command."""

from __future__ import annotations

from pathlib import Path

from crl_diffusion.errors import OptionError, RecordError
from crl_diffusion.files import UNFINISHED, Row, read_json, write_json
from crl_diffusion.run_folder.layout import require_writable


def claim(out: Path, name: str, record: Row) -> None:
    """Create the folder `out` and write `record`, which tells its command from all others, to the file `name` in it.

    OptionError, and nothing is changed, if the folder holds something else. An interrupted command can be repeated.
    """
    require_writable("--out", out)
    if out.is_dir() and any(not UNFINISHED.fullmatch(path.name) for path in out.iterdir()):
        try:
            saved = read_json(out / name)
        except RecordError:
            saved = None
        if saved == record:
            return
        differ = [key for key in record if isinstance(saved, dict) and key in saved and saved[key] != record[key]]
        others = f"results with another {', '.join(differ)}" if differ else "other files"
        raise OptionError(f"--out {str(out)!r} holds {others}; give a new or an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / name, record)
