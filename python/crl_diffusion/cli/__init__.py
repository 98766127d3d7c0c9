"""The command line: `crl-diffusion train | compare | report | diagnose | sample | export | list`.

Exit code 2, with a message on stderr: an option that cannot be used, a record that cannot be read, a folder that cannot
be written. Exit code 1: training cannot continue. After SIGINT, SIGTERM or SIGHUP: 128 plus the signal's number.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Sequence

from crl_diffusion import signals
from crl_diffusion.cli.commands import (
    compare,
    complain,
    diagnose,
    export,
    is_first,
    list_choices,
    report,
    sample,
    train,
)
from crl_diffusion.cli.options import Compare, Diagnose, Export, List, Sample, Train
from crl_diffusion.cli.parser import parse
from crl_diffusion.errors import OptionError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    encode_what_can_be()
    try:
        with signals.handled():
            command = parse(sys.argv[1:] if argv is None else argv)
            if isinstance(command, Train):
                return train(command)
            if isinstance(command, Compare):
                return compare(command)
            if isinstance(command, Diagnose):
                return diagnose(command)
            if isinstance(command, Sample):
                return sample(command)
            if isinstance(command, Export):
                return export(command)
            if isinstance(command, List):
                return list_choices(command)
            return report(command)
    except OptionError as error:
        complain(f"error: {error}")
        return 2
    except OSError as error:
        complain(f"error: {error}; check that the path exists, can be read and written, and has free space")
        return 2
    except signals.Stopped as stop:
        if is_first():
            complain(f"{stop}; give the same command again to resume")
        return 128 + stop.signum


SPELLED = {"−": "-", "–": "-", "±": "+-", "÷": "/", "×": "x", "↓": "v", "↑": "^", "ρ": "rho", "κ": "kappa", "ⁿ": "^n"}


def encode_what_can_be() -> None:
    """Let an output that is not in UTF-8 spell other characters in ASCII, or as `?`, instead of ending the command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        codecs.register_error("spelled", _spelled)
        sys.stdout.reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELLED.get(x, "?") for x in error.object[error.start : error.end]), error.end
