"""The command line: `crl-diffusion train | compare | report | diagnose | sample | export | list`.

Exit code 2, with a message on stderr: an option that cannot be used, a record that cannot be read, a folder or an
output that cannot be written, a package that is missing. Exit code 1: training cannot continue, or memory has run out.
After SIGINT, SIGTERM or SIGHUP: 128 plus the signal's number.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress

from crl_diffusion import signals
from crl_diffusion.cli.messages import complain, is_first
from crl_diffusion.errors import OptionError, UnreadableError, out_of_memory

LOWER = {  # where memory runs out outside of training
    "train": "lower --per-class or --image-size",
    "compare": "lower --jobs, --per-class or --eval-samples",
    "diagnose": "lower --samples",
    "sample": "lower --count",
}
CLOSED_PIPE = 128 + 13  # as a shell reports a process that SIGPIPE has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    try:
        with signals.handled(_say_stopped):
            open_what_is_closed()
            signals.end_with_compare()
            encode_what_can_be()
            try:
                return run(words)
            finally:
                sys.stdout.flush()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("crl_diffusion", "crl_kernels"):
            raise
        what = f"the Python package {missing!r} is missing" if missing else str(error)
        complain(f'error: {what}; type: pip install "crl-kernels[trainer]"')
        return 2
    except (OptionError, UnreadableError) as error:
        complain(f"error: {error}")
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        return CLOSED_PIPE
    except (MemoryError, RuntimeError, OSError) as error:
        if problem := out_of_memory(error):
            complain(f"error: {problem}; {LOWER.get(words[0] if words else '', 'free some memory')}")
            return 1
        if not isinstance(error, OSError):
            raise
        complain(f"error: {error}; check that the path exists, can be read and written, and has free space")
        return 2
    except signals.Stopped as stop:
        _say_stopped(stop)
        return 128 + stop.signum


def _say_stopped(stop: signals.Stopped) -> None:
    if is_first():
        complain(f"{stop}; give the same command again to resume")


def run(argv: Sequence[str]) -> int:
    """Run the command of a command line; returns its exit code."""
    if argv and argv[0] == "--version":
        from crl_kernels import __version__

        print(f"crl-diffusion {__version__}")
        return 0
    # What these import comes with the extra `trainer`, so a package may be missing.
    from crl_diffusion.cli import commands, options
    from crl_diffusion.cli.parser import parse

    if not argv:
        with redirect_stdout(sys.stderr), suppress(SystemExit):
            parse(["--help"])
        return 2
    command = parse(argv)
    if isinstance(command, options.Train):
        return commands.train(command)
    if isinstance(command, options.Compare):
        return commands.compare(command)
    if isinstance(command, options.Diagnose):
        return commands.diagnose(command)
    if isinstance(command, options.Sample):
        return commands.sample(command)
    if isinstance(command, options.Export):
        return commands.export(command)
    if isinstance(command, options.List):
        return commands.list_choices(command)
    return commands.report(command)


SPELLED = {"−": "-", "–": "-", "±": "+-", "÷": "/", "×": "x", "↓": "v", "↑": "^", "ρ": "rho", "κ": "kappa", "ⁿ": "^n"}


def open_what_is_closed() -> None:
    """Let standard streams that the caller has closed lead nowhere: the next file that is opened would take their
    number, and get what is printed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open for as long as this process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def encode_what_can_be() -> None:
    """Let an output spell characters that its encoding lacks in ASCII, or as `?`, instead of ending the command. UTF-8
    lacks those that Python makes of a file's name in another encoding."""
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    if codecs.lookup(sys.stdout.encoding).name != "utf-8" or sys.stdout.errors == "strict":
        codecs.register_error("spelled", _spelled)
        sys.stdout.reconfigure(errors="spelled")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELLED.get(x, "?") for x in error.object[error.start : error.end]), error.end
