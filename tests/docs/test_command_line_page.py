"""The command line's page has the text that `--help` prints.

To renew the page: python tests/docs/test_command_line_page.py
"""

import os
import re
import subprocess
import sys

import pytest
from helpers.pages import DOCS, ROOT

PAGE = DOCS / "reference" / "command-line.md"
RENEW = "python tests/docs/test_command_line_page.py"
COMMANDS = ("train", "compare", "report", "diagnose", "sample", "export", "list")


def help_text(command: str) -> str:
    env = {
        **os.environ,
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join(path for path in [str(ROOT / "python"), *sys.path] if path),
    }
    words = [sys.executable, "-m", "crl_diffusion", command, "--help"]
    printed = subprocess.run(words, capture_output=True, text=True, env=env, check=True).stdout
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


def section(command: str) -> str:
    return f"### {command}\n\n```text\n{help_text(command)}\n```\n"


def renewed(page: str) -> str:
    """The page with everything after the comment that names RENEW made again."""
    comment = page.index(RENEW)
    end = page.index("-->", comment) + len("-->")
    return page[:end] + "\n\n" + "\n".join(map(section, COMMANDS))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_the_help_text(command):
    assert section(command) in PAGE.read_text(), f"the --help of {command} has changed; renew the page: {RENEW}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
