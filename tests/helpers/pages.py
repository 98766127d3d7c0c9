"""Pages of the documentation: their fenced blocks, and what runs them as they stand.

To write what a page prints into its text blocks: python tests/helpers/pages.py docs/tutorials/PAGE.md
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
# What the environment of a test provides already: the packages, and the folder to work in.
PROVIDED = re.compile(r"^(pip install|cd) .*$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the page, where the text begins; from 1
    section: str  # the heading above, of the second level; "" before the first


def blocks(path: Path) -> list[Block]:
    page = path.read_text()
    return [
        Block(*m.groups(), page.count("\n", 0, m.start(2)) + 1, (["", *HEADING.findall(page, 0, m.start())])[-1])
        for m in FENCE.finditer(page)
    ]


def execute(block: Block, path: Path, namespace: dict[str, Any]) -> None:
    """With the page's own line numbers in an error."""
    exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), namespace)


def run_python_blocks(
    path: Path, section: str | None = None, without: Collection[str] = (), until: str | None = None
) -> dict[str, Any]:
    """Run a page's Python blocks one after the other; the names that they leave. ``section``: only what stands before
    the first section, and this one. ``without``: sections to leave out. ``until``: the blocks up to the one that
    defines this name."""
    namespace: dict[str, Any] = {}
    for block in blocks(path):
        chosen = section in (None, block.section) or not block.section
        if block.language == "python" and chosen and block.section not in without and until not in namespace:
            execute(block, path, namespace)
    assert until is None or until in namespace, f"{path} defines no {until}"
    return namespace


def run(path: Path) -> Iterator[tuple[str, str]]:
    """Run a page in the working directory, from top to bottom: Python blocks in one fresh namespace, bash blocks in a
    shell each. Yields, for each block that the page follows by a text block, (what was printed, the text block)."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(path):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                execute(block, path, namespace)
            printed = output.getvalue()
        elif block.language == "bash":
            printed = shell(PROVIDED.sub("", block.text))
        elif block.language == "text":
            yield printed, block.text


def shell(commands: str) -> str:
    """What the commands print on stdout; this process's Python and packages are found first."""
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], capture_output=True, text=True, env=env)
    assert result.returncode == 0, f"{commands}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def renew(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = iter([output for output, _ in run(path)])
        os.chdir(ROOT)
    text_block = re.compile(r"^```text\n.*?^```$", re.MULTILINE | re.DOTALL)
    page = text_block.sub(lambda block: f"```text\n{next(printed)}```", path.read_text())
    path.write_text(re.sub(r" +$", "", page, flags=re.MULTILINE))


if __name__ == "__main__":
    renew(Path(sys.argv[1]).resolve())
